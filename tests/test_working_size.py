"""Large images: every stage works at the size to which dataset.working_megapixels reduces them."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.data.build_index import build_index
from pipeline.data.checks import read_mask
from pipeline.data.images import read_rgb, working_size
from pipeline.data.index import Index, write
from pipeline.errors import PipelineError
from pipeline.labels import saliency
from tests.voc_tree import image_of, make_tree


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (375, 500)),
        ((1024, 2048), (1024, 2048)),
        ((1000, 2500), (1000, 2500)),
        ((3000, 4000), (1369, 1825)),
        ((4000, 3000), (1825, 1369)),
        ((1, 100_000_000), (1, 2_500_000)),
    ],
)
def test_the_working_size_keeps_the_shape_and_the_limit(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert working_size(size, 2.5) == expected


def test_an_image_above_the_working_size_is_reduced_with_its_mask_and_saliency_map(tmp_path: Path) -> None:
    """Every stage reads the same reduced size; images of up to that size keep their pixels."""
    dataset = make_tree(tmp_path, size=(40, 60))
    whole = build_index(dataset, tmp_path / "Saliency").index["images"]
    assert all("file_size" not in entry for entry in whole.values())
    survey = build_index(replace(dataset, working_megapixels=0.001), tmp_path / "Saliency")
    path = tmp_path / "index.json"
    write(path, survey.index)
    (line,) = (line for line in survey.census.remarks if "working_megapixels" in line)
    assert line.startswith("6 images are larger than dataset.working_megapixels and are reduced to 0.001 megapixels")
    for image in Index(path).images():
        assert image.file_size == (40, 60)
        assert image.size == (25, 38)
        area = cv2.resize(cv2.imread(str(image.file)), (38, 25), interpolation=cv2.INTER_AREA)
        assert np.array_equal(read_rgb(image), area[..., ::-1])
        mask = read_mask(image)
        assert mask.shape == (25, 38)
        assert set(np.unique(mask).tolist()) == {0, *image.tags, 255}
        assert saliency.read_file(image).shape == (25, 38)
    (tmp_path / "JPEGImages/img_000.jpg").unlink()
    cv2.imwrite(str(tmp_path / "JPEGImages/img_000.jpg"), np.zeros((25, 38, 3), np.uint8))
    with pytest.raises(PipelineError):
        read_rgb(image_of(Index(path), "img_000"))
