"""Image decoding without torch, so that label and saliency workers start quickly."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Image
from pipeline.errors import PipelineError


def read_rgb(image: Image) -> NDArray[np.uint8]:
    """Read an image as H x W x 3 uint8; EXIF orientation is not applied.

    Raises:
        PipelineError: the file cannot be decoded or does not have the indexed size.
    """
    bgr = cv2.imread(str(image.file), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if bgr is None or bgr.shape[:2] != (image.height, image.width):
        raise PipelineError(f"{image.file}: differs from the indexed image; run the index stage again")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
