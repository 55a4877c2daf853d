"""Fingerprints of folders: by content, with a cache that only saves time, and never blocked by what is not a file."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.stores import hashes
from pipeline.stores.hashes import CACHE, fingerprint
from tests.harm import ODD

DATA = Path("data")


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder ``data`` with three files, and a folder for the cache, which holds new files at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hashes, "_RACY", 0)
    CACHE.parent.mkdir()
    for name in ("a", "b", "sub/c"):
        (DATA / name).parent.mkdir(parents=True, exist_ok=True)
        (DATA / name).write_text(f"content of {name}")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were hashed since the list was cleared."""
    calls: list[str] = []
    real = hashes._hash

    def recorded(path: str) -> Any:
        calls.append(path)
        return real(path)

    monkeypatch.setattr(hashes, "_hash", recorded)
    return calls


def rewrite(path: Path) -> None:
    """Change the last byte, and put the modification time back."""
    time.sleep(0.02)  # the clock of the file system ticks
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_files_fingerprint_is_its_hash() -> None:
    assert fingerprint(DATA / "a") == hashlib.sha256(b"content of a").hexdigest()


def test_names_and_content_count_but_times_and_hidden_files_do_not() -> None:
    seen = [fingerprint(DATA)]
    os.utime(DATA / "a", (1, 1))
    (DATA / ".hidden").write_text("hidden")
    assert fingerprint(DATA) == seen[0]
    changes: list[Callable[[], Any]] = [
        lambda: rewrite(DATA / "a"),
        lambda: rewrite(DATA / "sub/c"),
        lambda: (DATA / "a").rename(DATA / "z"),
        lambda: (DATA / "sub/c").rename(DATA / "c"),
        lambda: (DATA / "b").unlink(),
        lambda: (DATA / "new").write_text("new"),
        lambda: (DATA / "empty").mkdir() or (DATA / "empty/file").touch(),
    ]
    for change in changes:
        change()
        seen.append(fingerprint(DATA))
    assert len(set(seen)) == len(changes) + 1


def test_several_paths_count_in_order_and_a_missing_one_is_told_apart() -> None:
    a, b = DATA / "a", DATA / "b"
    seen = [
        fingerprint(a, b),
        fingerprint(b, a),
        fingerprint(a, DATA / "none"),
        fingerprint(DATA, b),
        fingerprint(DATA),
    ]
    assert len(set(seen)) == 5
    with pytest.raises(FileNotFoundError):
        fingerprint(DATA / "none")


def test_what_has_not_changed_is_not_hashed_again(hashed: list[str]) -> None:
    before = fingerprint(DATA)
    assert sorted(hashed) == ["data/a", "data/b", "data/sub/c"]
    hashed.clear()
    assert fingerprint(DATA) == before
    assert not hashed
    rewrite(DATA / "b")
    assert fingerprint(DATA) != before
    assert hashed == ["data/b"]


def test_a_large_file_is_cached_and_a_small_one_always_read(hashed: list[str]) -> None:
    large = Path("large")
    large.write_bytes(bytes(hashes.ALWAYS_HASHED + 1))
    for path, expected in ((large, ["large"]), (large, []), (DATA / "a", [])):
        hashed.clear()
        assert fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert hashed == expected
    assert "data/a" not in CACHE.read_text()


def test_a_file_that_changed_just_now_is_not_cached(hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next change could get the same time."""
    monkeypatch.setattr(hashes, "_RACY", 3 * 10**9)
    fingerprint(DATA)
    fingerprint(DATA)
    assert len(hashed) == 6
    assert not CACHE.exists()
    os.utime(DATA / "a", (time.time() + 86400,) * 2)  # the modification time is tomorrow, but ctime is now
    fingerprint(DATA)
    assert not CACHE.exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hashlib.file_digest

    def slow(file: Any, name: Any) -> Any:
        digest = real(file, name)
        rewrite(Path(file.name) if isinstance(file.name, str) else DATA / "a")
        return digest

    monkeypatch.setattr(hashlib, "file_digest", slow)
    assert hashes._hash("data/a")[0] is None


def sealed(content: Any) -> bytes:
    text = json.dumps(content).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        lambda content: b"\xff\xfe" + content,
        lambda content: sealed([1, 2]),
        lambda content: sealed({"a": 1}),
        lambda content: sealed(["path"]),
        lambda content: sealed([["data/a", 5, "hash"]]),
        lambda content: sealed([[["data/a"], [1, 2, 3, 4], "hash"]]),
        lambda content: hashlib.sha256(b"[" * 100_000).hexdigest().encode() + b"\n" + b"[" * 100_000,
    ],
)
def test_a_damaged_cache_is_ignored_and_replaced(damage: Callable[[bytes], bytes], hashed: list[str]) -> None:
    before = fingerprint(DATA)
    content = CACHE.read_bytes()
    CACHE.write_bytes(damage(content))
    hashed.clear()
    assert fingerprint(DATA) == before
    assert len(hashed) == 3
    assert CACHE.read_bytes() == content


@pytest.mark.parametrize("way", ["no folder", "a folder in its place", "no space"])
def test_without_a_cache_everything_is_hashed(way: str, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = fingerprint(DATA)
    CACHE.unlink()
    if way == "no folder":
        CACHE.parent.rmdir()
    elif way == "no space":
        monkeypatch.setattr(os, "replace", full)
    else:
        CACHE.mkdir()
    for _ in range(2):
        hashed.clear()
        assert fingerprint(DATA) == before
        assert len(hashed) == 3
    assert not list(Path().rglob("*.partial"))


def test_deleted_files_leave_the_cache() -> None:
    fingerprint(DATA)
    (DATA / "b").unlink()
    (DATA / "new").write_text("new")
    fingerprint(DATA)
    assert [entry[0] for entry in json.loads(CACHE.read_text().partition("\n")[2])] == [
        "data/a",
        "data/sub/c",
        "data/new",
    ]


def test_many_may_save_at_once() -> None:
    folders = [Path(f"many/{number}") for number in range(12)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "file").write_text(str(folder))
    expected = [fingerprint(folder) for folder in folders]
    CACHE.unlink()
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(fingerprint, folders)) == expected
    assert hashes._load()
    assert not list(Path().rglob("*.partial"))


ENTRIES: dict[str, Callable[[Path], Any]] = {
    **ODD,
    "a name that is not UTF-8": lambda path: Path(os.fsdecode(os.fsencode(path) + b"\xff\xfe.jpg")).touch(),
    "a name with a line break": lambda path: path.with_name("line\nbreak").touch(),
}


@pytest.mark.parametrize("folder", [DATA, DATA / "sub"])
@pytest.mark.parametrize("kind", ENTRIES)
def test_an_odd_entry_counts_by_its_name(kind: str, folder: Path) -> None:
    seen = [fingerprint(DATA)]
    ENTRIES[kind](folder / "odd")
    seen += [fingerprint(DATA), fingerprint(DATA)]
    rewrite(DATA / "a")
    seen.append(fingerprint(DATA))
    assert seen[1] == seen[2]
    assert len(set(seen)) == 3


def test_an_unreadable_folder_counts_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test may run as root, who may read everything."""
    real = os.listdir

    def refuse(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    before = fingerprint(DATA)
    monkeypatch.setattr(os, "listdir", refuse)
    after = fingerprint(DATA)
    assert before != after
    rewrite(DATA / "a")
    assert fingerprint(DATA) != after


def test_links_that_reach_a_folder_twice_do_not_multiply(hashed: list[str]) -> None:
    """Each folder links the next one twice: 2^40 paths."""
    for number in range(40):
        folder = Path(f"chain/{number}")
        folder.mkdir(parents=True)
        for name in ("left", "right"):
            (folder / name).symlink_to(f"../{number + 1}")
    Path("chain/40").mkdir()
    Path("chain/40/file").touch()
    fingerprint(Path("chain/0"))
    assert len(hashed) == 1


def test_a_deep_folder_is_walked() -> None:
    folder = os.open(DATA, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    first = fingerprint(DATA)
    subprocess.run(["rm", "-r", DATA / "d"], check=True)  # Python's own removal has a limit
    assert fingerprint(DATA) == first  # a folder without files does not count
