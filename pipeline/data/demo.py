"""The demo: a generated dataset in VOC layout that shows the field's problem.

Each object is a small head whose bright pattern gives the class away, and a large body that carries its class's tint
and stripes clearly near the head and hardly at the tail. A plain CAM covers the head; what finds the body wins. About 1.5
classes an image, as in VOC, over clutter in the colours of none. Masks are exact. Saliency is SIMULATED: the papers
bring maps of a trained detector, which there is none of for generated images, so the demo degrades the union of its
objects to about the quality that such detectors have on VOC (``simulated_saliency``); it tells nothing of a class.
Tags are the classes of the objects drawn.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.palette import voc_palette
from pipeline.schema import Demo

CLASSES = ("ant", "bee", "crab", "dove", "eel")
_TINTS = np.array([(18, -10, -10), (-10, 16, -12), (-12, -8, 20), (14, 12, -20), (-16, 12, 12)], np.float32)
_HEADS = np.array([(235, 60, 50), (70, 220, 60), (70, 90, 240), (240, 220, 50), (60, 225, 225)], np.float32)
_ANGLES = (0.0, 36.0, 72.0, 108.0, 144.0)  # of the body's stripes, degrees
# How clearly a body tells its class: with more, a plain CAM covers it; with less, nothing can. Chosen so that the
# recall of CAM, OAA and OAA++ comes near the paper's on VOC (36.7, 52.3, 61.9 %; OAA Table 11).
_TINT, _STRIPE, _FADE = 0.6, 6.0, 2.0
RGB = NDArray[np.uint8]


def generate(root: Path, settings: Demo) -> None:
    """Write images, masks, saliency, tags, classes and lists below ``root``; the same bytes for the same settings."""
    for folder in ("JPEGImages", "SegmentationClass", "Saliency", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    tags: dict[str, list[int]] = {}
    names = [f"demo_{number:05d}" for number in range(settings.train + settings.evaluation)]
    for number, name in enumerate(names):
        random = np.random.default_rng([settings.seed, number])
        image, mask = draw(settings.size, random)
        cv2.imwrite(str(root / f"JPEGImages/{name}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette(voc_palette().reshape(-1).tolist())
        picture.save(root / f"SegmentationClass/{name}.png")
        cv2.imwrite(str(root / f"Saliency/{name}.png"), simulated_saliency(mask, random))
        tags[name] = sorted({int(value) for value in np.unique(mask)} - {0, 255})
    (root / "tags.json").write_text(json.dumps(tags) + "\n")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("\n".join(names[: settings.train]) + "\n")
    (lists / "val.txt").write_text("\n".join(names[settings.train :]) + "\n")


def draw(size: int, random: np.random.Generator) -> tuple[RGB, NDArray[np.uint8]]:
    """One image, size x size x 3, and its mask, size x size: 0, 1..5, 255 on the outlines."""
    canvas = _background(size, random)
    mask = np.zeros((size, size), np.uint8)
    count = random.choice([1, 2, 3], p=[0.6, 0.3, 0.1])  # about 1.5 tags an image, as in VOC
    classes = random.permutation(len(CLASSES))[:count]
    for class_index in np.repeat(classes, random.integers(1, 3, count) if count < 3 else 1):
        _object(canvas, mask, int(class_index), random)
    noise = random.normal(0, 6, canvas.shape)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8), mask


def _background(size: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Smooth colour, then blobs and bars of muted colours."""
    coarse = random.uniform(70, 150, (4, 4, 3)).astype(np.float32)
    canvas = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    for _ in range(int(random.integers(6, 12))):
        colour = [float(value) for value in random.uniform(50, 170, 3)]
        centre = [int(value) for value in random.integers(0, size, 2)]
        if random.random() < 0.5:
            axes = [int(value) for value in random.integers(2, size // 8, 2)]
            cv2.ellipse(canvas, centre, axes, float(random.uniform(0, 180)), 0, 360, colour, -1)
        else:
            end = [int(value) for value in random.integers(0, size, 2)]
            cv2.line(canvas, centre, end, colour, int(random.integers(1, 4)))
    return cv2.GaussianBlur(canvas, (0, 0), 0.7).astype(np.float32)


def _object(
    canvas: NDArray[np.float32], mask: NDArray[np.uint8], class_index: int, random: np.random.Generator
) -> None:
    """Paint one object over what is there; a thin outline of 255 separates it in the mask, as VOC's do."""
    size = mask.shape[0]
    long = random.uniform(0.18, 0.32) * size
    short = long * random.uniform(0.5, 0.8)
    angle = random.uniform(0, 360)
    margin = 0.6 * long
    centre = random.uniform(margin, size - margin, 2)
    along = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    tip = centre + along * long * 0.95
    body, head = np.zeros_like(mask), np.zeros_like(mask)
    cv2.ellipse(body, _point(centre), _point((long, short)), angle, 0, 360, 1, -1)
    radius = max(3, round(short * 0.36))
    cv2.circle(head, _point(tip), radius, 1, -1)
    grey = random.uniform(120, 200)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    turn = np.radians(_ANGLES[class_index] + random.uniform(-10, 10))
    stripes = np.sin((x * np.cos(turn) + y * np.sin(turn)) * (2 * np.pi / 7))
    towards = ((x - centre[0]) * along[0] + (y - centre[1]) * along[1]) / long  # 1 at the head, -1 at the tail
    clear = np.clip(0.5 + 0.5 * towards, 0, 1)[..., None] ** _FADE  # the class fades from the head to the tail
    skin = grey + clear * (_TINT * _TINTS[class_index] * random.uniform(0.6, 1.2) + _STRIPE * stripes[..., None])
    inside = body > 0
    canvas[inside] = skin[inside]
    ring = (x - tip[0]) ** 2 + (y - tip[1]) ** 2 < (0.45 * radius) ** 2
    inside = head > 0
    canvas[inside] = _HEADS[class_index]
    canvas[inside & ring] = _HEADS[(class_index + 2) % len(CLASSES)] * 0.6
    whole = ((body | head) > 0).astype(np.uint8)
    outline = cv2.dilate(whole, np.ones((3, 3), np.uint8)) - whole
    mask[(outline > 0) & (mask > 0)] = 255
    mask[whole > 0] = class_index + 1


def _point(values: NDArray[np.float64] | tuple[float, float]) -> tuple[int, int]:
    return round(float(values[0])), round(float(values[1]))


def simulated_saliency(mask: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """What a class-agnostic detector might say of an image: objects blurred and bent, some missed, some invented.

    Returns:
        size x size uint8. At 0.5 its pooled IoU with the objects is about 0.6 to 0.7, as CSNet's is on VOC.
    """
    size = mask.shape[0]
    union = (mask > 0).astype(np.uint8)
    count, parts = cv2.connectedComponents(union)
    found = np.zeros(mask.shape, np.float32)
    for part in range(1, count):
        if random.random() > 0.08:  # a missed object
            found[parts == part] = random.uniform(0.75, 1.0)
    if random.random() < 0.35:  # an invented one
        centre = _point(random.uniform(0, size, 2))
        axes = _point(random.uniform(0.05 * size, 0.14 * size, 2))
        cv2.ellipse(found, centre, axes, float(random.uniform(0, 180)), 0, 360, float(random.uniform(0.5, 0.9)), -1)
    bend = cv2.resize(random.normal(0, 0.055 * size, (6, 6, 2)), (size, size), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    bent = cv2.remap(found, x + bend[..., 0].astype(np.float32), y + bend[..., 1].astype(np.float32), cv2.INTER_LINEAR)
    return np.rint(cv2.GaussianBlur(bent, (0, 0), 0.02 * size) * 255).astype(np.uint8)
