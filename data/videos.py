"""Frames of videos, cameras and streams."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from data.images import Image
from utils.errors import DatasetError
from utils.files import special_kind
from utils.logger import get_logger

WEB_SCHEMES = ("http://", "https://")
STREAM_PATIENCE = 10.0
"""Seconds without a new frame after which a stream counts as ended."""
LONGEST_PAUSE = 8.0
"""Seconds between two calls, at most; the first pause is one second."""
LARGEST_CAMERA = 2**31 - 1
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


def open_capture(name: str) -> cv2.VideoCapture:
    """Open a video, camera or stream.

    Raises:
        VideoError: it is another kind of file, or cannot be opened.
    """
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


def video_frames(path: str, capture: cv2.VideoCapture, vid_stride: int) -> Iterator[Frame]:
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


def live_frames(name: str, vid_stride: int, reconnect: float) -> Iterator[Frame]:
    """The newest frame each time; what came while the caller was busy is dropped.

    A web address that knows its length is read as a file. A stream that fell silent is called again for `reconnect`
    seconds; numbers of its frames go on.
    """
    opened = open_capture(name)
    is_web = name.lower().startswith(WEB_SCHEMES)
    if is_web and opened.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
        yield from video_frames(name, opened, vid_stride)
        return
    capture: cv2.VideoCapture | None = opened
    last, size, deadline = -1, None, time.monotonic() + reconnect
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
            capture = open_capture(name)
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
