"""JSON with tags: {id: [class]}, records, COCO, and Label Studio's exports."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.data.tags.annotations import Annotations, Pairs, as_field, key_of, titles_photos, titles_tags, truth
from pipeline.data.tags.matching import Photos, has_suffix

_ACCEPTED = "{id: [class, ...]}, [{file, tags}, ...], COCO or Label Studio"
_MIN_KEYS = {"annotationid", "annotator", "leadtime"}  # of Label Studio's JSON-MIN


def parse(text: str, out: Annotations) -> Any:
    """Parse JSON, or JSON Lines as a list; mappings become ``Pairs``. None after a fault."""
    try:
        try:
            return json.loads(text, object_pairs_hook=Pairs)
        except json.JSONDecodeError as error:
            lines = [line for line in text.split("\n") if line.strip()]
            if len(lines) < 2 or not error.msg.startswith("Extra data"):
                raise
            return [json.loads(line, object_pairs_hook=Pairs) for line in lines]
    except ValueError as error:
        out.fault("tag file", f"is not JSON ({error}); correct it")
    except RecursionError:
        out.fault("tag file", f"is nested too deep; it must be {_ACCEPTED}")
    return None


def read(value: Any, photos: Photos, out: Annotations) -> None:
    """Read parsed JSON, whose kind its keys show."""
    if isinstance(value, Pairs):
        keys = {key for key, item in value if isinstance(item, list)}
        if "images" in keys and ({"annotations", "categories"} & {key for key, _ in value}):
            _read_coco(dict(value), out)
        elif {"items", "categories"} <= {key for key, _ in value}:
            out.fault("tag file", f"is Datumaro's JSON, which is not read; export it as COCO (accepted: {_ACCEPTED})")
        else:
            _read_mapping(value, out)
    elif isinstance(value, list) and value and all(isinstance(item, Pairs) for item in value):
        records = [dict(item) for item in value]
        if any("data" in record and ("annotations" in record or "completions" in record) for record in records):
            _read_label_studio(records, photos, out)
        else:
            _read_records(records, photos, out)
    else:
        out.fault("tag file", f"must be a mapping {{image id: [class, ...]}} or records, such as {_ACCEPTED}")


def _read_mapping(pairs: Pairs, out: Annotations) -> None:
    out.kind = "JSON {id: [class]}"
    for reference, tags in pairs:
        if isinstance(tags, Pairs) and tags and all(truth(item) is not None for _, item in tags):
            out.kind = "JSON {id: {class: 0 or 1}}"
            out.add(reference, [name for name, item in tags if truth(item)])
        elif isinstance(tags, Pairs):
            out.fault("tags of an image", f"the tags of {reference} must be a list, not a mapping")
        elif isinstance(tags, list):
            out.add(reference, tags)
        elif isinstance(tags, str):
            out.add(reference, as_field(tags))
        elif isinstance(tags, int) and not isinstance(tags, bool):
            out.add(reference, [tags])
        else:
            out.fault("tags of an image", f"the tags of {reference} must be a list, not {tags!r:.80}")


# Records


def _read_records(records: Sequence[Mapping[str, Any]], photos: Photos, out: Annotations) -> None:
    """Read [{file, tags}, ...]; Label Studio's JSON-MIN and CreateML's JSON are of this form."""
    studio = any(_MIN_KEYS & set(map(key_of, record)) for record in records)
    out.kind = "Label Studio JSON-MIN" if studio else "JSON records {file, tags}"
    photo_key = _most_common_key(records, lambda key, item: _is_photo(item, photos)) or _most_common_key(
        records, lambda key, item: isinstance(item, str) and titles_photos(key)
    )
    if photo_key is None:
        some = ", ".join(list(records[0])[:8])
        out.fault("tag file", f"is a list of records whose keys ({some}) name no photo; it must be {_ACCEPTED}")
        return
    out.joins = True
    every = dict.fromkeys(key for record in records for key in record)
    keys = [key for key in every if key != photo_key]
    titled = [key for key in keys if titles_tags(key)] or _untitled(records, keys, studio)
    boolean = [] if titled else [key for key in keys if all(truth(record.get(key)) is not None for record in records)]
    if not titled and not boolean and not studio:
        out.fault("tag file", f"no key of its records holds tags (keys: {', '.join(keys[:8])}); name it 'tags'")
        return
    for number, record in enumerate(records, 1):
        reference = record.get(photo_key)
        if not isinstance(reference, str) or not reference.strip():
            out.fault("record without a photo", f"record {number} has no {photo_key}; complete or remove it")
            continue
        tags = [tag for key in titled for tag in _names_in(record.get(key))]
        out.add(reference, [*tags, *(key for key in boolean if truth(record.get(key)))])


_MIN_OTHERS = _MIN_KEYS | {"id", "createdat", "updatedat", "createdusername", "projectid"}


def _untitled(records: Sequence[Mapping[str, Any]], keys: Sequence[str], studio: bool) -> list[str]:
    """The keys with tags if none has a usual name: those of Label Studio's controls, or the only one with text."""
    textual = [
        key
        for key in keys
        if key_of(key) not in _MIN_OTHERS
        and not titles_photos(key)
        and any(isinstance(record.get(key), str | list) for record in records)
    ]
    return textual if studio or len(textual) == 1 else []


def _is_photo(value: Any, photos: Photos) -> bool:
    return isinstance(value, str) and (has_suffix(re.split(r"[?#]", value)[0]) or photos.knows(value))


def _most_common_key(records: Sequence[Mapping[str, Any]], fits: Callable[[str, Any], bool]) -> str | None:
    counts = Counter(key for record in records[:300] for key, item in record.items() if fits(key, item))
    return max(counts, key=lambda key: (counts[key], titles_photos(key))) if counts else None


def _names_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """The tags in a value of a record: text, a number, {class: 0 or 1}, or boxes and choices with labels."""
    if isinstance(value, str):
        yield from as_field(value)
    elif isinstance(value, Pairs):
        if value and all(isinstance(item, bool | int) for _, item in value):
            yield from (name for name, item in value if item)
        else:
            for key, item in value:
                if (titles_tags(key) or key_of(key).endswith("labels")) and depth < 8:
                    yield from _names_in(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from [item] if isinstance(item, str) or depth >= 8 else _names_in(item, depth + 1)
    elif value is not None:
        yield value


# COCO


def _read_coco(content: dict[str, Any], out: Annotations) -> None:
    """Read COCO's annotations of any task; images without an annotation have no class."""
    out.kind, out.joins = "COCO JSON", True
    files: dict[str, str] = {}
    for number, image in enumerate(_mappings(content, "images", out), 1):
        name = image.get("file_name") or image.get("coco_url") or image.get("path")
        if not isinstance(name, str) or "id" not in image:
            out.fault("image of COCO's JSON", f"image {number} lacks its id or file_name; complete or remove it")
            continue
        files[str(image["id"])] = name
        out.add(name, [])
    names: dict[str, Any] = {}
    for category in _mappings(content, "categories", out):
        names[str(category.get("id"))] = category.get("name")
    out.classes = [name for name in names.values() if isinstance(name, str)]
    lost: Counter[str] = Counter()
    unnamed: Counter[str] = Counter()
    for annotation in _mappings(content, "annotations", out):
        if (file := files.get(str(annotation.get("image_id")))) is None:
            lost[str(annotation.get("image_id"))] += 1
            continue
        segments = annotation.get("segments_info")
        for part in segments if isinstance(segments, list) else [annotation]:
            category = _category(part)
            if not names and isinstance(category, int):
                out.entries[file].append(category)
            elif isinstance(names.get(str(category)), str):
                out.entries[file].append(names[str(category)])
            else:
                unnamed[str(category)] += 1
    for kind, where, counts in (("image_id", "images", lost), ("category_id", "categories", unnamed)):
        for value, count in counts.items():
            text = f"{kind} {value:.80} of {count} annotations is not among its {where}; add it there, or remove them"
            out.fault(f"{kind} of COCO's JSON", text)


def _category(part: object) -> Any:
    return dict(part).get("category_id") if isinstance(part, dict | Pairs) else None


def _mappings(content: dict[str, Any], key: str, out: Annotations) -> Iterator[dict[str, Any]]:
    value = content.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, Pairs) for item in value):
        out.fault("tag file", f"its {key} must be a list of mappings, as in COCO's JSON")
        return
    yield from map(dict, value)


# Label Studio


def _read_label_studio(tasks: Sequence[dict[str, Any]], photos: Photos, out: Annotations) -> None:
    """Read Label Studio's JSON: choices, and the labels of regions. A task without an annotation has no entry."""
    out.kind = "Label Studio JSON"
    several = predicted = 0
    for number, task in enumerate(tasks, 1):
        data = dict(task["data"]) if isinstance(task.get("data"), Pairs) else {}
        reference = _photo_of(data, task, photos)
        if reference is None:
            out.fault("task without a photo", f"task {task.get('id', number)} names no photo in its data; remove it")
            continue
        found = task.get("annotations", task.get("completions"))
        annotations = [dict(item) for item in found if isinstance(item, Pairs)] if isinstance(found, list) else []
        finished = [item for item in annotations if not item.get("was_cancelled")]
        several += len(finished) > 1
        predicted += not finished and bool(task.get("predictions"))
        if finished:
            out.add(reference, [tag for item in finished for tag in _labels(item.get("result"))])
    if several:
        out.remarks.append(f"{several} photos were annotated more than once; their labels are joined")
    if predicted:
        out.remarks.append(f"{predicted} photos have only predictions of a model, which are not read")


def _photo_of(data: Mapping[str, Any], task: Mapping[str, Any], photos: Photos) -> str | None:
    texts = [item for item in data.values() if isinstance(item, str)]
    named = [item for item in texts if _is_photo(item, photos)]
    named += [data[key] for key in data if titles_photos(key) and data[key] in texts]
    upload = task.get("file_upload")
    return named[0] if named else upload if isinstance(upload, str) and upload else None


def _labels(result: Any) -> Iterator[Any]:
    for region in result if isinstance(result, list) else ():
        value = dict(region).get("value") if isinstance(region, Pairs) else None
        for key, item in value if isinstance(value, Pairs) else ():
            if key == "taxonomy" and isinstance(item, list):  # paths from the root; the leaf is the class
                yield from (path[-1] for path in item if isinstance(path, list) and path)
            elif (key == "choices" or key.endswith("labels")) and isinstance(item, list):
                yield from item
