"""Fingerprints of files and folders by content, with a cache that makes an unchanged folder cost one stat per file.

The cache maps a path to a hash and to the size, times and inode that the file had. The kernel sets the time of the last
status change (ctime), which no program can set back, so that an edit that keeps size and modification time is also
noticed. A file that changed within the last seconds is not cached, since a later edit could fall into the same tick of
the clock (git's 'racily clean' entries). The cache only saves time: it may be lost, damaged or read-only.
"""

import hashlib
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.stores import cache
from pipeline.stores.files import folders_above, open_regular, sha256

CACHE = Path("results") / ".hashes"  # of all experiments
ALWAYS_HASHED = 1 << 20  # bytes; a file that is named by itself, such as a list, is cached only if it is larger
_RACY = 3 * 10**9  # nanoseconds; file systems have ticks of up to 2 s
_ANNOUNCED = 1 << 30  # bytes to hash from which a line says so

_Identity = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode
_Entry = tuple[_Identity, str]  # with the sha256 of the content


def fingerprint(*paths: Path, depth: int = sys.maxsize) -> str:
    """Return the sha256 of a file, or a hash of the relative path and content of every file in a folder.

    Several paths have one hash, which depends on their order but not on their names. In folders, hidden entries are
    skipped, and links are followed. An entry that cannot be read, such as a dangling link or a FIFO, counts by its name
    and the reason. So does a path that is missing if there are several.

    Args:
        depth: number of levels of folders that count; 1 means only what lies directly in ``paths``.

    Raises:
        OSError: a single path is not a folder and cannot be read.
    """
    if len(paths) == 1 and not os.path.isdir(paths[0]):
        file = os.stat(paths[0])
        if not stat.S_ISREG(file.st_mode) or file.st_size <= ALWAYS_HASHED:
            return sha256(paths[0])
        digest = _hashes([(str(paths[0]), file)])[0]
        return sha256(paths[0]) if digest.startswith("unreadable") else digest  # which raises the error
    entries = [
        entry
        for number, path in enumerate(paths)
        for entry in _walk(str(path), str(number) if len(paths) > 1 else "", depth)
    ]
    hashes = iter(_hashes([(path, status) for _, path, status in entries if isinstance(status, os.stat_result)]))
    whole = hashlib.sha256()
    for name, _, status in entries:
        text = status if isinstance(status, str) else next(hashes)
        whole.update(os.fsencode(name) + b"\0" + os.fsencode(text) + b"\n")
    return whole.hexdigest()


def _walk(top: str, prefix: str, depth: int) -> Iterator[tuple[str, str, os.stat_result | str]]:
    """Yield (name, path, status) of all files below ``top``; a reason replaces the status of what cannot be read.

    A folder that links reach twice is walked once, and one that contains ``top`` not at all.
    """
    folders = dict.fromkeys(folders_above(Path(top)), "..")  # name by device and inode
    waiting = [(prefix, top, depth)]
    while waiting:
        name, path, levels = waiting.pop()
        try:
            status = os.stat(path)
            children = os.listdir(path) if stat.S_ISDIR(status.st_mode) else None
        except OSError as error:
            yield name, path, f"unreadable: {error.errno}"
            continue
        if children is None:
            yield name, path, status if stat.S_ISREG(status.st_mode) else "not a regular file"
        elif levels == 0:
            yield name, path, "folder"
        elif (identity := (status.st_dev, status.st_ino)) in folders:
            yield name, path, f"same folder as {folders[identity]}"
        else:
            folders[identity] = name
            shown = (child for child in sorted(children, reverse=True) if not child.startswith("."))
            waiting.extend((f"{name}/{child}" if name else child, f"{path}/{child}", levels - 1) for child in shown)


def _hashes(files: Sequence[tuple[str, os.stat_result]]) -> list[str]:
    """Return the sha256 of each file by path and status, or the reason why it cannot be read; save new hashes."""
    entries = _load()
    hashes = {path: entries[path][1] for path, status in files if entries.get(path, ((), ""))[0] == _identity(status)}
    wanted = {path: status.st_size for path, status in files if path not in hashes}
    if (size := sum(wanted.values())) >= _ANNOUNCED:
        where = os.path.commonpath([os.path.dirname(path) for path in wanted])
        text = f"reading {len(wanted)} new or changed files in {where} ({size / 1e9:.1f} GB) to compare their content"
        print(text, file=sys.stderr, flush=True)
    new: dict[str, _Entry] = {}
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for path, (identity, digest) in zip(wanted, pool.map(_hash, wanted), strict=True):
            hashes[path] = digest
            if identity is not None:
                new[path] = identity, digest
    finally:
        pool.shutdown(cancel_futures=True)
        if new:
            _save(new)
    return [hashes[path] for path, _ in files]


def _hash(path: str) -> tuple[_Identity | None, str]:
    """Return a file's identity and sha256; no identity if the hash must not be cached."""
    now = time.time_ns()
    try:
        with open_regular(Path(path)) as file:
            before = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        return None, f"unreadable: {error.errno}"
    racy = now - before.st_ctime_ns < _RACY or 0 <= now - before.st_mtime_ns < _RACY
    return None if racy or _identity(before) != _identity(after) else _identity(before), digest


def _identity(status: os.stat_result) -> _Identity:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _load() -> dict[str, _Entry]:
    """Read the cache; empty if it is missing or damaged."""
    try:
        return {path: (tuple(identity), digest) for path, identity, digest in cache.load(CACHE) or ()}
    except (ValueError, TypeError):
        return {}


def _save(new: dict[str, _Entry]) -> None:
    """Add entries to the cache; drop those of files that no longer exist."""
    entries = {path: entry for path, entry in _load().items() if path in new or os.path.lexists(path)} | new
    cache.save(CACHE, [(path, *entry) for path, entry in entries.items()])
