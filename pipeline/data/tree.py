"""Folders of photos, masks and maps: a file's id is its path below the folder without its suffix.

Ids have '/' between folders whatever the system, and are in Unicode's form NFC: macOS writes accents in another form
than lists do. Two files of one folder may thus have the same id, such as x.jpg and x.png.
"""

import os
import unicodedata
from pathlib import Path, PurePosixPath

from pipeline.data.faults import Faults
from pipeline.data.photos import SUFFIXES
from pipeline.stores.files import folders_above

_JOINERS = dict.fromkeys(
    (0x200C, 0x200D)
)  # parts of emoji and of Persian words, although Python calls them unprintable


def file_id(path: str) -> str:
    """The id of a file: its path below the folder without its suffix, in NFC."""
    return unicodedata.normalize("NFC", str(PurePosixPath(path).with_suffix("")))


def is_fit(name: str) -> bool:
    """Whether lists, messages and stores can hold an id: printable text, without '\\', which lists read as '/'."""
    return name.translate(_JOINERS).isprintable() and "\\" not in name


def files_by_id(
    folder: Path, suffixes: tuple[str, ...], key: str, faults: Faults, deep: bool = True, strict: bool = False
) -> dict[str, list[Path]] | None:
    """Files with one of ``suffixes``, in any case, in a folder and its subfolders, sorted, by id.

    Hidden files and folders are skipped. Links are followed; a folder that links reach twice counts once, and one that
    contains ``folder`` does not count.

    Args:
        key: the key of params.yaml that names the folder, for messages.
        deep: whether subfolders count.
        strict: whether a subfolder that cannot be listed is a fault. Otherwise it counts as empty.

    Returns:
        None, and a fault, if the folder cannot be listed.
    """
    ids: dict[str, list[Path]] = {}
    visited = folders_above(folder)
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        path = folder / prefix
        try:
            status = os.stat(path)
            if (identity := (status.st_dev, status.st_ino)) in visited:
                continue
            visited.add(identity)
            with os.scandir(path) as entries:
                shown = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            fix = f"correct its permissions or {key}" if prefix else f"create it or correct {key}"
            if strict or not prefix:
                faults.add("folder", f"{path}: cannot be listed ({error.strerror}); {fix}")
            if not prefix:
                return None
            continue
        if deep:
            waiting.extend(f"{prefix}{entry.name}/" for entry in reversed(shown) if _is_folder(entry))
        for entry in shown:
            if os.path.splitext(entry.name)[1].lower() in suffixes and not _is_folder(entry):
                ids.setdefault(file_id(prefix + entry.name), []).append(path / entry.name)
    return ids


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def find_photos(folder: Path, faults: Faults) -> dict[str, str]:
    """All photos in a folder and its subfolders: id -> path below the folder, with suffix.

    Two photos with one id and names that ``is_fit`` refuses are added to ``faults``, as is a folder without photos.
    """
    faults_before = len(faults)
    photos: dict[str, str] = {}
    for name, files in (files_by_id(folder, SUFFIXES, "the path of the photos", faults, strict=True) or {}).items():
        check_id(name, files, faults)
        photos[name] = files[0].relative_to(folder).as_posix()
    if not photos and len(faults) == faults_before:
        faults.add("folder", f"{folder}: holds no photo; photos end in {', '.join(SUFFIXES)}")
    return photos


def check_id(name: str, files: list[Path], faults: Faults) -> bool:
    """Add a fault if an id has several files or is unfit, and return whether it is right."""
    if len(files) > 1:
        line = f"{files[0]}: {files[1]} has the same id; remove or rename one of the two"
        faults.add("two files with one id", line)
    elif not is_fit(name):
        what = "contains a backslash" if "\\" in name else "is not printable UTF-8 text"
        faults.add("name of an image", f"{str(files[0])!a}: its name {what}; rename it")
    else:
        return True
    return False
