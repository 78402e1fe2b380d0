"""Fetching the files that a data YAML names under `sources`; only when `--download` is given.

A transfer that breaks off is resumed where it stopped, checked against the published digest, and
unpacked without letting an archive write outside its folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, NamedTuple
from urllib.parse import unquote, urlsplit

from data.config import load_data_config
from data.formats.description import DataConfig, DownloadSource
from utils.errors import DatasetError
from utils.logger import get_logger

ATTEMPTS = 5
TIMEOUT = 60.0
CHUNK = 1 << 20


def fetch(config: DataConfig) -> DataConfig:
    """Download and unpack what is missing of a data set.

    Returns:
        The data set read again, now that its files are there.

    Raises:
        DatasetError: nothing is named under `sources`, a transfer fails, a digest is wrong, or an
            archive tries to write outside its folder.
    """
    if not config.sources:
        told = "holds a `download` key, which is never run here" if config.script else "names none"
        raise DatasetError(f"{config.file}: --download needs `sources`, and the file {told}.")
    if _is_complete(config):
        get_logger().info("%s: already there, nothing fetched", config.path)
        return config
    for source in config.sources:
        fetch_source(source, config.path)
    return load_data_config(config.file)


def _is_complete(config: DataConfig) -> bool:
    """True if all splits exist and no source is left half done."""
    entries = [entry for places in config.splits.values() for entry in places]
    files = [config.path / file_name(source) for source in config.sources]
    pending = [file for file in files if file.exists() or _partial(file).exists()]
    return not pending and all(entry.exists() for entry in entries)


def file_name(source: DownloadSource) -> str:
    """The last part of an address, as a plain file name."""
    name = PureWindowsPath(unquote(urlsplit(source.url).path)).name
    if not name or name in (".", ".."):
        raise DatasetError(f"{source.url}: got no file name in the address, expected one.")
    return name


def fetch_source(source: DownloadSource, folder: Path) -> None:
    """Download one file into `folder`, check it, unpack it, and remove the archive.

    A source that was unpacked before is passed over: a small file `.fetched-<name>` tells.
    """
    name = file_name(source)
    archive, done = folder / name, folder / f".fetched-{name}"
    if done.exists():
        get_logger().info("%s: already fetched", name)
        return
    if urlsplit(source.url).scheme not in ("http", "https"):
        raise DatasetError(f"{source.url}: got this address, expected http:// or https://.")
    folder.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        _download(source, archive)
    _verify(source, archive)
    unpack(archive, _inside(folder, source.to))
    done.write_text(f"{source.url}\n", encoding="utf-8")


def _download(source: DownloadSource, archive: Path) -> None:
    """Transfer to `<archive>.part`, resuming, then rename."""
    part = _partial(archive)
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            if _transfer(source, part):
                os.replace(part, archive)
                _tag_file(part).unlink(missing_ok=True)
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code not in (408, 416, 429):
                break
            if error.code == 416:
                # The stored part is longer than the file: what it began is gone.
                part.unlink(missing_ok=True)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(error.reason if isinstance(error, urllib.error.URLError) else error)
        get_logger().info(f"{source.url}: {reason}, trying again")
    raise DatasetError(
        f"{source.url}: not fetched - got {reason}, expected the whole file. Run again to go on."
    )


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _transfer(source: DownloadSource, part: Path) -> bool:
    """One attempt; True when the file is whole."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "yoke"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if _tag_file(part).exists():
            # Not the same file any more: the server then sends all of it.
            headers["If-Range"] = _tag_file(part).read_text(encoding="utf-8")
    request = urllib.request.Request(source.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
        start, total = _span(reply.status, reply.headers)
        if start not in (0, have):
            raise DatasetError(f"{source.url}: got bytes from {start}, expected from {have}.")
        tag = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
        if tag and not tag.startswith("W/"):
            _tag_file(part).write_text(tag, encoding="utf-8")
        done, told = start, -1
        with open(part, "ab" if start else "wb") as file:
            while chunk := reply.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                tenth = done * 10 // total if total else done // (100 * CHUNK)
                if tenth != told:
                    told = tenth
                    get_logger().info(f"{source.url}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
    return not total or part.stat().st_size == total


def _span(status: int, headers: HTTPMessage) -> tuple[int, int]:
    """Where a reply begins within the file and how long the whole file is (0 if not said)."""
    length = int(headers.get("Content-Length") or 0)
    if status != 206:
        return 0, length
    unit, _, place = (headers.get("Content-Range") or "").partition(" ")
    span, _, total = place.partition("/")
    start = span.partition("-")[0]
    if unit != "bytes" or not start.isdigit():
        raise DatasetError(f"got Content-Range {place!r}, expected bytes from a number.")
    return int(start), int(total) if total.isdigit() else int(start) + length


def _verify(source: DownloadSource, archive: Path) -> None:
    """Compare size and digests with what the data YAML states; a wrong file is removed."""
    algorithms = {"sha256": source.sha256, "md5": source.md5}
    stated = {name: value.lower() for name, value in algorithms.items() if value}
    got = _digests(archive, stated or ["sha256"])
    size = archive.stat().st_size
    wrong = [f"{n} - got {got[n]}, expected {v}" for n, v in stated.items() if got[n] != v]
    if source.size and size != source.size:
        wrong.append(f"size - got {size}, expected {source.size}")
    if wrong:
        archive.unlink()
        raise DatasetError(f"{source.url}: {'; '.join(wrong)}. The file was removed; fetch again.")
    if not stated:
        told = f"no digest is known to check it with (sha256 {got['sha256']})"
        get_logger().warning(f"{source.url}: {told}")


def _digests(file: Path, algorithms: Iterable[str]) -> dict[str, str]:
    running = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            for digest in running.values():
                digest.update(chunk)
    return {name: digest.hexdigest() for name, digest in running.items()}


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive into `folder` and remove it; another file is moved there.

    All names are checked before the first byte is written.

    Raises:
        DatasetError: a member has an absolute name, climbs out with `..`, is a link or a device,
            or there is too little room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                _write_members(_zip_members(archive, zipped), folder)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tarred:
                _write_members(_tar_members(archive, tarred), folder)
        else:
            if archive.parent != folder:
                shutil.move(archive, folder / archive.name)
            return
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{archive}: got a damaged archive ({error}). Remove it.") from error
    archive.unlink()


class _Member(NamedTuple):
    """A regular file of an archive: its checked name, its length and how to open it."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]


def _zip_members(archive: Path, zipped: zipfile.ZipFile) -> Iterator[_Member]:
    for info in zipped.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        _check_member(archive, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
        if not info.is_dir():
            yield _Member(info.filename, info.file_size, partial(zipped.open, info))


def _tar_members(archive: Path, tarred: tarfile.TarFile) -> Iterator[_Member]:
    for info in tarred:
        _check_member(archive, info.name, info.isreg() or info.isdir())
        if info.isreg():
            yield _Member(info.name, info.size, partial(tarred.extractfile, info))


def _check_member(archive: Path, name: str, is_plain: bool) -> None:
    windows = PureWindowsPath(name)
    if not is_plain:
        what = "a link or device"
    elif windows.drive or windows.root or PurePosixPath(name).is_absolute():
        what = "an absolute name"
    elif ".." in windows.parts:
        what = "a name that climbs out of the folder"
    else:
        return
    raise DatasetError(f"{archive}: got {name!r}, {what}, expected plain files. Nothing unpacked.")


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must not leave `folder`."""
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise DatasetError(f"{target}: lies outside {folder}, expected a place in it.")
    return target


def _write_members(members: Iterable[_Member], folder: Path) -> None:
    listed = list(members)
    needed, free = sum(member.size for member in listed), shutil.disk_usage(folder).free
    if needed > free:
        raise DatasetError(f"{folder}: got {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f}.")
    for member in listed:
        # Resolved again at the time of writing: the folder may hold a link from before.
        target = _inside(folder, member.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = member.open()
        assert stream is not None, "only regular files are listed"
        with stream, open(target, "wb") as file:
            shutil.copyfileobj(stream, file, CHUNK)
