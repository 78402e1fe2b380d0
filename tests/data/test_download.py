"""Fetching: resumed, checked, unpacked in its place; never without being asked."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import download
from data.config import load_data_config
from data.download import DownloadSource, fetch, fetch_source, unpack
from data.label_cache import load_table
from utils.errors import DatasetError


class Files:
    """A web server on this machine: files, a log of requests, and ways to misbehave."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.break_after: list[int] = []
        self.ranges = True
        self.tag = '"1"'
        files = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                files.answer(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        span = handler.headers.get("Range", "")
        self.requests.append((handler.path, span))
        data = self.files.get(handler.path)
        if data is None:
            handler.send_error(404)
            return
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and self.ranges else 0
        if handler.headers.get("If-Range", self.tag) != self.tag:
            start = 0
        if start > len(data) or (start == len(data) and start):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.send_header("ETag", self.tag)
        handler.end_headers()
        end = start + self.break_after.pop(0) if self.break_after else len(data)
        handler.wfile.write(data[start:end])


@pytest.fixture
def server():
    files = Files()
    yield files
    files.server.shutdown()
    files.server.server_close()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1000)


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(*members: tarfile.TarInfo, data: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_data_set_is_fetched_unpacked_and_read(server, tiny, tmp_path):
    members = {
        str(path.relative_to(tiny)): path.read_bytes()
        for path in tiny.rglob("*")
        if path.is_file() and path.parts[len(tiny.parts)] in ("images", "labels")
    }
    archive = zipped(members)
    server.files["/tiny.zip"] = archive
    digest = hashlib.sha256(archive).hexdigest()
    (tmp_path / "new").mkdir()
    yaml = tmp_path / "new" / "data.yaml"
    yaml.write_text(
        "path: here\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
        f"sources: [{{url: '{server.address}/tiny.zip', sha256: {digest}, size: {len(archive)}}}]\n"
    )
    config = load_data_config(yaml)
    with pytest.raises(DatasetError, match=r"Pass --download to fetch 0.0 GB from 127.0.0.1"):
        load_table(config, "train")
    assert not server.requests, "something was fetched without being asked for"
    config = fetch(config)
    assert len(load_table(config, "train").labels) == 6
    assert not (tmp_path / "new/here/tiny.zip").exists()
    fetch(config)
    assert len(server.requests) == 1, "what is there was fetched again"


def test_a_broken_transfer_is_resumed_where_it_stopped(server, tmp_path):
    data = zipped({"a.bin": bytes(range(256)) * 40})
    server.files["/a.zip"] = data
    server.break_after = [3000, 2500]
    source = DownloadSource(f"{server.address}/a.zip", md5=hashlib.md5(data).hexdigest())
    fetch_source(source, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == bytes(range(256)) * 40
    assert [span for _, span in server.requests] == ["", "bytes=3000-", "bytes=5500-"]


def test_a_later_run_goes_on_where_an_earlier_one_stopped(server, tmp_path, monkeypatch):
    data = zipped({"a.bin": b"z" * 9000})
    server.files["/a.zip"] = data
    server.break_after = [4000]
    source = DownloadSource(f"{server.address}/a.zip", sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with pytest.raises(DatasetError, match="Run again to go on"):
        fetch_source(source, tmp_path)
    assert (tmp_path / "a.zip.part").stat().st_size == 4000
    fetch_source(source, tmp_path)
    assert server.requests[-1][1] == "bytes=4000-"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fetched-a.zip", "a.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_from_the_start(server, tmp_path, ranges):
    server.ranges = ranges
    (tmp_path / "a.zip.part").write_bytes(b"old" * 500)
    (tmp_path / "a.zip.part.tag").write_text('"0"')
    data = zipped({"a.bin": b"new" * 900})
    server.files["/a.zip"] = data
    source = DownloadSource(f"{server.address}/a.zip", sha256=hashlib.sha256(data).hexdigest())
    fetch_source(source, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"new" * 900


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(b"x" * 99999)
    server.files["/a.zip"] = zipped({"a.bin": b"1"})
    fetch_source(DownloadSource(f"{server.address}/a.zip"), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"1"


@pytest.mark.parametrize("stated", [{"md5": "0" * 32}, {"sha256": "0" * 64}, {"size": 7}])
def test_a_wrong_file_is_removed_and_not_unpacked(server, tmp_path, stated):
    server.files["/a.zip"] = zipped({"a.bin": b"1"})
    with pytest.raises(DatasetError, match="expected.*The file was removed"):
        fetch_source(DownloadSource(f"{server.address}/a.zip", **stated), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_without_digest_is_said_to_be_unchecked(server, tmp_path, caplog):
    server.files["/a.zip"] = zipped({"a.bin": b"1"})
    fetch_source(DownloadSource(f"{server.address}/a.zip", to="inner"), tmp_path)
    assert "no digest is known" in caplog.text
    assert (tmp_path / "inner" / "a.bin").exists()


def test_a_missing_file_is_named_at_once(server, tmp_path):
    with pytest.raises(DatasetError, match="none.zip: not fetched - got HTTP 404"):
        fetch_source(DownloadSource(f"{server.address}/none.zip"), tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.zip", "/etc/passwd"])
def test_only_web_addresses_are_fetched(tmp_path, url):
    with pytest.raises(DatasetError, match="expected http:// or https://"):
        fetch_source(DownloadSource(url), tmp_path)


def link_in_zip() -> bytes:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("good", "1")
        archive.writestr(info, "/etc")
    return buffer.getvalue()


# Archive, what the message must say.
TRICKS = {
    "zip climbs": (zipped({"good": b"1", "../evil": b"1"}), "climbs out"),
    "zip climbs deep": (zipped({"good": b"1", "a/../../evil": b"1"}), "climbs out"),
    "zip absolute": (zipped({"good": b"1", "/tmp/evil-yoke": b"1"}), "absolute"),
    "zip drive": (zipped({"good": b"1", "C:/evil": b"1"}), "absolute"),
    "zip link": (link_in_zip(), "link or device"),
    "tar climbs": (tarred(member("good"), member("../evil")), "climbs out"),
    "tar absolute": (tarred(member("good"), member("/tmp/evil-yoke")), "absolute"),
    "tar link": (tarred(member("good"), member("l", tarfile.SYMTYPE, "/etc")), "link or device"),
    "tar hard link": (tarred(member("good"), member("l", tarfile.LNKTYPE, "x")), "link or device"),
    "tar device": (tarred(member("good"), member("d", tarfile.CHRTYPE)), "link or device"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_an_archive_that_reaches_outside_is_refused_whole(tmp_path, trick):
    data, message = TRICKS[trick]
    archive, folder = tmp_path / "a.bin", tmp_path / "in" / "side"
    archive.write_bytes(data)
    with pytest.raises(DatasetError, match=message):
        unpack(archive, folder)
    assert not list(folder.iterdir()), "something was unpacked before the check"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "in"]
    assert not Path("/tmp/evil-yoke").exists()


def test_an_archive_does_not_write_through_a_link_that_lies_there(tmp_path):
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "door").symlink_to(tmp_path / "outside")
    (tmp_path / "a.zip").write_bytes(zipped({"door/evil": b"1"}))
    with pytest.raises(DatasetError, match="lies outside"):
        unpack(tmp_path / "a.zip", folder)
    assert not list((tmp_path / "outside").iterdir())


def test_a_tar_is_unpacked_and_removed(tmp_path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tarred(member("d", tarfile.DIRTYPE), member("d/f"), data=b"42"))
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out/d/f").read_bytes() == b"42" and not archive.exists()


def test_a_source_may_not_leave_the_folder_of_the_data(server, tmp_path):
    server.files["/a.zip"] = zipped({"a": b"1"})
    with pytest.raises(DatasetError, match="lies outside"):
        fetch_source(DownloadSource(f"{server.address}/a.zip", to="../.."), tmp_path / "x")


def test_a_script_under_download_is_never_run(tmp_path):
    file = tmp_path / "d.yaml"
    file.write_text("train: t\nval: v\nnames: [a]\ndownload: https://127.0.0.1:1/a.zip\n")
    with pytest.raises(DatasetError, match="never run"):
        fetch(load_data_config(file))
