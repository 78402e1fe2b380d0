"""What detection reads from: images, folders, globs, lists, videos, cameras, streams.

A local source never touches the network.
"""

from __future__ import annotations

import fnmatch
import glob
import http.client
import os
import re
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.formats.faults import suffixes_of, unread_files
from data.formats.files import files_below
from data.formats.yolo import read_list
from data.images import IMAGE_SUFFIXES, decode_image, is_image_path, read_image
from data.videos import (
    STREAM_PATIENCE,
    WEB_SCHEMES,
    Frame,
    VideoError,
    live_frames,
    open_capture,
    video_frames,
)
from utils.errors import DatasetError
from utils.files import special_kind
from utils.logger import get_logger

VIDEO_SUFFIXES = frozenset(
    {".asf", ".avi", ".m4v", ".mkv", ".mov", ".mp4"} | {".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "http://", "https://", "tcp://", "udp://")
CAMERA_SCHEMES = ("rtsp://", "rtsps://", "rtmp://")
CAMERA_RECONNECT = 30.0
"""Seconds that a camera on a network, which has no end of its own, is called again for after it fell silent."""
MOST_TOLD = 20
"""Files that cannot be read and are told one by one."""
LARGEST_PICTURE = 256 << 20  # bytes


class Source:
    """Frames of a source, in order; an unreadable file of several is named in the log and skipped.

    Args:
        name: image, folder, glob, `.txt` list, video, web address of a picture or video, number of
            a camera, or address of a stream.
        vid_stride: take every so many frames of videos and streams.
        white: the value that is white in images deeper than 8 bits; None for their full range.
        reconnect: seconds that a stream which fell silent is called again for; None for CAMERA_RECONNECT where the
            address is a camera's, and 0 elsewhere.

    Attributes:
        files: images, then videos; empty for a camera or stream.
        is_live: True for a camera or stream, which has no end of its own.
        skipped: files that could not be read so far.

    Raises:
        DatasetError: no source is given, there is no such file, or nothing readable in it.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        vid_stride: int = 1,
        white: float | None = None,
        reconnect: float | None = None,
    ) -> None:
        self.name = str(name)
        self.vid_stride, self.white = vid_stride, white
        is_camera = self.name.lower().startswith(CAMERA_SCHEMES)
        self.reconnect = (
            (CAMERA_RECONNECT if is_camera else 0.0) if reconnect is None else reconnect
        )
        self.skipped: list[str] = []
        if vid_stride < 1:
            raise DatasetError(f"--vid-stride: got {vid_stride}, expected 1 or more.")
        if not self.name.strip():
            raise DatasetError(
                "--source: got nothing, expected a file, folder, camera or stream. The current "
                "folder is `.`."
            )
        if self.name.split()[:1] == ["screen"]:
            raise DatasetError(
                "--source: got screen, expected a file, folder, camera or stream. The screen is "
                "not recorded here; record it to a video and pass that."
            )
        if _is_web_file(self.name):
            self.is_live, self.files = False, [self.name]
            return
        self.is_live = self.name.isdecimal() or self.name.lower().startswith(SCHEMES)
        self.files = [] if self.is_live else _files(self.name)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Frame]:
        if self.is_live:
            yield from live_frames(self.name, self.vid_stride, self.reconnect)
            return
        for path in self.files:
            try:
                frames = _file_frames(path, self.vid_stride, self.white)
            except DatasetError as error:
                if len(self.files) == 1 and (is_video(path) or _is_web_file(path)):
                    raise
                self.skipped.append(path)
                if len(self.skipped) <= MOST_TOLD:
                    get_logger().warning("skipped %s", error)
                continue
            yield from frames
        if len(self.skipped) > MOST_TOLD:
            told = "skipped %d files in all, the first %d of them are named above"
            get_logger().warning(told, len(self.skipped), MOST_TOLD)


def open_source(
    source: str | Path,
    *,
    vid_stride: int = 1,
    white: float | None = None,
    reconnect: float | None = None,
) -> Source:
    """The frames of `source`; see `Source`."""
    return Source(source, vid_stride=vid_stride, white=white, reconnect=reconnect)


def is_video(path: str) -> bool:
    """True if the suffix, of a file or of a web address, is one of a video format."""
    return os.path.splitext(_plain(path))[1].lower() in VIDEO_SUFFIXES


def _plain(path: str) -> str:
    """A web address without what stands behind `?` or `#`; a path as it is."""
    return re.split("[?#]", path)[0] if path.lower().startswith(WEB_SCHEMES) else path


def _is_web_file(name: str) -> bool:
    """True for the web address of a picture or of a video that has an end, so that no frame of it need be lost."""
    is_file = is_video(name) or is_image_path(_plain(name))
    return is_file and name.lower().startswith(WEB_SCHEMES)


def _fetched(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=STREAM_PATIENCE) as reply:
            data = reply.read(LARGEST_PICTURE + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise VideoError(
            f"--source: {address} cannot be fetched - {error}. Check the address and the network."
        ) from error
    if len(data) > LARGEST_PICTURE:
        raise VideoError(
            f"--source: {address} has more than {LARGEST_PICTURE >> 20} MiB, expected a picture. Fetch it and give the file."
        )
    return data


def _files(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = files_below(path)
        files = [*filter(is_image_path, found), *filter(is_video, found)]
        _tell_unread(found)
    elif path.is_file():
        files = read_list(path, path.parent) if path.suffix.lower() == ".txt" else [str(path)]
    elif glob.has_magic(name):
        found = _matching(str(path))
        files = [file for file in found if is_image_path(file) or is_video(file)]
        _tell_unread(found)
    else:
        kind = special_kind(path)
        what = f"which is {kind}" if kind else "which does not exist"
        raise DatasetError(f"--source: got {name}, {what}, expected a file or folder.")
    _check(name, files)
    return files


def _matching(pattern: str) -> list[str]:
    """Files that a glob means; `**` goes into each folder once, also where links lead in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:first])
    return [
        file
        for file in files_below(base)
        if _fits(os.path.relpath(file, base).split(os.sep), parts[first:])
    ]


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the parts of a path are what the parts of a glob say; hidden ones only where it names the dot."""
    if not patterns:
        return not names
    if patterns[0] != "**":
        is_hidden = bool(names) and names[0].startswith(".") and not patterns[0].startswith(".")
        fits = bool(names) and not is_hidden and fnmatch.fnmatch(names[0], patterns[0])
        return fits and _fits(names[1:], patterns[1:])
    if _fits(names, patterns[1:]):
        return True
    return bool(names) and not names[0].startswith(".") and _fits(names[1:], patterns)


def _tell_unread(found: Sequence[str]) -> None:
    """Count the files of a folder or glob that are passed over for their suffix."""
    left_out = [fault.path for fault in unread_files(found) if not is_video(fault.path)]
    if left_out:
        told = "--source: files left out by suffix: %d (%s)"
        get_logger().warning(told, len(left_out), suffixes_of(left_out))


def _check(name: str, files: Sequence[str]) -> None:
    known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    if not files:
        raise DatasetError(f"--source: got no image or video in {name}, expected {known}.")
    if not any(os.path.isfile(file) for file in files):
        raise DatasetError(
            f"--source: got {files[0]} (from {name}), which does not exist, expected a file. Mend the list."
        )
    for file in files:  # one that is missing beside others is skipped, as a damaged one is
        if not is_image_path(file) and not is_video(file):
            raise DatasetError(f"--source: got {file}, expected one of {known}.")


def _file_frames(path: str, vid_stride: int, white: float | None) -> Iterator[Frame]:
    """Frames of an image or video, which is opened at once, so that its errors are raised here."""
    if is_video(path):
        return video_frames(path, open_capture(path), vid_stride)
    if _is_web_file(path):
        return iter([Frame(_plain(path), decode_image(_fetched(path), path, white), 0, None)])
    return iter([Frame(path, read_image(path, white), 0, None)])
