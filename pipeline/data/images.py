"""Decoding, apart from torch: label and saliency workers start without it."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Image
from pipeline.errors import PipelineError


def read_rgb(image: Image) -> NDArray[np.uint8]:
    """H x W x 3 uint8.

    Raises:
        PipelineError: the file does not decode to the indexed size.
    """
    found = cv2.imread(str(image.file), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if found is None or found.shape[:2] != (image.height, image.width):
        raise PipelineError(f"{image.file}: is not the image that was indexed; run the index stage again")
    return cv2.cvtColor(found, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
