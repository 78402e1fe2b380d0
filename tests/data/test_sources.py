"""Every kind of source gives RGB frames; what cannot be read is named."""

from __future__ import annotations

import os
import socket
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import sources, videos
from data.sources import open_source
from utils.errors import DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them in a folder below, a broken one and a text."""
    (tmp_path / "more").mkdir()
    red = np.zeros((20, 30, 3), dtype=np.uint8)
    red[..., 2] = 255
    cv2.imwrite(str(tmp_path / "b.png"), red)
    cv2.imwrite(str(tmp_path / "more" / "a.bmp"), red)
    (tmp_path / "c.jpg").write_bytes(b"broken")
    (tmp_path / "readme.md").write_text("no picture")
    return tmp_path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Ten frames of 48 x 64 at 5 per second; frame k is red with value 20 k."""
    path = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no video")
    for k in range(10):
        frame = np.zeros((48, 64, 3), dtype=np.uint8)
        frame[..., 2] = 20 * k
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch, request):
    """Local sources must not open a connection."""
    if "served" in request.fixturenames:
        return

    def refuse(*arguments):
        raise AssertionError("a local source used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_an_image_is_one_rgb_frame(folder):
    (frame,) = open_source(folder / "b.png")
    assert frame.image.shape == (20, 30, 3) and frame.image[0, 0].tolist() == [255, 0, 0]
    assert (frame.index, frame.video, frame.path) == (0, None, str(folder / "b.png"))


def test_a_folder_gives_all_images_and_skips_the_unreadable_one_by_name(folder, caplog):
    source = open_source(folder)
    assert len(source) == 3
    assert [Path(frame.path).name for frame in source] == ["b.png", "a.bmp"]
    assert source.skipped == [str(folder / "c.jpg")]
    assert "skipped" in caplog.text and "c.jpg" in caplog.text


def test_globs_and_lists(folder):
    assert [Path(f.path).name for f in open_source(str(folder / "*.png"))] == ["b.png"]
    assert len(open_source(str(folder / "**" / "*.bmp"))) == 1
    (folder / "list.txt").write_text(f"b.png\n\n{folder}/more/a.bmp\n")
    assert [Path(f.path).name for f in open_source(folder / "list.txt")] == ["b.png", "a.bmp"]


def test_a_video_gives_numbered_frames_and_what_it_says_of_itself(video):
    frames = list(open_source(video))
    assert [frame.index for frame in frames] == list(range(10))
    assert frames[0].video._asdict() == {"fps": 5.0, "height": 48, "width": 64, "frames": 10}
    for frame in frames:
        red, green, blue = frame.image.reshape(-1, 3).mean(axis=0)
        assert abs(red - 20 * frame.index) < 6 and green < 12 and blue < 12


def test_the_stride_leaves_frames_out(video):
    assert [frame.index for frame in open_source(video, vid_stride=4)] == [0, 4, 8]


def test_a_folder_gives_images_before_videos(folder, video):
    kinds = [frame.video is not None for frame in open_source(folder)]
    assert kinds == [False] * 2 + [True] * 10


@pytest.fixture
def served(video):
    """The video behind a local web address."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(video.parent), **options)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/{video.name}"
    server.shutdown()
    server.server_close()


def test_a_stream_gives_newest_frames_in_order_until_it_ends(served, monkeypatch):
    if not cv2.videoio_registry.getStreamBackends():
        pytest.skip("this OpenCV opens no streams")
    for module in (sources, videos):
        monkeypatch.setattr(module, "WEB_SCHEMES", ())
    source = open_source(served)
    assert source.is_live
    try:
        frames = list(source)
    except DatasetError:
        pytest.skip("this OpenCV reads no http")
    numbers = [frame.index for frame in frames]
    assert numbers == sorted(set(numbers)) and numbers and numbers[-1] == 9
    assert frames[0].video.fps == 5 and frames[0].video.frames == 0
    assert frames[0].path == served


def test_a_stream_that_fell_silent_is_called_again_and_its_numbers_go_on(
    served, monkeypatch, caplog
):
    if not cv2.videoio_registry.getStreamBackends():
        pytest.skip("this OpenCV opens no streams")
    for module in (sources, videos):
        monkeypatch.setattr(module, "WEB_SCHEMES", ())
    really, calls = videos.open_capture, []

    def open_when_there(name: str) -> cv2.VideoCapture:
        calls.append(name)
        if len(calls) == 2 or len(calls) > 3:
            raise videos.VideoError("nobody answers")
        return really(name)

    monkeypatch.setattr(videos, "open_capture", open_when_there)
    monkeypatch.setattr(videos, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    source = open_source(served, reconnect=0.3)
    try:
        numbers = [frame.index for frame in source]
    except DatasetError:
        pytest.skip("this OpenCV reads no http")
    assert numbers == sorted(set(numbers)) and numbers[-1] == 19, "ten frames, twice"
    assert caplog.text.count("fell silent") == 2 and caplog.text.count("is back") == 1
    assert "did not come back" in caplog.text and set(calls) == {served}


def test_a_stream_that_opens_without_a_frame_is_called_again(monkeypatch):
    opened = []

    class Dark:
        def __init__(self, name: str) -> None:
            opened.append(name)

        def get(self, _: int) -> float:
            return 0.0

        def grab(self) -> bool:
            return False

        def release(self) -> None:
            pass

    monkeypatch.setattr(videos, "open_capture", Dark)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert list(open_source("rtsp://camera/1", reconnect=0.2)) == []
    assert len(opened) > 1


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("rtsp://camera/1", None, 30.0),
        ("rtsp://camera/1", 0.0, 0.0),
        ("http://camera/live", None, 0.0),
        ("0", 5.0, 5.0),
    ],
)
def test_how_long_a_stream_is_called_again(name, given, expected):
    assert open_source(name, reconnect=given).reconnect == expected


def slowly(source) -> list[int]:
    """Numbers of the frames that come when each takes longer than the next needs to arrive."""
    numbers = []
    try:
        for frame in source:
            time.sleep(0.02)
            numbers.append(frame.index)
    except DatasetError:
        pytest.skip("this OpenCV reads no http")
    return numbers


@pytest.mark.parametrize("address", ["{}", "{}?token=1", "{}?a=b.x#"])
def test_a_video_behind_a_web_address_loses_no_frame(served, address):
    if not cv2.videoio_registry.getStreamBackends():
        pytest.skip("this OpenCV opens no streams")
    source = open_source(address.format(served))
    assert not source.is_live and len(source) == 1
    assert slowly(source) == list(range(10))


@pytest.mark.parametrize("ending", ["", "?token=1"])
def test_a_picture_behind_a_web_address_is_one_image(served, video, ending):
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, :15] = (10, 200, 30)
    cv2.imwrite(str(video.parent / "web.png"), picture[..., ::-1])
    address = served.replace(video.name, "web.png")
    source = open_source(address + ending)
    (frame,) = source
    assert not source.is_live and frame.video is None and frame.path == address
    assert np.array_equal(frame.image, picture)
    with pytest.raises(DatasetError, match="none.png cannot be fetched - HTTP Error 404"):
        list(open_source(served.replace(video.name, "none.png")))


def test_what_is_missing_beside_others_is_skipped_by_name(folder, caplog):
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    first = next(frame.path for frame in open_source(folder))
    source = open_source(folder)
    assert first in {frame.path for frame in source}
    assert str(folder / "dangling.png") in source.skipped and "dangling.png" in caplog.text
    (folder / "partly.txt").write_text(f"{first}\nnothing.png\n")
    assert [frame.path for frame in open_source(folder / "partly.txt")] == [first]


def test_an_address_without_a_suffix_that_knows_its_length_is_read_as_a_file(served, monkeypatch):
    if not cv2.videoio_registry.getStreamBackends():
        pytest.skip("this OpenCV opens no streams")
    monkeypatch.setattr(sources, "VIDEO_SUFFIXES", frozenset())
    source = open_source(served)
    assert source.is_live
    assert slowly(source) == list(range(10))


# Source, what the message must say.
ERROR_ROWS = [
    ("none.png", "got none.png, which does not exist"),
    ("{folder}/*.tif", "got no image or video in"),
    ("{folder}/readme.md", "expected one of apng, asf, avi"),
    ("{folder}/wrong.txt", "nothing.png (from"),
    ("{folder}/empty", "got no image or video in"),
    ("screen", "got screen, expected a file, folder, camera or stream"),
    ("screen 0 10 20", "got screen"),
    ("", "--source: got nothing, expected a file, folder, camera or stream"),
    (" ", "--source: got nothing"),
    ("\N{SUPERSCRIPT TWO}", "which does not exist"),
    ("97", "camera 97 cannot be opened"),
]


@pytest.mark.parametrize(("name", "message"), ERROR_ROWS)
def test_a_source_that_cannot_be_read_is_named(folder, name, message):
    (folder / "wrong.txt").write_text("nothing.png\n")
    (folder / "empty").mkdir()
    with pytest.raises(DatasetError) as caught:
        list(open_source(name.format(folder=folder)))
    assert message in str(caught.value)


def test_a_broken_video_is_named(folder):
    (folder / "x.mp4").write_bytes(b"no video")
    with pytest.raises(DatasetError, match="x.mp4 cannot be opened"):
        list(open_source(folder / "x.mp4"))


def test_a_broken_video_of_a_folder_is_skipped_by_name(folder, video, caplog):
    (folder / "a.mp4").write_bytes(b"no video")
    source = open_source(folder)
    assert len([frame for frame in source if frame.video]) == 10
    assert source.skipped == [str(folder / "c.jpg"), str(folder / "a.mp4")]
    assert "skipped --source: video or stream" in caplog.text and "a.mp4" in caplog.text


def test_a_video_that_ends_before_its_announced_length_is_told(video, caplog):
    assert len(list(open_source(video))) == 10 and not caplog.records
    data = video.read_bytes()
    start = data.find(b"movi")
    video.write_bytes(data[: start + (len(data) - start) // 2])
    frames = list(open_source(video))
    assert 0 < len(frames) < 9 and frames[0].video.frames == 10
    assert f"v.avi: got {len(frames)} frames, expected 10" in caplog.text


def test_a_stride_below_one_is_named(folder):
    with pytest.raises(DatasetError, match="--vid-stride: got 0"):
        open_source(folder, vid_stride=0)


def test_pipes_and_devices_of_a_folder_are_skipped_by_name(folder, caplog):
    os.mkfifo(folder / "d.jpg")
    os.mkfifo(folder / "e.mp4")
    (folder / "f.jpg").symlink_to("/dev/zero")
    (folder / "g.jpg").symlink_to("g.jpg")
    source = open_source(folder)
    assert [Path(frame.path).name for frame in source] == ["b.png", "a.bmp"]
    assert {Path(path).name for path in source.skipped} == {
        "c.jpg",
        "d.jpg",
        "e.mp4",
        "f.jpg",
        "g.jpg",
    }
    assert "d.jpg: cannot be read - got a named pipe, not a file" in caplog.text
    assert "e.mp4, which is a named pipe, expected a video" in caplog.text
    assert "f.jpg: cannot be read - got a device, not a file" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.png", ["b.png"]),
        ("**", ["b.png", "c.jpg", "more/a.bmp"]),
        ("m*/**/*.bmp", ["more/a.bmp"]),
        ("**/more/*", ["more/a.bmp"]),
        ("**/.h/*.png", [".h/x.png"]),
    ],
)
def test_a_glob_goes_through_each_folder_once(folder, pattern, expected):
    """Three links to the folder above: to follow each from each would never end."""
    (folder / ".h").mkdir()
    (folder / ".h" / "x.png").write_bytes((folder / "b.png").read_bytes())
    for name in "xyz":
        (folder / "more" / name).symlink_to("..")
    found = [os.path.relpath(file, folder) for file in open_source(folder / pattern).files]
    assert sorted(found) == expected


@pytest.mark.parametrize("name", ["2147483648", "9" * 20, "9" * 5000, "\u0663" * 30])
def test_a_camera_number_beyond_what_systems_count_is_named(name):
    with pytest.raises(DatasetError, match="expected a number from 0 to 2147483647"):
        list(open_source(name))


def test_of_many_files_that_are_missing_the_first_are_told(folder, caplog):
    """A list of more than a thousand names is compared with the listing of its folders."""
    names = ["b.png", "./more/a.bmp", "more/../b.png", *(f"gone/{n}.jpg" for n in range(1500))]
    (folder / "list.txt").write_text("\n".join(names))
    source = open_source(folder / "list.txt")
    assert source.files[:3] == [str(folder / n) for n in ("b.png", "more/a.bmp", "b.png")]
    assert source.files[3] == str(folder / "gone" / "0.jpg")
    assert len(list(source)) == 3 and len(source.skipped) == 1500
    assert caplog.text.count("skipped") == 21
    assert "skipped 1500 files in all, the first 20 of them are named above" in caplog.text


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_source(name):
    with pytest.raises(DatasetError, match=f"got {name}, which is a device, expected a file"):
        open_source(name)
