"""Colours of the classes: those of VOC's palette, which all formats share."""

from pipeline.data.palette import voc_palette

_PALETTE = voc_palette().tolist()


def colour(class_id: int) -> tuple[int, int, int]:
    """Red, green and blue of a class."""
    red, green, blue = _PALETTE[class_id]
    return red, green, blue


def hexadecimal(class_id: int) -> str:
    """The colour as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour(class_id))
