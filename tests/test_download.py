"""The download, with small generated archives and a local server."""

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.dataset import Dataset
from pipeline.data.build_index import build_index
from pipeline.data.download import Release, download, is_complete, voc2012_aug
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import execute
from stages import download as stage
from tests.release import make_release, refusal


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return make_release(tmp_path / "source")


def test_creates_train_aug_in_voc_layout(tmp_path: Path, release: Release) -> None:
    root = tmp_path / "data/voc"
    assert not is_complete(root, release)
    download(release, root)
    assert is_complete(root, release)
    for file in ("JPEGImages/2008_4.jpg", "Annotations/2007_3.xml", "SegmentationClassAug/2008_5.png"):
        (root / file).rename(root / "aside")
        assert not is_complete(root, release)
        (root / "aside").rename(root / file)
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_text() == "2007_1\n2007_2\n2008_4\n2008_5\n"
    masks = {path.stem: Image.open(path) for path in (root / "SegmentationClassAug").iterdir()}
    found = {name: set(np.asarray(mask).flat) for name, mask in masks.items()}
    assert found == {"2007_1": {1}, "2007_2": {1}, "2007_3": {1}, "2008_4": {20}, "2008_5": {20}}
    assert all(mask.mode == "P" for mask in masks.values())
    assert sorted(path.name for path in root.iterdir()) == [
        "Annotations", "ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug"
    ]  # fmt: skip
    assert not list(tmp_path.rglob("escaped.jpg"))


def test_the_index_accepts_the_download(tmp_path: Path, release: Release) -> None:
    download(release, tmp_path / "voc")
    lists = "ImageSets/Segmentation"
    dataset = Dataset(
        root=str(tmp_path / "voc"),
        tags="Annotations",
        masks="SegmentationClassAug",
        train=f"{lists}/train_aug.txt",
        contradictions="warn",  # the drawn masks are not those of the annotations
    )
    index = build_index(dataset).index
    assert {name: image["tags"] for name, image in index["images"].items()} == {
        name: [12] for name in ("2007_1", "2007_2", "2007_3", "2008_4", "2008_5")
    }


def test_a_wrong_checksum_is_one_line_and_the_file_is_deleted(tmp_path: Path, release: Release) -> None:
    wrong = replace(release, sbd=replace(release.sbd, md5="0" * 32))
    with pytest.raises(PipelineError) as caught:
        download(wrong, tmp_path / "voc")
    (line,) = caught.value.lines
    assert line.startswith(f"{release.sbd.url}: damaged or changed: its MD5 is {release.sbd.md5}, not 000")
    assert [path.name for path in (tmp_path / "voc/.archives").iterdir()] == ["voc.tar"]
    download(release, tmp_path / "voc")
    assert is_complete(tmp_path / "voc", release)


def test_an_unreachable_source_is_one_line(tmp_path: Path, release: Release) -> None:
    gone = replace(release, voc=replace(release.voc, url=(tmp_path / "gone.tar").as_uri()))
    with pytest.raises(PipelineError) as caught:
        download(gone, tmp_path / "voc")
    (line,) = caught.value.lines
    assert line.startswith(f"{gone.voc.url}: ")
    assert line.endswith("run the stage again to resume the download")


def test_too_little_disk_is_an_error_before_the_download(tmp_path: Path, release: Release) -> None:
    with pytest.raises(PipelineError, match=r"GB free on its disk, but the download needs 1000000000\.0 GB; free some"):
        download(replace(release, disk_bytes=10**18), tmp_path / "voc")
    assert not list((tmp_path / "voc/.archives").iterdir())


def test_archives_with_other_images_are_refused(tmp_path: Path, release: Release) -> None:
    with pytest.raises(PipelineError, match=r"do not contain the expected 5 \+ 1 images"):
        download(replace(release, train=5), tmp_path / "voc")


class Server(ThreadingHTTPServer):
    """Serves the files of a folder with range requests.

    Attributes:
        limit: bytes after which a response breaks off.
        lacking: bytes at the end of each file that this server does not have.
        ranges: whether range requests are answered; otherwise, the whole file is sent.
        endless: never stop to send, and announce no length.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.limit: int | None = None
        self.lacking = 0
        self.ranges, self.endless = True, False
        self.asked: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data = (self.server.folder / self.path[1:]).read_bytes()
        data = data[: len(data) - self.server.lacking]
        asked = self.headers.get("Range")
        self.server.asked.append((self.path[1:], asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        self.send_response(416 if start >= len(data) else 206 if asked and self.server.ranges else 200)
        if not self.server.endless:
            self.send_header("Content-Length", str(max(0, len(data) - start)))
        self.end_headers()
        self.wfile.write(data[start:][: self.server.limit])
        while self.server.endless:
            try:
                self.wfile.write(bytes(1 << 16))
            except OSError:  # the client has had enough
                return

    def log_message(self, format: str, *args: Any) -> None:
        """Suppress the request log."""


@pytest.fixture
def server(tmp_path: Path, release: Release) -> Iterator[Server]:
    with Server(tmp_path / "source") as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def served(release: Release, server: Server) -> Release:
    """The release with the server's addresses."""
    base = f"http://127.0.0.1:{server.server_port}"
    voc, sbd = (replace(archive, url=f"{base}/{archive.name}") for archive in (release.voc, release.sbd))
    return replace(release, voc=voc, sbd=sbd)


def test_resumes_from_the_bytes_received(tmp_path: Path, release: Release, server: Server) -> None:
    root, release = tmp_path / "voc", served(release, server)
    server.limit = 700
    with pytest.raises(PipelineError, match=r"voc\.tar: broke off \d+ bytes before the end; run the stage again"):
        download(release, root)
    assert (root / ".archives/voc.tar.part").stat().st_size == 700
    server.limit = None
    download(release, root)
    assert is_complete(root, release)
    assert server.asked == [("voc.tar", None), ("voc.tar", "bytes=700-"), ("sbd.tgz", None)]


def test_a_complete_file_is_not_fetched_again_after_a_kill(tmp_path: Path, release: Release, server: Server) -> None:
    archives = tmp_path / "voc/.archives"
    archives.mkdir(parents=True)
    for archive, kept in ((release.voc, "voc.tar"), (release.sbd, "sbd.tgz.part")):
        (archives / kept).write_bytes((tmp_path / "source" / archive.name).read_bytes())
    download(served(release, server), tmp_path / "voc")
    assert server.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_an_endless_server_is_refused_and_what_was_received_before_stays(
    tmp_path: Path, release: Release, server: Server, ranges: bool
) -> None:
    root, release = tmp_path / "voc", served(release, server)
    server.limit = 700
    refusal(release, root)
    server.limit, server.endless, server.ranges = None, True, ranges
    line = refusal(release, root)
    assert line.startswith(
        f"{release.voc.url}: is not the published file of {release.voc.size} bytes: the server sends"
    )
    assert line.endswith("more; get voc.tar from elsewhere and put it into .archives in dataset.root")
    part = root / ".archives/voc.tar.part"
    assert part.read_bytes() == (tmp_path / "source/voc.tar").read_bytes()[:700]
    server.endless, server.ranges = False, True
    download(release, root)
    assert is_complete(root, release)


def test_a_server_without_ranges_sends_the_rest(tmp_path: Path, release: Release, server: Server) -> None:
    root, release = tmp_path / "voc", served(release, server)
    server.limit = 700
    refusal(release, root)
    server.limit, server.ranges = None, False
    download(release, root)
    assert is_complete(root, release)


@pytest.mark.parametrize("received", [0, 700])
def test_another_length_than_the_published_is_refused_before_the_transfer(
    tmp_path: Path, release: Release, server: Server, received: int
) -> None:
    root, release = tmp_path / "voc", served(release, server)
    (root / ".archives").mkdir(parents=True)
    part = root / ".archives/voc.tar.part"
    part.write_bytes((tmp_path / "source/voc.tar").read_bytes()[:received])
    longer = replace(release, voc=replace(release.voc, size=release.voc.size + 5))
    expected = longer.voc.size - received
    assert f"{expected - 5} bytes are offered where {expected} are expected; get voc.tar" in refusal(longer, root)
    shorter = replace(release, voc=replace(release.voc, size=release.voc.size - 5))
    assert f"{expected - 5} bytes are offered where {expected - 10} are expected" in refusal(shorter, root)
    server.lacking = release.voc.size - 600
    assert ("the server's is shorter" if received else "600 bytes are offered") in refusal(release, root)
    assert part.stat().st_size == received


def test_a_full_disk_is_one_line(tmp_path: Path, release: Release) -> None:
    part = tmp_path / "voc/.archives/voc.tar.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    line = refusal(release, tmp_path / "voc")
    assert line == (
        f"{tmp_path / 'voc'}: cannot be read or written (No space left on device); free space or repair the disk, and "
        "run the stage again to resume"
    )
    assert part.is_symlink()


def test_an_archive_put_there_by_hand_is_checked(tmp_path: Path, release: Release) -> None:
    path = tmp_path / "voc/.archives/voc.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(release.voc.size))
    assert "damaged or changed: its MD5 is" in refusal(release, tmp_path / "voc")
    assert not path.exists()


def job(tmp_path: Path) -> Job:
    root = tmp_path / "data/voc"
    dataset = Dataset(root=str(root), download="voc2012_aug")
    home = tmp_path / "results/dataset"
    return Job("download", "", {}, {"root": root}, {"download": "voc2012_aug"}, dataset, home)


def test_the_stage_downloads_once(tmp_path: Path, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "voc2012_aug", lambda: release)
    root = job(tmp_path).outputs["root"]
    execute(job(tmp_path), stage.main, Runtime())
    assert is_complete(root, release)
    for archive in (release.voc, release.sbd):
        (tmp_path / "source" / archive.name).unlink()
    execute(job(tmp_path), stage.main, Runtime(), force=True)
    assert is_complete(root, release)
    assert sorted(path.name for path in root.parent.iterdir()) == [".lock-voc", "voc"]


def test_the_stage_leaves_other_files_alone(tmp_path: Path, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "voc2012_aug", lambda: release)
    saliency = tmp_path / "data/voc/Saliency/2007_1.png"
    saliency.parent.mkdir(parents=True)
    saliency.write_bytes(b"map")
    execute(job(tmp_path), stage.main, Runtime())
    assert is_complete(tmp_path / "data/voc", release)
    assert saliency.read_bytes() == b"map"


def test_the_release_uses_torchvisions_addresses() -> None:
    release = voc2012_aug()
    assert (release.train, release.evaluation) == (10582, 1449)
    for archive in (release.voc, release.sbd):
        assert archive.url.startswith("https://")
        assert archive.url.endswith(archive.name)
        assert re.fullmatch("[0-9a-f]{32}", archive.md5)
