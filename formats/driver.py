"""What a file-format driver is: the table of calls that every format answers.

After the file-format drivers of the Linux loop device's origin: open and close, where the guest's bytes are,
read, write, write zeroes, discard, flush, size. A driver is one layer: it knows its own files and says what
it does not hold; the chain of layers is put together above it. Reading is not in the table, for it is the
same for every format: follow the extents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from imgloop.formats.errors import CorruptError, OpenError, ReadOnlyError, Where
from imgloop.formats.source import Source

if TYPE_CHECKING:
    from imgloop.formats.extents import Extents

SECTOR = 512  # bytes: the unit of every size that a guest sees

Purpose = Literal["info", "read", "check"]
OpenFile = Callable[[str], Source]


@dataclass(frozen=True, slots=True)
class Backing:
    """The backing file that a layer names: its `name` as stored, and its `format` where one is recorded."""

    name: str
    format: str | None


class Driver(ABC):
    """One layer of an image, open for reading."""

    format: ClassVar[str]
    source: Source  # the file of the image itself
    files: tuple[Source, ...]  # what the `file` of this driver's extents counts
    size: int  # virtual size (bytes), a multiple of SECTOR
    cluster_size: int | None = None  # bytes; None where the format has no clusters
    pieces: int = 1  # in which a cluster may be mapped apart
    status_span: int | None = None  # bytes: QEMU's block status never reaches past a multiple of it
    backing: Backing | None = None
    warnings: tuple[str, ...] = ()  # what QEMU warns of when it opens such an image

    @abstractmethod
    def extents(self, start: int, length: int, *, holes: bool = False) -> Extents:
        """The extents of guest range [start, start + length), within `size`; at least the first of them.

        A table covers the range from `start` on but may end early, after some thousands of extents: ask
        again from where it ends. With `holes` the file system is asked where the host file has no blocks: such
        ranges are ZERO (raw) or HOLE.
        """

    def decode(self, offset: int, stored: int) -> bytes:
        """The cluster that a COMPRESSED extent stands for (`cluster_size` bytes).

        Raises CorruptError where the stream is damaged.
        """
        raise ValueError(f"{self.format} has no compressed extents")

    def explain_invalid(self, start: int) -> CorruptError:
        """Why the extent at guest offset `start` is INVALID."""
        raise ValueError(f"{self.format} has no invalid extents")

    def snapshot(self, id: str | None = None, name: str | None = None) -> Driver:
        """The layer as it was at the internal snapshot of that id, that name, or both.

        Raises OpenError where there is none. The view shares its files with this driver.
        """
        raise OpenError(f"Failed to load snapshot: {self.format} has no internal snapshots")

    def dirty_bitmaps(self) -> list[tuple[bytes, int]] | None:
        """The usable persistent dirty bitmaps: name and granularity (bytes). None where there can be none."""
        return None

    def info(self) -> dict[str, Any]:
        """What `qemu-img info` says of this format beyond size and names, under its keys."""
        return {}

    def write(self, *_: object) -> NoReturn:
        """Refuse: the format is read-only here."""
        raise ReadOnlyError(f"Images in {self.format} format are read-only", Where(self.source.name))

    pwrite = write_zeroes = discard = flush = write

    def close(self) -> None:
        """Close the files of this layer."""
        for file in self.files:
            file.close()
