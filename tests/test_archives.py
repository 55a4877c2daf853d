"""Hostile and damaged archives: only regular files with known names are unpacked, and faults are one line."""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.download import Release, download, is_complete
from tests.release import IMAGES, make_release, pack, published, refusal


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return make_release(tmp_path / "source")


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
