"""Data of the galleries, which show the same images at every step from tags to masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.data.index import Image
from pipeline.report.pictures import PALETTE, Pixels, colours, data_uri, grey, heat, overlay, read_photo
from pipeline.stores.raster import RasterStore


@dataclass(frozen=True)
class Heading:
    """The heading of a column of a gallery, and the name below it."""

    heading: str
    name: str


@dataclass(frozen=True)
class Step(Heading):
    """A column of a gallery: a store, and how to draw its raster of each image."""

    kind: Literal["saliency", "maps", "labels"]
    store: RasterStore


@dataclass(frozen=True)
class Network:
    """A row of each image in a layer gallery. ``store`` numbers the ``layers`` from 1."""

    name: str
    remark: str
    layers: Sequence[str]
    store: RasterStore


@dataclass(frozen=True)
class Chip:
    """A class name and its CSS colour."""

    name: str
    colour: str


@dataclass(frozen=True)
class Picture:
    """An <img>. ``flat`` marks a label map, which the browser must not smooth."""

    uri: str
    alt: str
    flat: bool = False


@dataclass(frozen=True)
class Subject:
    """An image of a gallery, with its tags and photo."""

    id: str
    tags: Sequence[Chip]
    photo: Picture


@dataclass(frozen=True)
class GalleryRow:
    """An image with its mask and a picture for each step; None if a store does not contain the image."""

    subject: Subject
    mask: Picture | None
    pictures: Sequence[Picture | None]


@dataclass(frozen=True)
class Gallery:
    """A gallery with a row for each image and a column for each step. ``masked``: show masks next to the photos."""

    legend: Sequence[Chip]
    masked: bool
    steps: Sequence[Heading]
    rows: Sequence[GalleryRow]


@dataclass(frozen=True)
class LayerBlock:
    """An image with a picture for each network and layer; None if the network lacks the layer."""

    subject: Subject
    rows: Sequence[tuple[Network, Sequence[Picture | None]]]


@dataclass(frozen=True)
class LayerGallery:
    """A gallery with a row for each image and network, and a column for each layer."""

    layers: Sequence[str]
    blocks: Sequence[LayerBlock]


def gallery(
    images: Sequence[Image], steps: Sequence[Step], names: Sequence[str], masks: RasterStore | None = None
) -> Gallery:
    """Draw every step of the images. ``names``: class names by id, background first."""
    legend = [*(chip(class_id, name) for class_id, name in enumerate(names)), chip(255, "ignored")]
    rows = []
    for image in images:
        photo = read_photo(image)
        mask = Step("Mask", "ground truth", "labels", masks) if masks is not None else None
        rows.append(
            GalleryRow(
                subject(image, photo, names),
                _picture(mask, image, photo) if mask else None,
                [_picture(step, image, photo) for step in steps],
            )
        )
    return Gallery(legend, masks is not None, steps, rows)


def layer_gallery(images: Sequence[Image], networks: Sequence[Network], names: Sequence[str]) -> LayerGallery:
    """Draw every layer of every network for the images. ``names``: class names by id, background first."""
    layers = list(dict.fromkeys(layer for network in networks for layer in network.layers))
    blocks = []
    for image in images:
        photo = read_photo(image)
        rows = [(network, [_layer(network, layer, image, photo) for layer in layers]) for network in networks]
        blocks.append(LayerBlock(subject(image, photo, names), rows))
    return LayerGallery(layers, blocks)


def holds(store: RasterStore, image_id: str) -> bool:
    """Whether the store has a raster of the image."""
    return image_id in store and bool(store.classes(image_id))


def subject(image: Image, photo: Pixels, names: Sequence[str]) -> Subject:
    """The heading of an image's row: its id, its photo and its tags."""
    picture = Picture(data_uri(photo, lossless=False), f"photo of {image.id}")
    return Subject(image.id, [chip(tag, names[tag]) for tag in image.tags], picture)


def _picture(step: Step, image: Image, photo: Pixels) -> Picture | None:
    if not holds(step.store, image.id):
        return None
    alt = f"{step.heading} of {image.id}"
    if step.kind == "maps":
        return Picture(data_uri(overlay(photo, step.store.maps(image.id)), lossless=False), alt)
    raster = step.store.get(image.id)
    if step.kind == "labels":
        return Picture(data_uri(colours(raster), lossless=True), alt, flat=True)
    return Picture(data_uri(grey(raster), lossless=False), alt)


def _layer(network: Network, layer: str, image: Image, photo: Pixels) -> Picture | None:
    if layer not in network.layers:
        return None
    raster = network.store.get(image.id, network.layers.index(layer) + 1)
    size = max(1, photo.shape[0] // 2), max(1, photo.shape[1] // 2)  # feature maps are coarser than photos
    return Picture(data_uri(heat(raster, size), lossless=False), f"{layer} of {network.name}, {image.id}")


def chip(class_id: int, name: str) -> Chip:
    """The name and palette colour of a class."""
    red, green, blue = PALETTE[class_id].tolist()
    return Chip(name, f"rgb({red},{green},{blue})")
