"""Text lines 'ID c1 c2', as in the lists of DRS and OAA-PyTorch."""

import re

from pipeline.data.tags.annotations import Annotations, Field
from pipeline.data.tags.matching import Photos, has_suffix

_MOST_WORDS = 64  # of a file name


def read(text: str, photos: Photos, out: Annotations) -> None:
    """Read lines of an id or path and tags; class ids count FROM ZERO."""
    out.kind, out.first_id = "text lines ID TAG ...", 0
    for line in text.split("\n"):
        if line := line.strip():
            end = _name_end(line, photos)
            rest = line[end:].strip(" \t,;")
            out.add(line[:end].rstrip(",;"), [Field(rest)] if rest else [])


def _name_end(line: str, photos: Photos) -> int:
    """Position at which the name of a photo ends: with an image suffix, or with the last word that names a photo."""
    ends = [match.end() for match, _ in zip(re.finditer(r"\S+", line), range(_MOST_WORDS), strict=False)]
    files = [end for end in ends if has_suffix(line[:end].rstrip(",;"))]
    known = (end for end in (*files, *reversed(ends)) if photos.knows(line[:end].rstrip(",;")))
    return next(known, (files or ends)[0])
