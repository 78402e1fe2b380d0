"""Numbers for objects that go on from frame to frame.

ByteTrack (Zhang et al. 2022, arXiv 2110.06864), of the package `trackers`.
"""

from __future__ import annotations

from typing import Any

import torch

from data.videos import Frame
from engine.options import Thresholds
from utils.errors import ConfigError
from utils.structures import Detections

LOW = 0.1
"""Lowest score of a detection that goes on with a track, as in ByteTrack's paper; none begins with it."""
REMEMBERED = 30
"""Frames at 30 a second that a track outlives its last detection, as in ByteTrack's paper."""


class Tracker:
    """Gives the objects of a video numbers that stay; pictures count as the frames of one.

    Args:
        thresholds: `conf`, or `by_class` for each class, is the lowest score that a track begins with.
        stride: only every so many frames of a video come.

    Attributes:
        thresholds: what has to be detected for it.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, thresholds: Thresholds, stride: int = 1) -> None:
        try:
            import supervision
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise ConfigError(
                "--track needs trackers, a package under Apache-2.0. pip install trackers, or leave it out."
            ) from error
        self._make, self._wrap = ByteTrackTracker, supervision.Detections
        self._begin, self._stride = thresholds.conf, stride
        self._by_class = torch.tensor(thresholds.by_class)
        self._tracker: Any = None
        self._clip: str | None = None
        self._first = self._highest = 0
        self.thresholds = thresholds._replace(conf=min(thresholds.conf, LOW), by_class=())

    def __call__(self, frame: Frame, found: Detections) -> tuple[Detections, list[int]]:
        """What of the detections of a frame belongs to a track, and the numbers of the tracks, from 1.

        Args:
            frame: the next one; a new video begins with new tracks, and no number comes twice.
            found: its detections, on the CPU.
        """
        clip = frame.path if frame.video else ""
        if clip != self._clip:
            self._start(clip, frame.video.fps if frame.video else 30.0)
        scores = found.scores.float()
        if len(
            self._by_class
        ):  # ByteTrack knows one threshold: scores are told in parts of the class's own
            scores = (scores * self._begin / self._by_class[found.labels]).clamp(max=1)
        given = self._wrap(
            xyxy=found.boxes.float().numpy().reshape(-1, 4),
            confidence=scores.numpy(),
            class_id=found.labels.numpy(),
            data={"row": torch.arange(len(scores)).numpy()},
        )
        made = self._tracker.update(given)
        pairs = sorted(
            (int(row), int(number))
            for row, number in zip(made.data.get("row", ()), made.tracker_id, strict=True)
            if number >= 0
        )
        kept = [row for row, _ in pairs]
        numbers = [self._first + number + 1 for _, number in pairs]
        self._highest = max([self._highest, *numbers])
        return Detections(*(tensor[kept] for tensor in found)), numbers

    def _start(self, clip: str, fps: float) -> None:
        self._clip, self._first = clip, self._highest
        self._tracker = self._make(
            lost_track_buffer=REMEMBERED,
            frame_rate=max(fps / self._stride, 1.0),
            track_activation_threshold=self._begin,
            high_conf_det_threshold=self._begin,
            minimum_consecutive_frames=1,
        )
