"""What `qemu-img convert -O raw` does: the guest's bytes into a file, zeros as holes, in blocks shared by threads.

Where the file system shares extents between files, plain data is shared and not read at all. Elsewhere it is
read, because zeros in it are to become holes too; each thread reads, decodes, looks for zeros and writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.errors import CorruptError, ImageError, ReadError, Where
from imgloop.formats.extents import Extents, Kind, end_of
from imgloop.image import Image
from imgloop.output import share, write_at, zero_range
from imgloop.parallel import BUFFERS, in_order

BLOCK = 1 << 20  # bytes that a thread takes at a time, at least a cluster
GRAIN = 4096  # bytes: the smallest hole that a file system makes, and qemu-img's default for -S
SECTOR = 512
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Lost:
    """A range of the target (bytes) that could not be read and was filled with zeros, and why."""

    start: int
    length: int
    reason: str


@dataclass(frozen=True, slots=True)
class Target:
    """What is written to, and how.

    `clean`: it reads as zeros already, so that zeros need not be written. `sparse`: the fewest bytes of zeros
    in data that become a hole; 0 writes all zeros out.
    """

    fd: int
    clean: bool = True
    sparse: int = GRAIN
    offload: bool = True
    salvage: bool = False
    threads: int = 2


@dataclass(frozen=True, slots=True)
class _Block:
    """Guest range [first, end): to be read, or known to hold nothing but zeros."""

    first: int
    end: int
    zero: bool = False


def convert(images: list[Image], target: Target, *, progress: Progress = lambda _: None) -> list[Lost]:
    """Write the images one behind the other from offset 0 of the target on; what was lost, with `salvage`.

    Without it, what cannot be read is a CorruptError or ReadError. An OSError is the target's.
    """
    lost: list[Lost] = []
    base = 0
    for image in images:
        one = _Conversion(image, target, base)
        lost += one.run(progress)
        base += image.size
    return _merged(lost)


class _Conversion:
    """One image on its way to `base` of the target."""

    def __init__(self, image: Image, target: Target, base: int) -> None:
        self.image, self.target, self.base = image, target, base
        self.block = max(BLOCK, *(layer.driver.cluster_size or 0 for layer in image.layers))
        self.sharing = target.offload and target.sparse == GRAIN
        self.unmapped: list[Lost] = []

    def run(self, progress: Progress) -> list[Lost]:
        """Do it; what was lost, in order."""
        lost: list[Lost] = []
        position = 0
        with closing(in_order(self.write, self.blocks(), self.target.threads)) as done:
            for block, missing in done:
                lost += missing
                if block.end > position:  # zeros come behind the data of their table
                    progress(block.end - position)
                    position = block.end
        progress(self.image.size - position)
        return sorted(lost + self.unmapped, key=lambda one: one.start)

    def blocks(self) -> Iterator[_Block]:
        """What has to be read or zeroed, in order; plain data that can be shared is shared on the way."""
        for table in self.image.iter_extents(holes=True):
            kind = table["kind"]
            self._note_unmapped(table[kind == Kind.INVALID])
            zero = np.isin(kind, (Kind.UNALLOCATED, Kind.ZERO, Kind.HOLE))
            invalid = kind == Kind.INVALID
            shared = self._share(table)
            read = ~shared & ~invalid
            yield from self._data_blocks(table, read if self.target.sparse == 0 else read & ~zero)
            if not self.target.clean:
                firsts, ends = _joined(table, zero | invalid if self.target.sparse else invalid)
                yield from map(_zeros, firsts.tolist(), ends.tolist())

    def _data_blocks(self, table: Extents, wanted: NDArray[np.bool_]) -> Iterator[_Block]:
        """The wanted extents in blocks to read; all else in a table may be read with them where it is zeros."""
        if not wanted.any():
            return
        firsts, ends = _joined(table, wanted)
        numbers = firsts // self.block
        counts = (ends - 1) // self.block - numbers + 1
        windows = np.repeat(numbers - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        lows = np.maximum(np.repeat(firsts, counts), windows * self.block)
        highs = np.minimum(np.repeat(ends, counts), (windows + 1) * self.block)
        # many small ranges of one block are one piece of work: the zeros between them are found again
        joined = self.target.clean and self.target.sparse == GRAIN and not self.sharing
        heads = np.flatnonzero(np.diff(windows, prepend=-1)) if joined else np.arange(len(windows))
        tails = np.append(heads[1:], len(windows)) - 1
        for low, high in zip(lows[heads].tolist(), highs[tails].tolist(), strict=True):
            yield _Block(low, high)

    def _note_unmapped(self, damaged: Extents) -> None:
        """Damaged entries: the end, or with `salvage` a loss."""
        for row in damaged:
            start = int(row["start"])
            error = self.image.explain(start, int(row["depth"]))
            if not self.target.salvage:
                message = f"error while reading block status at offset {self.base + start}: {_reason(error)}"
                raise CorruptError(message, error.where)
            self.unmapped.append(Lost(self.base + start, int(row["length"]), str(error)))

    # --- within the kernel ---

    def _share(self, table: Extents) -> NDArray[np.bool_]:
        """Which extents of plain data the target now shares with their file."""
        done = np.zeros(len(table), dtype=np.bool_)
        if not self.sharing:
            return done
        for row in np.flatnonzero(table["kind"] == Kind.DATA).tolist():
            start, length, offset, file = (int(table[row][name]) for name in ("start", "length", "offset", "file"))
            shared = share(self.image.files[file], offset, length, self.target.fd, self.base + start)
            if shared is None:  # this file system does not
                self.sharing = False
                break
            done[row] = shared
        return done

    # --- in a thread ---

    def write(self, block: _Block) -> list[Lost]:
        """Bring one block to the target; what of it could not be read."""
        at = self.base + block.first
        if block.zero:
            zero_range(self.target.fd, at, block.end - block.first)
            return []
        lead = at % GRAIN
        length = block.end - block.first
        whole = BUFFERS.get("block", self.block + 2 * GRAIN)[: -(-(lead + length) // GRAIN) * GRAIN]
        whole[:lead] = bytes(lead)
        whole[lead + length :] = bytes(len(whole) - lead - length)
        lost = self._read(whole[lead : lead + length], block.first)
        for first, end, zero in self._runs(whole):
            first, end = max(first, lead), min(end, lead + length)
            if not zero:
                write_at(self.target.fd, whole[first:end], at - lead + first)
            elif not self.target.clean:
                zero_range(self.target.fd, at - lead + first, end - first)
        return lost

    def _runs(self, data: memoryview) -> Iterator[tuple[int, int, bool]]:
        """Runs [first, end) of `data` that hold zeros, or not; zeros too few for a hole are not."""
        if self.target.sparse == 0:
            yield 0, len(data), False
            return
        words = np.frombuffer(data, np.uint64).reshape(-1, GRAIN // 8)
        zero = words[:, 0] == 0  # almost always enough to know that there is something
        maybe = np.flatnonzero(zero)
        zero[maybe] = ~words[maybe].any(axis=1)
        turns = np.flatnonzero(np.concatenate(([True], zero[1:] != zero[:-1])))
        if self.target.sparse > GRAIN and len(turns) > 2:
            lengths = np.diff(turns, append=len(zero)) * GRAIN
            short = zero[turns] & (lengths < self.target.sparse)
            short[0] = short[-1] = False  # it may go on in the next block
            zero[np.repeat(short, lengths // GRAIN)] = False
            turns = np.flatnonzero(np.concatenate(([True], zero[1:] != zero[:-1])))
        kinds = zero[turns].tolist()
        for (first, end), kind in zip(pairwise([*(turns * GRAIN).tolist(), len(data)]), kinds, strict=True):
            yield first, end, kind

    def _read(self, buffer: memoryview, position: int) -> list[Lost]:
        """Fill `buffer` from guest offset `position` on; with `salvage` zeros where that fails."""
        try:
            self.image.readinto(buffer, position, once=True)
        except ImageError:
            lost = _merged(list(self._salvage(buffer, position)))
            if self.target.salvage:
                return lost
            raise self._unreadable(lost[0].start) from None
        return []

    def _salvage(self, buffer: memoryview, position: int) -> Iterator[Lost]:
        """Read by halves what cannot be read as a whole, down to sectors; zeros for those that fail."""
        try:
            self.image.readinto(buffer, position, once=True)
        except ImageError as error:
            if len(buffer) <= SECTOR:
                buffer[:] = bytes(len(buffer))
                yield Lost(self.base + position, len(buffer), str(error))
                return
            half = max(len(buffer) // 2 // SECTOR, 1) * SECTOR
            yield from self._salvage(buffer[:half], position)
            yield from self._salvage(buffer[half:], position + half)

    def _unreadable(self, start: int) -> ImageError:
        """The error of the sector at `start` of the target, in QEMU's words."""
        try:
            self.image.readinto(bytearray(SECTOR), start - self.base, once=True)
        except ImageError as error:
            kind = CorruptError if isinstance(error, CorruptError) else ReadError
            return kind(f"error while reading at byte {start}: {_reason(error)}", error.where)
        return ReadError(
            f"error while reading at byte {start}: it changes while it is read", Where(self.image.name)
        )


def _joined(table: Extents, wanted: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the wanted extents of a table begin and end, neighbours joined."""
    turns = np.flatnonzero(np.concatenate(([True], wanted[1:] != wanted[:-1])))
    bounds = np.append(table["start"][turns], end_of(table))
    chosen = wanted[turns]
    return bounds[:-1][chosen], bounds[1:][chosen]


def _zeros(first: int, end: int) -> _Block:
    return _Block(first, end, zero=True)


def _reason(error: ImageError) -> str:
    return os.strerror(getattr(error, "errno", None) or errno.EIO)


def _merged(lost: list[Lost]) -> list[Lost]:
    """Neighbours lost for one reason as one."""
    result: list[Lost] = []
    for one in lost:
        if result and result[-1].reason == one.reason and result[-1].start + result[-1].length == one.start:
            result[-1] = Lost(result[-1].start, result[-1].length + one.length, one.reason)
        else:
            result.append(one)
    return result
