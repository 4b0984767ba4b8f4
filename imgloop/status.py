"""Block status: what QEMU says of a guest range before it reads any of it.

The flags and how far each answer reaches are those of bdrv_block_status_above: `compare --strict` compares
them, and messages count from where an answer begins.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.extents import Extents, Kind, coalesce, cut, end_of
from imgloop.image import Image

DATA, ZERO, OFFSET_VALID, ALLOCATED, EOF = 0x01, 0x02, 0x04, 0x10, 0x20
_FLAGS = np.zeros(len(Kind), dtype=np.uint8)
_FLAGS[Kind.UNALLOCATED] = ZERO
_FLAGS[Kind.ZERO] = ZERO | ALLOCATED
_FLAGS[Kind.DATA] = _FLAGS[Kind.COMPRESSED] = _FLAGS[Kind.ENCRYPTED] = DATA | ALLOCATED
_FLAGS[Kind.HOLE] = DATA | ZERO | ALLOCATED


def spans(image: Image) -> NDArray[np.int64]:
    """By depth: no answer from that layer reaches past a multiple of so many bytes."""
    sizes = [layer.driver.status_span or 1 << 62 for layer in image.layers]
    return np.minimum.accumulate(np.array(sizes, dtype=np.int64))


def statuses(image: Image, start: int = 0) -> Iterator[tuple[Extents, NDArray[np.uint8]]]:
    """The extents from guest offset `start` on (bytes), holes of host files included, each with its flags.

    Neighbours that continue each other are one extent, but for the last answer: one that reaches the end of
    the image says so, and so begins where QEMU would ask for it.
    """
    sizes = np.array([layer.driver.size for layer in image.layers], dtype=np.int64)
    for table in _joined(image, start):
        kind = table["kind"]
        flags = _FLAGS[kind]
        flags |= np.where((table["offset"] >= 0) & (kind != Kind.COMPRESSED), OFFSET_VALID, 0).astype(np.uint8)
        # what lies past the end of a short layer counts as zeros of that layer
        unanswered = kind == Kind.UNALLOCATED
        flags |= np.where(unanswered & (table["depth"] < len(sizes) - 1), ALLOCATED, 0).astype(np.uint8)
        ends = table["start"] + table["length"]
        # the end of the lowest layer shows through where that has nothing to say
        last = (ends == image.size) | (unanswered & (ends == sizes[table["depth"]]))
        flags |= np.where(last, EOF, 0).astype(np.uint8)
        yield table, flags


def _joined(image: Image, start: int) -> Iterator[Extents]:
    """Tables in which no extent goes on in the next one, and the last extent begins at a multiple of its span."""
    pending: Extents | None = None
    for table in image.iter_extents(start, image.size - start, holes=True):
        table = coalesce(table if pending is None else np.concatenate((pending, table)))
        pending = table[-1:]
        if len(table) > 1:
            yield table[:-1]
    if pending is not None:
        yield _split_end(image, pending)


def _split_end(image: Image, last: Extents) -> Extents:
    span = int(spans(image)[last["depth"][0]])
    start, end = int(last["start"][0]), end_of(last)
    at = (end - 1) // span * span
    if at <= start or last["kind"][0] == Kind.COMPRESSED:
        return last
    return cut(last, np.array([start, at]), end)[0]
