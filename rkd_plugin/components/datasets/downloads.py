"""Published files: download, check of the checksum, and unpacking."""

from __future__ import annotations

import lzma
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets.utils import download_url

DAMAGED = tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError


def download(owner: str, url: str, path: Path, md5: str, remedy: str) -> None:
    """Download ``url`` to ``path``, unless the published file is there.

    Raises:
        ConnectionError: if the download fails.
        ValueError: if the downloaded file is not the published one.
    """
    try:
        download_url(url, str(path.parent), path.name, md5)
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{owner}: {url} failed ({error}); {remedy}") from error
    except RuntimeError as error:
        raise ValueError(f"{owner}: {url} gave a file whose MD5 is not {md5}; {remedy}") from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpack ``folder`` from a tar or zip archive, as a whole or not at all; nothing is written elsewhere.

    An archive with links, devices, absolute names, names with ``..``, or names that occur twice or differ in case only
    is not unpacked: no data set needs them, and the filters of Python have had holes. All names are checked before a
    file is written.

    Raises:
        ValueError: if the archive has one of these, is truncated, or has no such folder.
    """
    where = f"expected an archive that stays in its folder in {archive.name}, refused it: "
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder.parent) as unpacked:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as zipped:
                    _check_members((member.orig_filename, _kind(member)) for member in zipped.infolist())
                    zipped.extractall(unpacked)
            else:
                with tarfile.open(archive) as tarred:
                    members = tarred.getmembers()
                    _check_members(
                        (member.name, "folder" if member.isdir() else "file" if member.isreg() else "link or device")
                        for member in members
                    )
                    tarred.extractall(unpacked, members, filter="data")
            if not Path(unpacked, folder.name).is_dir():
                raise tarfile.TarError(f"it has no folder {folder.name}")
            Path(unpacked, folder.name).rename(folder)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        RuntimeError,
        ValueError,
    ) as error:
        cause = " ".join(str(error).split())  # it has several lines for a file of another kind
        raise ValueError(f"{where}{cause}; get it again from its publisher") from error


def _kind(member: zipfile.ZipInfo) -> str:
    mode = member.external_attr >> 16  # of Unix; 0 if another system wrote the archive
    is_plain = stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR)
    return "folder" if member.is_dir() else "file" if is_plain else "link or device"


def _check_members(members: Iterable[tuple[str, str]]) -> None:
    """Raise TarError if a member's name or kind is not that of a file or folder below the archive's root.

    Args:
        members: pairs of a name and a kind: ``"file"``, ``"folder"``, or what else it is.
    """
    known: dict[str, tuple[str, str]] = {}
    for name, kind in members:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if kind not in ("file", "folder"):
            raise tarfile.TarError(f"{name!r} is a {kind}")
        if name.startswith("/") or ".." in parts or {*name} & {"\\", ":", "\0"} or (kind == "file" and not parts):
            raise tarfile.TarError(f"{name!r} is not a path below its folder")
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            found = (path, kind if depth == len(parts) else "folder")
            # Some file systems ignore case, or write accents in one form only.
            before = known.setdefault(unicodedata.normalize("NFC", path.casefold()), found)
            if before is not found and (before != found or found[1] == "file"):
                raise tarfile.TarError(f"{name!r} is in the place of {before[0]!r}")
