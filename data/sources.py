"""What detection reads from: images, folders, globs, lists, videos, cameras, streams.

A local source never touches the network.
"""

from __future__ import annotations

import fnmatch
import glob
import http.client
import os
import re
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data.formats.faults import suffixes_of, unread_files
from data.formats.files import files_below
from data.formats.yolo import read_list
from data.images import IMAGE_SUFFIXES, Image, decode_image, is_image_path, read_image
from utils.errors import DatasetError
from utils.files import special_kind
from utils.logger import get_logger

VIDEO_SUFFIXES = frozenset(
    {".asf", ".avi", ".m4v", ".mkv", ".mov", ".mp4"} | {".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "http://", "https://", "tcp://", "udp://")
WEB_SCHEMES = ("http://", "https://")
STREAM_PATIENCE = 10.0
"""Seconds without a new frame after which a stream counts as ended."""
CAMERA_SCHEMES = ("rtsp://", "rtsps://", "rtmp://")
CAMERA_RECONNECT = 30.0
"""Seconds that a camera on a network, which has no end of its own, is called again for after it fell silent."""
LONGEST_PAUSE = 8.0
"""Seconds between two calls, at most; the first pause is one second."""
MOST_TOLD = 20
"""Files that cannot be read and are told one by one."""
LARGEST_CAMERA = 2**31 - 1
LARGEST_PICTURE = 256 << 20  # bytes
SILENT = 0  # of OpenCV's log levels


class VideoInfo(NamedTuple):
    """What a video says of itself.

    Attributes:
        fps: frames per second; 30 where the source does not say.
        height: of the frames.
        width: of the frames.
        frames: number of frames; 0 for live sources.
    """

    fps: float
    height: int
    width: int
    frames: int


class Frame(NamedTuple):
    """One picture to look at.

    Attributes:
        path: file, or address of the stream or camera.
        image: RGB, (H, W, 3), uint8.
        index: number of the frame within its video or stream, counted before strides; 0 for an
            image.
        video: what the video says of itself; None for an image.
    """

    path: str
    image: Image
    index: int  # type: ignore[assignment]
    video: VideoInfo | None


class VideoError(DatasetError):
    """A video, camera or stream that cannot be opened."""


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
            yield from _live_frames(self.name, self.vid_stride, self.reconnect)
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


def _open(name: str) -> cv2.VideoCapture:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what fails is said below, in one line
    is_camera = name.isdecimal()
    if is_camera and (len(name) > 10 or int(name) > LARGEST_CAMERA):
        raise VideoError(
            f"--source: got camera {name}, expected a number from 0 to {LARGEST_CAMERA}."
        )
    if kind := special_kind(name):
        raise VideoError(f"--source: got {name}, which is {kind}, expected a video.")
    log = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has it in cv2 itself
    level = log.setLogLevel(SILENT)
    capture = cv2.VideoCapture(int(name) if is_camera else name)
    log.setLogLevel(level)
    if not capture.isOpened():
        capture.release()
        kind = "camera" if is_camera else "video or stream"
        raise VideoError(f"--source: {kind} {name} cannot be opened. Check that it is there.")
    return capture


def _rgb(frame: np.ndarray) -> Image:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _describe(capture: cv2.VideoCapture, is_live: bool) -> VideoInfo:
    fps = capture.get(cv2.CAP_PROP_FPS)
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return VideoInfo(
        fps if 0 < fps <= 1000 else 30.0,
        int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
        int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
        0 if is_live else max(count, 0),
    )


def _file_frames(path: str, vid_stride: int, white: float | None) -> Iterator[Frame]:
    """Frames of an image or video, which is opened at once, so that its errors are raised here."""
    if is_video(path):
        return _video_frames(path, _open(path), vid_stride)
    if _is_web_file(path):
        return iter([Frame(_plain(path), decode_image(_fetched(path), path, white), 0, None)])
    return iter([Frame(path, read_image(path, white), 0, None)])


def _video_frames(path: str, capture: cv2.VideoCapture, vid_stride: int) -> Iterator[Frame]:
    """Every frame, one after the other; the capture is released at the end."""
    try:
        info = _describe(capture, is_live=False)
        index = 0
        # Frames that are left out are passed over without being decoded to pixels.
        while capture.grab():
            if index % vid_stride == 0:
                is_read, frame = capture.retrieve()
                if is_read:
                    yield Frame(path, _rgb(frame), index, info)
            index += 1
        # One less may be rounding: some containers tell their length in seconds only.
        if index + 1 < info.frames:
            get_logger().warning(
                "%s: got %d frames, expected %d as it announces; it may be cut off or damaged",
                path,
                index,
                info.frames,
            )
    finally:
        capture.release()


def _live_frames(name: str, vid_stride: int, reconnect: float) -> Iterator[Frame]:
    """The newest frame each time; what came while the caller was busy is dropped.

    A web address that knows its length is read as a file. A stream that fell silent is called again for `reconnect`
    seconds; numbers of its frames go on.
    """
    opened = _open(name)
    is_web = name.lower().startswith(WEB_SCHEMES)
    if is_web and opened.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
        yield from _video_frames(name, opened, vid_stride)
        return
    capture: cv2.VideoCapture | None = opened
    last, size, deadline = -1, None, 0.0
    while capture is not None:
        info = _describe(capture, is_live=True)
        reader = _Reader(capture, vid_stride, last + 1)
        try:
            while (newest := reader.wait_for_newer(last)) is not None:
                last, frame = newest
                size, before = frame.shape, size
                if before not in (None, size):
                    raise VideoError(
                        f"--source: {name}: frames have another size since it is back."
                    )
                yield Frame(name, _rgb(frame), last, info)
                deadline = time.monotonic() + reconnect
        finally:
            reader.stop()
        capture = _call_again(name, deadline) if reconnect else None


def _call_again(name: str, deadline: float) -> cv2.VideoCapture | None:
    """A stream that fell silent, once it is back; None where it is not until the deadline (of the monotonic clock)."""
    get_logger().warning("%s fell silent; it is called again", name)
    pause = 1.0
    while (remaining := deadline - time.monotonic()) > 0:
        time.sleep(min(pause, remaining))
        pause = min(2 * pause, LONGEST_PAUSE)
        try:
            capture = _open(name)
        except VideoError:
            continue
        get_logger().warning("%s is back", name)
        return capture
    get_logger().warning("%s did not come back", name)
    return None


class _Reader:
    """Reads a live source in a thread, so that its buffer does not age."""

    def __init__(self, capture: cv2.VideoCapture, vid_stride: int, first: int) -> None:
        self._capture, self._vid_stride, self._first = capture, vid_stride, first
        self._newest: tuple[int, np.ndarray] | None = None
        self._is_done = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        index = self._first
        while not self._is_done and self._capture.grab():
            if index % self._vid_stride == 0:
                is_read, frame = self._capture.retrieve()
                if is_read:
                    with self._changed:
                        self._newest = (index, frame)
                        self._changed.notify_all()
            index += 1
        with self._changed:
            self._is_done = True
            self._changed.notify_all()

    def wait_for_newer(self, last: int) -> tuple[int, np.ndarray] | None:
        """The newest frame after number `last`; None when the source has ended or fell silent."""
        deadline = time.monotonic() + STREAM_PATIENCE
        with self._changed:
            while self._newest is None or self._newest[0] <= last:
                remaining = deadline - time.monotonic()
                if self._is_done or remaining <= 0:
                    return None
                self._changed.wait(remaining)
            return self._newest

    def stop(self) -> None:
        """End the thread, then release the source."""
        self._is_done = True
        self._thread.join(timeout=STREAM_PATIENCE)
        if not self._thread.is_alive():
            self._capture.release()
