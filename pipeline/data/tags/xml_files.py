"""XML with tags, in any encoding: VOC's, a file an image, and CVAT's."""

import codecs
import re
from xml.etree import ElementTree

from pipeline.data.tags.annotations import Annotations

# Encodings that tools declare although they write supersets, as in the WHATWG Encoding Standard.
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "ascii": "utf-8"}
_ENCODING = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([^"'>]*)["']""")
ERRORS = (OSError, ValueError, LookupError, ElementTree.ParseError)  # of reading and parsing


def parse(data: bytes) -> ElementTree.Element:
    """Parse XML in any encoding that Python knows; expat itself knows no multi-byte encodings but Unicode's.

    Raises:
        LookupError: the declared encoding is unknown.
        ValueError: the file is not text in its encoding.
        ElementTree.ParseError: the file is not XML, or it defines entities, which may expand without bounds.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16")
    elif data[:2] in (b"<\0", b"\0<"):
        text = data.decode("utf-16-le" if data[:1] == b"<" else "utf-16-be")
    else:
        declared = _ENCODING.match(data.removeprefix(codecs.BOM_UTF8))
        name = declared[1].decode("ascii", "replace") if declared and not data.startswith(codecs.BOM_UTF8) else "utf-8"
        encoding = codecs.lookup(name).name
        if encoding.startswith(("utf-16", "utf-32")):  # false: the declaration was read as bytes
            encoding = "utf-8"
        text = data.decode(_SUPERSETS.get(encoding, encoding)).removeprefix("\ufeff")
    if "<!ENTITY" in text:
        raise ElementTree.ParseError("it defines entities")
    return ElementTree.fromstring(text)


def is_cvat(root: ElementTree.Element) -> bool:
    return root.tag == "annotations"


def objects(root: ElementTree.Element) -> list[str]:
    """The names of all objects of a VOC annotation; parts of objects do not count."""
    return [(entry.findtext("name") or "").strip() for entry in root.findall("object")]


def filename(root: ElementTree.Element) -> str:
    """The image that a VOC annotation names; '' if it names none."""
    return (root.findtext("filename") or "").strip()


def read_cvat(root: ElementTree.Element, out: Annotations) -> None:
    """Read 'CVAT for images 1.1': an image's tags, and the labels of its shapes. An image without any has no class."""
    out.kind = "CVAT XML"
    images = root.findall("image")
    if not images and root.find("track") is not None:
        out.fault(
            "tag file", "is 'CVAT for video', whose frames have no file names; export it as 'CVAT for images 1.1'"
        )
        return
    meta = root.find("meta")
    for label in meta.iter("label") if meta is not None else ():
        out.classes += filter(None, [(label.findtext("name") or "").strip()])
    for number, image in enumerate(images, 1):
        name = image.get("name", "").strip()
        if not name:
            out.fault("image of CVAT's XML", f"image {number} has no name; complete or remove it")
            continue
        out.add(name, [child.get("label", "").strip() for child in image if child.get("label")])
