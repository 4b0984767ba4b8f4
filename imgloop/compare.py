"""What `qemu-img compare` says of two images: the same bytes for a guest, or where they first differ.

Ranges that both call zero are not read, nor are those that both map to the same bytes of the same file; all
others are read in blocks, by threads. Where a block is not equal, or not readable, QEMU's own procedure is
followed step by step from there: it decides what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.driver import SECTOR
from imgloop.formats.errors import ImageError
from imgloop.formats.extents import Extents, Kind, cut, end_of
from imgloop.image import Image
from imgloop.parallel import BUFFERS, in_order
from imgloop.status import ZERO, spans, statuses

BLOCK = 1 << 20  # bytes that a thread reads of each image at a time
CHUNK = 1 << 21  # bytes that QEMU compares at a time
Progress = Callable[[int], None]


class StatusError(ImageError):
    """What an image maps at some place cannot be told."""


class CompareReadError(ImageError):
    """A range that has to be compared cannot be read."""


Cause = Literal["data", "allocation", "length"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A guest range [start, start + length) (bytes) in which the images differ.

    `data`: its bytes do; `allocation`: its bytes are equal, but one image holds them and the other calls them
    zeros; `length`: only one image reaches there.
    """

    start: int
    length: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Verdict:
    """The lines that qemu-img prints, and whether the images are the same."""

    lines: tuple[str, ...]
    identical: bool


@dataclass(frozen=True, slots=True)
class _Window:
    """A guest range in pieces of which both images say one thing; `end` is where the last one ends."""

    starts: NDArray[np.int64]
    end: int
    a: Extents
    b: Extents
    a_flags: NDArray[np.uint8]
    b_flags: NDArray[np.uint8]

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each piece ends."""
        return np.append(self.starts[1:], self.end)

    def head(self, count: int) -> _Window:
        """The first `count` pieces."""
        end = int(self.starts[count]) if count < len(self.starts) else self.end
        return _Window(
            self.starts[:count], end, self.a[:count], self.b[:count], self.a_flags[:count], self.b_flags[:count]
        )


@dataclass(frozen=True, slots=True)
class _Block:
    """[first, end) of the guest to read: of both images, or of the one that does not call it zero."""

    first: int
    end: int
    a: bool
    b: bool


class _Pair:
    """Two images side by side."""

    def __init__(self, a: Image, b: Image, threads: int) -> None:
        self.a, self.b, self.threads = a, b, threads
        self.common = min(a.size, b.size)
        self.total = max(a.size, b.size)
        self.longer = a if a.size > b.size else b
        self._identity = [np.array([_number(a, b, file) for file in image.files]) for image in (a, b)]
        self._spans = (spans(a), spans(b))

    # --- what is to be read ---

    def windows(self) -> Iterator[_Window]:
        """The range that both have, window by window."""
        left, right = statuses(self.a), statuses(self.b)
        position = 0
        reach_a = reach_b = 0
        while position < self.common:
            if reach_a <= position:
                a, a_flags = next(left)
                reach_a = end_of(a)
            if reach_b <= position:
                b, b_flags = next(right)
                reach_b = end_of(b)
            end = min(reach_a, reach_b, self.common)
            starts = np.union1d(a["start"], b["start"])
            starts = np.union1d(starts[(starts > position) & (starts < end)], [position])
            a_rows, at_a = cut(a, starts, end)
            b_rows, at_b = cut(b, starts, end)
            yield _Window(starts, end, a_rows, b_rows, a_flags[at_a], b_flags[at_b])
            position = end

    def tail(self) -> Iterator[_Window]:
        """What only the longer image has, as if the other one were zeros there."""
        if self.common == self.total:
            return
        for rows, flags in statuses(self.longer, self.common):
            nothing = np.zeros(len(rows), dtype=rows.dtype)
            zero = np.full(len(rows), ZERO, dtype=np.uint8)
            end = end_of(rows)
            if self.longer is self.a:
                yield _Window(rows["start"], end, rows, nothing, flags, zero)
            else:
                yield _Window(rows["start"], end, nothing, rows, zero, flags)

    def blocks(self, window: _Window) -> Iterator[_Block]:
        """The parts of a window that have to be read, in order."""
        a, b = (window.a_flags & ZERO) == 0, (window.b_flags & ZERO) == 0
        same = a & b & (window.a["kind"] == window.b["kind"]) & (window.a["offset"] == window.b["offset"])
        same &= self._identity[0][window.a["file"]] == self._identity[1][window.b["file"]]
        compressed = window.a["kind"] == Kind.COMPRESSED
        if compressed.any():
            same &= ~compressed | self._same_stream(window)
        a, b = a & ~same, b & ~same
        turns = (a[1:] != a[:-1]) | (b[1:] != b[:-1]) | (window.starts[1:] % SECTOR != 0)
        firsts = np.flatnonzero(np.concatenate(([True], turns)))
        starts = window.starts[firsts].tolist()
        for start, end, in_a, in_b in zip(
            starts, [*starts[1:], window.end], a[firsts].tolist(), b[firsts].tolist(), strict=True
        ):
            if in_a or in_b:
                while start < end:
                    stop = min(end, start // BLOCK * BLOCK + BLOCK)
                    yield _Block(start, stop, in_a, in_b)
                    start = stop

    def _same_stream(self, window: _Window) -> NDArray[np.bool_]:
        """Whether compressed extents are the same part of what the same decoder makes of the same stream."""
        a, b = window.a, window.b
        size_a = np.array([layer.driver.cluster_size or 1 for layer in self.a.layers])[a["depth"]]
        size_b = np.array([layer.driver.cluster_size or 1 for layer in self.b.layers])[b["depth"]]
        same: NDArray[np.bool_] = (size_a == size_b) & (a["stored"] == b["stored"])
        return same

    # --- reading ---

    def differs(self, block: _Block) -> bool:
        """Whether a block has to be looked at closely: its bytes differ, or cannot be read."""
        try:
            one, other = self._read(block)
        except ImageError:
            return True
        if len(one) % 8 == 0:  # words go faster than bytes
            return not np.array_equal(one.view(np.uint64), other.view(np.uint64))
        return not np.array_equal(one, other)

    def sectors(self, block: _Block) -> Iterator[Difference]:
        """The sectors of a block (counted from the start of the guest) that differ, as ranges."""
        try:
            one, other = self._read(block)
        except ImageError:
            self._judge_chunk(block.first, block.end, block.a, block.b)  # says where
            raise
        places = np.flatnonzero(one != other)
        if not len(places):
            return
        numbers = np.unique((places + block.first) // SECTOR)
        firsts = np.flatnonzero(np.concatenate(([True], np.diff(numbers) != 1)))
        for first, last in zip(numbers[firsts].tolist(), [*(firsts[1:] - 1).tolist(), -1], strict=True):
            start = max(first * SECTOR, block.first)
            yield Difference(start, min(int(numbers[last] + 1) * SECTOR, block.end) - start, "data")

    def _read(self, block: _Block) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        length = block.end - block.first
        views = []
        for image, wanted, name in ((self.a, block.a, "a"), (self.b, block.b, "b")):
            view = BUFFERS.get(name if wanted else "zero", BLOCK)[:length]
            if wanted:
                image.readinto(view, block.first, once=True)
            views.append(np.frombuffer(view, np.uint8))
        return views[0], views[1]

    # --- the referee ---

    def judge(self, window: _Window, block: _Block) -> str | None:
        """What QEMU says of a block, which `differs` was suspicious of; None: it finds no fault."""
        at = int(np.searchsorted(window.starts, block.first, side="right")) - 1
        chunk, ends = int(window.starts[at]), window.ends
        while chunk < block.end:
            span_a = int(self._spans[0][window.a["depth"][at]])
            span_b = int(self._spans[1][window.b["depth"][at]])
            end = min(int(ends[at]), chunk + CHUNK, (chunk // span_a + 1) * span_a, (chunk // span_b + 1) * span_b)
            if end > block.first:
                found = self._judge_chunk(chunk, end, block.a, block.b)
                if found is not None:
                    return f"Content mismatch at offset {found}!"
            chunk = end
            if chunk == ends[at]:
                at += 1
        return None

    def _judge_chunk(self, start: int, end: int, a: bool, b: bool) -> int | None:
        """The offset of the first sector of a chunk, counted from its start, that differs."""
        data = []
        for image, wanted in ((self.a, a), (self.b, b)):
            buffer = np.zeros(end - start, dtype=np.uint8)
            if wanted:
                try:
                    image.readinto(memoryview(buffer.data), start, once=True)
                except ImageError as error:
                    raise _unreadable(error, image, start) from error
            data.append(buffer)
        places = np.flatnonzero(data[0] != data[1])
        return start + int(places[0]) // SECTOR * SECTOR if len(places) else None


def _number(a: Image, b: Image, file: object) -> int:
    """The same number for two names of one file."""
    identities = list(dict.fromkeys(one.identity for one in (*a.files, *b.files)))
    return identities.index(file.identity)  # type: ignore[attr-defined]  # a Source


def _unreadable(error: ImageError, image: Image, offset: int) -> CompareReadError:
    reason = "Input/output error"
    return CompareReadError(f"Error while reading offset {offset} of {image.name}: {reason}", error.where)


def _unmapped(image: Image, start: int, depth: int) -> StatusError:
    return StatusError(f"Sector allocation test failed for {image.name}", image.explain(start, depth).where)


def _up_to_damage(pair: _Pair, window: _Window) -> tuple[_Window, StatusError | None]:
    """A window up to the first entry that cannot be understood, and what is said of that."""
    bad_a, bad_b = window.a["kind"] == Kind.INVALID, window.b["kind"] == Kind.INVALID
    bad = np.flatnonzero(bad_a | bad_b)
    if not len(bad):
        return window, None
    first = int(bad[0])
    image, rows = (pair.a, window.a) if bad_a[first] else (pair.b, window.b)
    return window.head(first), _unmapped(image, int(rows["start"][first]), int(rows["depth"][first]))


def compare(
    a: Image, b: Image, *, strict: bool = False, progress: Progress = lambda _: None, threads: int = 2
) -> Verdict:
    """Compare as `qemu-img compare` does; with `strict`, sizes and block statuses too.

    Raises StatusError and CompareReadError where an image cannot be mapped or read.
    """
    pair = _Pair(a, b, threads)
    if strict and a.size != b.size:
        return Verdict(("Strict mode: Image size mismatch!",), False)
    found = _first_difference(pair, pair.windows(), progress, strict=strict)
    if found:
        return Verdict((found,), False)
    lines: tuple[str, ...] = ()
    if a.size != b.size:
        lines = ("Warning: Image size mismatch!",)
        found = _first_difference(pair, pair.tail(), progress)
        if found:
            return Verdict((*lines, found), False)
    return Verdict((*lines, "Images are identical."), True)


def _first_difference(
    pair: _Pair, windows: Iterator[_Window], progress: Progress, *, strict: bool = False
) -> str | None:
    """What QEMU says of the first difference; `progress` is told of all bytes up to there."""
    ending: str | StatusError | None = None
    position = reach = -1

    def works() -> Iterator[tuple[_Window, _Block]]:
        nonlocal ending, position, reach
        for whole in windows:
            window, ending = _up_to_end(pair, whole, strict=strict)
            position = int(whole.starts[0]) if position < 0 else position
            reach = window.end
            for block in pair.blocks(window) if len(window.starts) else ():
                yield window, block
            if ending:
                return

    with closing(in_order(lambda work: pair.differs(work[1]), works(), pair.threads)) as results:
        for (window, block), differs in results:
            if differs and (found := pair.judge(window, block)):
                return found
            progress(block.end - position)
            position = block.end
    if isinstance(ending, StatusError):
        raise ending
    if ending is None:
        progress(max(reach - position, 0))
    return ending


def _up_to_end(pair: _Pair, window: _Window, *, strict: bool) -> tuple[_Window, str | StatusError | None]:
    """A window up to where QEMU goes no further, and what it says there."""
    window, damage = _up_to_damage(pair, window)
    unlike = np.flatnonzero(window.a_flags != window.b_flags) if strict else np.empty(0, dtype=np.intp)
    if not len(unlike):
        return window, damage
    place = int(window.starts[unlike[0]])
    return window.head(int(unlike[0])), f"Strict mode: Offset {place} block status mismatch!"


def differences(
    a: Image, b: Image, *, progress: Progress = lambda _: None, threads: int = 2
) -> Iterator[Difference]:
    """Every range in which two images differ, in order and without overlaps; raises as `compare`.

    Of what only the longer image has, the parts that hold anything but zeros are `data`, the rest is `length`.
    """
    pair = _Pair(a, b, threads)
    yield from _merged(_all_differences(pair, pair.windows(), progress, "allocation"))
    yield from _merged(_all_differences(pair, pair.tail(), progress, "length"))


def _all_differences(
    pair: _Pair, windows: Iterator[_Window], progress: Progress, otherwise: Cause
) -> Iterator[Difference]:
    """The data that differs, and between it what differs in no more than `otherwise`."""
    for whole in windows:
        window, damage = _up_to_damage(pair, whole)
        position = int(whole.starts[0])
        quiet = _unlike(window, otherwise)
        for _, found in in_order(lambda block: list(pair.sectors(block)), pair.blocks(window), pair.threads):
            for one in found:
                yield from _between(quiet, position, one.start, otherwise)
                yield one
                position = one.start + one.length
        yield from _between(quiet, position, window.end, otherwise)
        progress(window.end - int(whole.starts[0]))
        if damage:
            raise damage


def _unlike(window: _Window, cause: Cause) -> NDArray[np.int64]:
    """The ranges [start, end) of a window that differ in no more than allocation, or all of them in length."""
    unlike = np.ones(len(window.starts), dtype=np.bool_)
    if cause == "allocation":
        unlike = ((window.a_flags ^ window.b_flags) & ZERO) != 0
    return np.stack((window.starts[unlike], window.ends[unlike]), axis=1)


def _between(ranges: NDArray[np.int64], start: int, end: int, cause: Cause) -> Iterator[Difference]:
    """The parts of `ranges` within [start, end)."""
    for first, last in ranges[(ranges[:, 1] > start) & (ranges[:, 0] < end)].tolist():
        low = max(first, start)
        yield Difference(low, min(last, end) - low, cause)


def _merged(found: Iterator[Difference]) -> Iterator[Difference]:
    """Neighbours of one cause as one."""
    pending: Difference | None = None
    for one in found:
        if pending and pending.cause == one.cause and pending.start + pending.length == one.start:
            pending = Difference(pending.start, pending.length + one.length, one.cause)
            continue
        if pending:
            yield pending
        pending = one
    if pending:
        yield pending
