"""Raw images: the file's bytes are the guest's, rounded up to a whole sector."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from imgloop.formats.driver import SECTOR, Driver
from imgloop.formats.errors import OpenError
from imgloop.formats.source import Source

if TYPE_CHECKING:
    from imgloop.formats.extents import Extents

BATCH = 1 << 15  # host ranges per answer


class Raw(Driver):
    """A raw image, or the part of one from `offset` on, `size` bytes long (both in bytes).

    Opening raises OpenError where offset and size reach past the end of the file.
    """

    format = "raw"

    def __init__(self, source: Source, *, offset: int = 0, size: int | None = None) -> None:
        self.source = source
        self.files = (source,)
        self.offset = offset
        length = source.size
        rounded = -(-length // SECTOR) * SECTOR
        if offset > rounded:
            raise OpenError(f"Offset ({offset}) cannot be greater than size of the containing file ({rounded})")
        if size is not None and offset + size > rounded:
            raise OpenError(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
                f"actual size of the containing file ({rounded})"
            )
        if size is not None and size % SECTOR:
            raise OpenError(f"Specified size is not multiple of {SECTOR}")
        self.size = rounded - offset if size is None else size

    def extents(self, start: int, length: int, *, holes: bool = False) -> Extents:
        """The extents of [start, start + length); see `Driver.extents`."""
        from imgloop.formats.extents import Kind, extent

        if not holes:
            return extent(start, length, Kind.DATA, start + self.offset)
        return host_extents(self.source, start + self.offset, length, start)


def host_extents(source: Source, offset: int, length: int, start: int) -> Extents:
    """The holes (ZERO) and data of a host file from `offset` on (bytes), as extents from guest offset `start` on.

    What lies past the end of the file is ZERO. May cover less than `length` bytes.
    """
    import numpy as np

    from imgloop.formats.extents import EXTENT, Kind

    found = list(islice(source.data_ranges(offset, offset + length), BATCH))
    end = offset + length if len(found) < BATCH else found[-1][1]
    ranges = np.array(found, dtype=np.int64).reshape(-1, 2)
    # data from cuts[1] to cuts[2], from cuts[3] to cuts[4], ...; holes between
    cuts = np.concatenate(([offset], ranges.ravel(), [end]))
    table = np.zeros(len(cuts) - 1, dtype=EXTENT)
    table["offset"] = cuts[:-1]
    table["start"] = cuts[:-1] - offset + start
    table["length"] = np.diff(cuts)
    table["kind"] = np.where(np.arange(len(table)) % 2, Kind.DATA, Kind.ZERO)
    return table[table["length"] > 0]
