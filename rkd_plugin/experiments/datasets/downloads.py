"""Published files from where they lie, held against their checksums."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path

from torchvision.datasets.utils import download_url


def download(owner: str, url: str, path: Path, md5: str, remedy: str) -> None:
    """Fetch ``url`` to ``path``, or leave what is there if it is the published file.

    Raises:
        ConnectionError: if the download fails.
        ValueError: if what comes is not the published file.
    """
    try:
        download_url(url, str(path.parent), path.name, md5)
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{owner}: {url} failed ({error}); {remedy}") from error
    except RuntimeError as error:
        raise ValueError(f"{owner}: {url} gave a file whose MD5 is not {md5}; {remedy}") from error
