"""What an extent can be. Apart from `extents`, which needs numpy: opening an image does not."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What the guest finds in an extent."""

    UNALLOCATED = 0  # not in this layer: the backing file's bytes, or zeros without one
    ZERO = 1  # zeros, whatever a backing file says; an offset means that space is kept for it
    DATA = 2  # the bytes of the file at `offset`
    COMPRESSED = 3  # a compressed stream in the file at `offset`
    ENCRYPTED = 4  # encrypted bytes of the file at `offset`
    INVALID = 5  # the entry is damaged: these bytes cannot be read truthfully
    HOLE = 6  # DATA for the format, but a hole of the file at `offset`: zeros
