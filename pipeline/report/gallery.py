"""Galleries: the same images at every step of the way from tags to masks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from pipeline.data.index import Image
from pipeline.report.pictures import PALETTE, Pixels, colours, data_uri, grey, heat, overlay, read_photo
from pipeline.report.tables import table
from pipeline.stores.raster import RasterStore


@dataclass(frozen=True)
class Step:
    """A column: what a store holds of each image. ``kind``: how to draw it."""

    heading: str
    name: str
    kind: Literal["saliency", "maps", "labels"]
    store: RasterStore


@dataclass(frozen=True)
class Layers:
    """A row of each image: what a store holds of a network's layers, the first of ``layers`` under 1, and so on."""

    name: str
    remark: str
    layers: Sequence[str]
    store: RasterStore


def gallery(
    images: Sequence[Image], steps: Sequence[Step], names: Sequence[str], masks: RasterStore | None = None
) -> str:
    """A table of pictures: a row an image, a column a step. ``names``: background first.

    Photo and mask stand in the rows' headings, which stay in view however many columns there are.
    """
    head = f'<th scope="col">{"Photo" if masks is None else "Photo and mask"}</th>' + "".join(
        f'<th scope="col">{escape(step.heading)}<small>{escape(step.name)}</small></th>' for step in steps
    )
    return table(f"<tr>{head}</tr>", (_row(image, steps, names, masks) for image in images), "gallery")


def layer_gallery(images: Sequence[Image], networks: Sequence[Layers], names: Sequence[str]) -> str:
    """A table of pictures: for each image a row a network, a column a layer. ``names``: background first."""
    layers = list(dict.fromkeys(layer for network in networks for layer in network.layers))
    titles = ("Photo", "Classifier", *layers)
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = (row for image in images for row in _block(image, networks, layers, names))
    return table(f"<tr>{head}</tr>", body, "gallery layers")


def holds(store: RasterStore, image: Image) -> bool:
    """Whether the store has a raster of the image."""
    return image.id in store and bool(store.classes(image.id))


def legend(names: Sequence[str]) -> str:
    """The colours of label maps. ``names``: background first."""
    chips = "".join(_chip(class_id, name) for class_id, name in enumerate(names))
    return f'<ul class="tags">{chips}{_chip(255, "ignored")}</ul>'


def _row(image: Image, steps: Sequence[Step], names: Sequence[str], masks: RasterStore | None) -> str:
    photo = read_photo(image)
    tags = "".join(_chip(tag, names[tag]) for tag in image.tags)
    shown = f'<img src="{data_uri(photo, lossless=False)}" alt="photo of {escape(image.id)}">'
    if masks is not None:
        shown += _picture(Step("Mask", "ground truth", "labels", masks), image, photo)
    cells = "".join(f"<td>{_picture(step, image, photo)}</td>" for step in steps)
    heading = f'<div class="pair">{shown}</div>{escape(image.id)}<ul class="tags">{tags}</ul>'
    return f'<tr><th scope="row">{heading}</th>{cells}</tr>'


def _picture(step: Step, image: Image, photo: Pixels) -> str:
    if not holds(step.store, image):
        return "none"
    kind = ' class="flat"' if step.kind == "labels" else ""
    return f'<img{kind} src="{_draw(step, image, photo)}" alt="{escape(f"{step.heading} of {image.id}")}">'


def _draw(step: Step, image: Image, photo: Pixels) -> str:
    if step.kind == "maps":
        return data_uri(overlay(photo, step.store.maps(image.id)), lossless=False)
    raster = step.store.get(image.id)
    return data_uri(colours(raster), lossless=True) if step.kind == "labels" else data_uri(grey(raster), lossless=False)


def _block(image: Image, networks: Sequence[Layers], layers: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    photo = read_photo(image)
    tags = "".join(_chip(tag, names[tag]) for tag in image.tags)
    picture = f'<img src="{data_uri(photo, lossless=False)}" alt="photo of {escape(image.id)}">'
    size = max(1, photo.shape[0] // 2), max(1, photo.shape[1] // 2)  # enough for maps that are coarser than photos
    first = f'<td rowspan="{len(networks)}">{picture}{escape(image.id)}<ul class="tags">{tags}</ul></td>'
    for network in networks:
        cells = ""
        for layer in layers:
            drawn = "none"
            if layer in network.layers:
                raster = network.store.get(image.id, network.layers.index(layer) + 1)
                words = escape(f"{layer} of {network.name}, {image.id}")
                uri = data_uri(heat(raster, size), lossless=False)
                drawn = f'<img src="{uri}" alt="{words}">'
            cells += f"<td>{drawn}</td>"
        heading = f'<th scope="row">{escape(network.name)}<small>{escape(network.remark)}</small></th>'
        yield f"<tr>{first}{heading}{cells}</tr>"
        first = ""


def _chip(class_id: int, name: str) -> str:
    red, green, blue = PALETTE[class_id].tolist()
    return f'<li><i style="background:rgb({red},{green},{blue})"></i>{escape(name)}</li>'
