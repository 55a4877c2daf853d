"""The download, with small generated archives and a local server."""

import hashlib
import io
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.config.dataset import Dataset
from pipeline.data.build_index import build_index
from pipeline.data.download import Archive, Release, download, is_complete, voc2012_aug
from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import execute
from stages import download as stage

scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed; it reads and writes SBD's masks")

SIZE = (12, 16)
TRAIN, VAL, SBD_TRAIN, SBD_VAL = ("2007_1", "2007_2"), ("2007_3",), ("2007_1", "2008_4"), ("2007_3", "2008_5")
IMAGES = ("2007_1", "2007_2", "2007_3", "2008_4", "2008_5", "2008_6")


def png(mask: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(mask)
    picture.putpalette(voc_palette().reshape(-1).tolist())
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def mat(mask: np.ndarray[Any, Any]) -> bytes:
    """Encode a mask as SBD does: a struct with boundaries and classes."""
    borders = np.empty((20, 1), object)
    borders[:, 0] = [np.zeros(SIZE, np.uint8) for _ in range(20)]
    buffer = io.BytesIO()
    content = {"Boundaries": borders, "Segmentation": mask, "CategoriesPresent": np.unique(mask[mask > 0])}
    scipy_io.savemat(buffer, {"GTcls": content}, do_compression=True)
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes], more: Sequence[tarfile.TarInfo] = ()) -> Archive:
    """Pack the files, then members without content."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in more:
            archive.addfile(member)
    return published(path)


def published(path: Path) -> Archive:
    data = path.read_bytes()
    return Archive(path.name, path.as_uri(), len(data), hashlib.md5(data).hexdigest())


def ids(names: tuple[str, ...]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return make_release(tmp_path / "source")


def make_release(source: Path) -> Release:
    """VOC has masks (class 1) of 2007_*; SBD has masks (class 20) of 2007_1, 2007_3, 2008_4 and 2008_5."""
    source.mkdir()
    random = np.random.default_rng(0)
    ones = np.ones(SIZE, np.uint8)
    annotation = b"<annotation><object><name>dog</name></object></annotation>"
    voc = {"ImageSets/Segmentation/train.txt": ids(TRAIN), "ImageSets/Segmentation/val.txt": ids(VAL)}
    for name in IMAGES:
        pixels = random.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        voc[f"JPEGImages/{name}.jpg"] = cv2.imencode(".jpg", pixels)[1].tobytes()
        voc[f"Annotations/{name}.xml"] = annotation
    for name in TRAIN + VAL:
        voc[f"SegmentationClass/{name}.png"] = png(ones)
        voc[f"SegmentationObject/{name}.png"] = png(ones)
    members = {f"VOCdevkit/VOC2012/{name}": data for name, data in voc.items()}
    members["VOCdevkit/VOC2012/JPEGImages/../../../../escaped.jpg"] = b"must not be written"
    masks = {f"cls/{name}.mat": mat(20 * ones) for name in {*SBD_TRAIN, *SBD_VAL}}
    sbd = {**masks, "train.txt": ids(SBD_TRAIN), "val.txt": ids(SBD_VAL), "img/2008_4.jpg": b"not needed"}
    return Release(
        pack(source / "voc.tar", members),
        pack(source / "sbd.tgz", {f"benchmark_RELEASE/dataset/{name}": data for name, data in sbd.items()}),
        train=4,
        evaluation=1,
        disk_bytes=1000,
    )


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


def refusal(release: Release, root: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        download(release, root)
    (line,) = caught.value.lines
    return line


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


VOC = "VOCdevkit/VOC2012/JPEGImages"
REGULAR, LINK, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def member(name: str, kind: bytes = REGULAR, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    "hostile",
    [
        member("/tmp/escaped.jpg"),
        member("../escaped.jpg"),
        member(f"{VOC}/../../../../escaped.jpg"),
        member(f"/{VOC}/escaped.jpg"),
        member(f"{VOC}/escaped.jpg", LINK, "/etc/passwd"),
        member(f"{VOC}/escaped.jpg", HARD, "/etc/passwd"),
        member(f"{VOC}/escaped.jpg", HARD, f"{VOC}/2007_1.jpg"),
        member(f"{VOC}/escaped.jpg", tarfile.CHRTYPE),
        member(f"{VOC}/escaped.jpg", tarfile.BLKTYPE),
        member(f"{VOC}/escaped.jpg", tarfile.FIFOTYPE),
        member(VOC, LINK, "/tmp"),
        member("VOCdevkit/VOC2012/JPEGImages", LINK, ".."),
        member(f"{VOC}/escaped.jpg\n"),
        member(f"{VOC}/.escaped.jpg"),
        member(f"{VOC}/a/escaped.jpg"),
        member(f"{VOC}/escaped.jpg;touch x"),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}-{info.linkname}",
)
def test_only_regular_files_with_known_names_are_unpacked(
    tmp_path: Path, release: Release, hostile: tarfile.TarInfo
) -> None:
    path = tmp_path / "source/voc.tar"
    with tarfile.open(path) as archive:
        files = {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
    download(replace(release, voc=pack(path, files, [hostile])), tmp_path / "voc")
    assert is_complete(tmp_path / "voc", release)
    assert not [file for file in tmp_path.rglob("*") if file.is_symlink() or "escaped" in file.name]
    assert not Path("/tmp/escaped.jpg").exists()
    assert len(list((tmp_path / "voc/JPEGImages").iterdir())) == len(IMAGES)


def test_a_name_that_appears_twice_is_refused(tmp_path: Path, release: Release) -> None:
    for twice in (f"{VOC}/2007_1.jpg", f"./{VOC}/2007_1.jpg"):
        voc = pack(tmp_path / "source/voc.tar", {f"{VOC}/2007_1.jpg": b"1", twice: b"2"} | {VOC: b""}, [member(twice)])
        assert f"voc.tar: contains {twice} twice; delete it and run" in refusal(
            replace(release, voc=voc), tmp_path / "v"
        )
        assert not (tmp_path / "v/JPEGImages").exists()
        (tmp_path / "v/.archives/voc.tar").unlink()


def test_archives_that_unpack_to_too_much_are_refused(
    tmp_path: Path, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of 8 EB, which a sparse member can claim, and a compressed archive of many."""
    path = tmp_path / "source/sbd.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(member("benchmark_RELEASE/dataset/cls/2008_4.mat", size=2**62))
    line = refusal(replace(release, sbd=published(path)), tmp_path / "voc")
    assert f"sbd.tgz: unpacks to too much: benchmark_RELEASE/dataset/cls/2008_4.mat has {2**62} bytes" in line
    monkeypatch.setattr("pipeline.data.download.UNPACKED_BYTES", 10**6)
    path = tmp_path / "source/bomb.tgz"
    bomb = pack(path, {f"img/{number}": bytes(10**5) for number in range(11)})
    assert bomb.size < 10**4
    assert "img/10 has 100000 bytes, all files up to it 1100000" in refusal(
        replace(release, sbd=bomb), tmp_path / "voc"
    )


@pytest.mark.parametrize("change", ["cut", "noise", "empty", "mask"])
def test_an_archive_that_cannot_be_unpacked_is_one_line(tmp_path: Path, release: Release, change: str) -> None:
    path = tmp_path / "source/sbd.tgz"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-300], "noise": bytes(range(256)) * 20, "empty": b"", "mask": b""}[change])
    if change == "mask":
        pack(path, {"benchmark_RELEASE/dataset/cls/2008_4.mat": b"not a mask"})
    line = refusal(replace(release, sbd=published(path)), tmp_path / "voc")
    assert "sbd.tgz: " in line
    assert line.endswith("and run the stage again to resume")


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
