"""Photos with tags, in a folder like a checkout, for tests of ``wsss new``."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.project import ROOT

TAGS = {  # four cats, three dogs, one of them with a cat, and two photos of neither
    "Käfer 1.JPG": ["cat"],
    "Käfer 2.jpg": ["cat", "dog"],
    "c.png": ["cat"],
    "d.jpeg": ["cat"],
    "e.jpg": ["dog"],
    "f.jpg": ["dog"],
    "g.jpg": [],
    "h.jpg": [],
}
PHOTOS = Path("my photos")


def picture(path: Path, seed: int, size: tuple[int, int] = (60, 40)) -> Path:
    """A photo with coarse random colours, unlike any other seed's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder like a checkout, with photos."""
    monkeypatch.chdir(tmp_path)
    for name in ("Snakefile", "params.yaml", "pipeline", "stages"):
        Path(name).symlink_to(ROOT / name)
    Path("profiles").mkdir()
    for number, name in enumerate(TAGS):
        picture(PHOTOS / name, number)
    return tmp_path


def rows(path: str, content: list[list[object]], delimiter: str = ",") -> str:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(content)
    return path


def text(path: str, content: object) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def table() -> str:
    return rows("tags.csv", [["filename", "tags"], *([name, " ".join(tags)] for name, tags in TAGS.items())])
