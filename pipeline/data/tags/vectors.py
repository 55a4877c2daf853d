"""cls_labels.npy of psa and irn: a class vector an image."""

from pathlib import Path

from pipeline.data import cls_labels
from pipeline.data.tags.annotations import Annotations
from pipeline.stores import isolated


def read(path: Path, out: Annotations) -> None:
    """Read the vectors in a process of its own; the tags are class ids in 1..K."""
    out.kind = "pickled dict of class vectors"
    try:
        vectors = isolated.call(cls_labels.load, path)
    except OSError as error:
        out.fault("tag file", f"cannot be read as tag file ({error.strerror}); correct its path in params.yaml")
        return
    except (ValueError, isolated.Failed) as error:
        out.fault("tag file", f"{error}; provide the tags as .json or .csv")
        return
    for key, vector in vectors.items():
        out.widths[key] = vector.size
        out.add(key, [int(column) + 1 for column in (vector > 0).nonzero()[0]])
