"""Published files from where they lie, held against their checksums, and unpacked in one piece."""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
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


def unpack(archive: Path, folder: Path) -> None:
    """Unpack ``folder``, whole or not at all, out of a tar or zip archive, which cannot write anywhere else.

    Raises:
        ValueError: if it tries, or is no such archive.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder.parent) as unpacked:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as zipped:
                    zipped.extractall(unpacked)
            else:
                with tarfile.open(archive) as tarred:
                    tarred.extractall(unpacked, filter="data")
            Path(unpacked, folder.name).rename(folder)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"expected an archive that stays in its folder in {archive.name}, refused it: {error}"
        ) from error
