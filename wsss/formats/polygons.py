"""Outlines of a mask as polygons along the edges of its pixels, with holes connected to the outline."""

import bisect
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

Point = tuple[int, int]  # x, y
_RIGHT, _DOWN, _LEFT, _UP = range(4)
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def polygons(mask: NDArray[np.bool_]) -> list[list[int]]:
    """One polygon [x1, y1, x2, y2, ...] for each 4-connected component of a mask.

    The coordinates are those of pixel corners: pixel (row, column) is the square from (column, row) to
    (column + 1, row + 1).
    """
    _, parts, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    result = []
    for number, (left, top, width, height, _) in enumerate(boxes):
        if number:
            part = parts[top : top + height, left : left + width] == number
            result.append([value for x, y in _merged(part) for value in (x + int(left), y + int(top))])
    return result


def _merged(part: NDArray[np.bool_]) -> list[Point]:
    """The outline of a component and its holes as one loop.

    A horizontal cut connects the leftmost corner of each hole with the next vertical edge on its left. Holes are
    inserted from left to right, so this edge belongs to the loop already. The loop is a linked list, so that the time
    does not grow with the product of the numbers of holes and corners.
    """
    outline, *holes = sorted(_loops(part), key=min)  # only the outline touches the left side
    points: list[Point] = []
    following: list[int] = []
    pieces: dict[
        int, list[int]
    ] = {}  # of each vertical edge, by its start: starts of the parts that cuts divide it into
    edges: list[list[tuple[int, int]]] = [
        [] for _ in range(part.shape[0] + 1)
    ]  # (x, start) of those that meet a line y
    firsts = []
    for loop in (outline, *holes):
        first = len(points)
        firsts.append(first)
        points.extend(loop)
        following.extend(range(first + 1, first + len(loop)))
        following.append(first)
        for start, ((x1, y1), (x2, y2)) in enumerate(zip(loop, [*loop[1:], loop[0]], strict=True), first):
            if x1 == x2:
                pieces[start] = [start]
                for y in range(min(y1, y2), max(y1, y2) + 1):
                    edges[y].append((x1, start))
    for line in edges:
        line.sort()
    for first, loop in zip(firsts[1:], holes, strict=True):
        x, y = corner = min(loop)
        left, edge = edges[y][bisect.bisect_left(edges[y], (x, -1)) - 1]
        piece = next(start for start in pieces[edge] if _meets(points[start], points[following[start]], y))
        number, end = first + loop.index(corner), len(points)
        before = first + (loop.index(corner) - 1) % len(loop)
        points += [(left, y), corner, (left, y)]  # the start of the cut, its end, and its start again on the way back
        following += [number, end + 2, following[piece]]
        following[piece], following[before] = end, end + 1
        pieces[edge].append(end + 2)
    merged, at = [points[0]], following[0]
    while at != 0:
        merged.append(points[at])
        at = following[at]
    return merged


def _meets(start: Point, end: Point, y: int) -> bool:
    return min(start[1], end[1]) <= y <= max(start[1], end[1])


def _loops(part: NDArray[np.bool_]) -> Iterator[list[Point]]:
    """Yield the corners of the closed loops of pixel edges between the component and other pixels.

    The component lies on the right of each edge. Where two of its pixels touch only at a corner, a loop turns right, so
    that it stays with the pixel that it came along.
    """
    padded = np.pad(part, 1)
    inside, above, before = padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]
    starts = {
        _RIGHT: (inside & ~above, (0, 0)),
        _LEFT: (~inside & above, (1, 0)),
        _UP: (inside & ~before, (0, 1)),
        _DOWN: (~inside & before, (0, 0)),
    }
    directions: dict[Point, list[int]] = {}  # of the edges that start at a point
    for direction, (edges, (dx, dy)) in starts.items():
        ys, xs = np.nonzero(edges)
        for point in zip((xs + dx).tolist(), (ys + dy).tolist(), strict=True):
            directions.setdefault(point, []).append(direction)
    remaining = {(point, direction): None for point, options in directions.items() for direction in options}
    for first in list(remaining):
        if first not in remaining:
            continue
        edge = first
        loop: list[Point] = []
        while True:
            del remaining[edge]
            (x, y), direction = edge
            point = x + _STEPS[direction][0], y + _STEPS[direction][1]
            right = (direction + 1) % 4
            turn = right if right in directions[point] else directions[point][0]
            if turn != direction:
                loop.append(point)
            edge = point, turn
            if edge == first:
                break
        yield loop
