"""What a check says of an image: qemu-img's verdict, what it passes as clean, and who is concerned."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from functools import cached_property
from itertools import chain as joined
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Self

from imgloop.formats import PROBE_LENGTH, probe
from imgloop.formats.driver import Driver
from imgloop.formats.errors import FormatError, OpenError, ReadError
from imgloop.formats.findings import OWN_CODES, RULES, Event, Finding, Severity, worst
from imgloop.formats.source import Source
from imgloop.names import Node

if TYPE_CHECKING:
    from imgloop.formats.qcow2.bitmaps import Bitmap
    from imgloop.formats.qcow2.check import Check
    from imgloop.formats.qcow2.deep import Progress
    from imgloop.formats.qcow2.driver import Qcow2
    from imgloop.formats.qcow2.header import Extension, Header
    from imgloop.formats.qcow2.unseen import Unseen

Link = tuple[Driver, Node]  # of a backing chain: a layer, and what it was asked for as

UNSUPPORTED = "This image format does not support checks"
LIMIT = 1000  # findings that are looked up, unless more are asked for
STRICT: dict[Severity | None, int] = {"corruption": 2, "warning": 2, "leak": 3}
KEYS = (
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "corruptions",
    "leaks",
    "check-errors",
)


class CheckReport:
    """What a check found. The image's files must stay open while findings are read; `close` closes them.

    `chain` is the image and its backing files, from the top down.
    `refusal` is why QEMU does not open the image at all (None: it does), `failure` why its check ends early.
    """

    def __init__(self, name: str, chain: list[Link], refusal: OpenError | None = None) -> None:
        self.filename = name
        self.chain = chain
        self.refusal = refusal
        self._deep: list[Event] = []
        self._problems: list[Event] = []
        self._check: Check | None = None
        self._unseen: Unseen | None = None
        self._closing: list[Source] = []
        top = _qcow2(chain)
        if top is not None:
            data_size = top.files[1].size if len(top.files) > 1 else None
            self._look(top.source, top.header, top.extensions, top.bitmaps, data_size)

    def _look(
        self,
        source: Source,
        header: Header,
        extensions: list[Extension],
        bitmaps: list[Bitmap],
        data_size: int | None,
    ) -> None:
        from imgloop.formats.qcow2.check import Check
        from imgloop.formats.qcow2.unseen import Unseen

        self._check = Check(source, header, extensions, bitmaps)
        self._unseen = Unseen(self._check, data_size)

    def diagnose(self, source: Source) -> None:
        """Check what can still be read of a qcow2 file that QEMU refuses; the report closes it."""
        from imgloop.formats.qcow2.header import all_problems, read_extensions, read_header, walkable

        self._closing.append(source)
        header = read_header(source)
        refusal = self.refusal.message if self.refusal else ""
        self._problems = [
            Event("FIELD_INVALID", (str(problem),))
            for problem in all_problems(source, header)
            if not refusal.endswith(problem.message)
        ]
        if walkable(header):
            extensions, _ = read_extensions(source, header)
            self._look(source, header, extensions, _readable_bitmaps(source, header, extensions), None)

    def decode_all(self, progress: Progress | None = None) -> None:
        """Decode every compressed cluster as well, and add what fails to the findings.

        `progress` is called now and then with the clusters decoded and the clusters in all.
        """
        from imgloop.formats.qcow2.deep import decode_all

        top = _qcow2(self.chain)
        if top is not None and self._check is not None:
            self._deep = decode_all(self._check, top.decode, progress)
            self.__dict__.pop("counts", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of the chain."""
        for driver, _ in self.chain:
            driver.close()
        for source in self._closing:
            source.close()

    @property
    def format(self) -> str | None:
        """The image's format; None where it could not be opened."""
        return self.chain[0][0].format if self.chain else None

    @property
    def failure(self) -> str | None:
        """Why QEMU's check ends without a verdict; None where it does not."""
        return self._check.failure if self._check else None

    @property
    def inspected(self) -> Check | None:
        """The check of the qcow2 structures; None where there is nothing of the kind."""
        return self._check

    # --- qemu-img's verdict ---

    @property
    def exit_code(self) -> int:
        """The exit code of `qemu-img check`."""
        if self.refusal is not None:
            return 1
        if self._check is None:
            return 63
        if self._check.failure is not None or self._check.errors:
            return 1
        if self._check.corruptions:
            return 2
        return 3 if self._check.leaks else 0

    @property
    def strict_exit_code(self) -> int:
        """The same, but findings of our own count too: corruptions and warnings as corruptions."""
        if self.exit_code in (1, 2, 63):
            return self.exit_code
        return STRICT.get(worst(RULES[code] for code in self.counts), 0)

    def totals(self) -> dict[str, int]:
        """qemu-img's numbers, under the keys of its JSON (`KEYS`), 0 where it leaves one out."""
        return self._check.totals() if self._check else dict.fromkeys(KEYS, 0)

    def to_json(self) -> dict[str, Any]:
        """qemu-img's JSON: totals of 0 are left out, but for check-errors."""
        totals = {key: value for key, value in self.totals().items() if value or key == "check-errors"}
        return {**totals, "filename": self.filename, "format": self.format}

    def events(self) -> Iterator[Event]:
        """What qemu-img says on stderr, in its order."""
        return self._check.events() if self._check else iter(())

    # --- findings ---

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many findings of each code there are; qemu-img's and our own."""
        counts: Tally[str] = Tally(event.code for event in joined(self._around, self._deep))
        for source in (self._check, self._unseen):
            if source is not None:
                counts.update(source.counts)
        return {code: number for code, number in counts.items() if code not in ("HINT", "REFBLOCK_SIGNAL")}

    @cached_property
    def _around(self) -> list[Event]:
        """Findings about opening and about the chain."""
        found = [Event("UNREADABLE_IMAGE", (str(self.refusal),))] if self.refusal else []
        return found + self._problems + list(_chain_events(self.chain))

    def own_events(self) -> Iterator[Event]:
        """Findings of our own: what qemu-img does not say."""
        return joined(self._around, self._unseen.events() if self._unseen else (), self._deep)

    def findings(self, limit: int | None = LIMIT, *, own: bool = False) -> list[Finding]:
        """The first `limit` findings (None: all), each with its owners; our own come first (`own`: only those)."""
        said = (event for event in self.events() if event.code in self.counts)
        events = list(islice(joined(self.own_events(), () if own else said), limit))
        if self._check is None:
            return [
                Finding(
                    RULES[event.code], event.text, dict(zip(RULES[event.code].fields, event.values, strict=True))
                )
                for event in events
            ]
        from imgloop.formats.qcow2.owners import Owners

        return Owners(self._check).findings(events)

    def findings_json(self, limit: int | None = LIMIT) -> dict[str, Any]:
        """The totals, the counts by code, and the first `limit` findings, as plain data."""
        found = self.findings(limit)
        return self.to_json() | {
            "verdict": worst(RULES[code] for code in self.counts) or "clean",
            "counts": self.counts,
            "shown": len(found),
            "findings": [finding.to_json() for finding in found],
        }

    @property
    def own_counts(self) -> dict[str, int]:
        """`counts` of what qemu-img does not say."""
        return {code: number for code, number in self.counts.items() if code in OWN_CODES}


def _qcow2(chain: list[Link]) -> Qcow2 | None:
    """The driver of the image at the top, if it is one that can be checked."""
    from imgloop.formats.qcow2.driver import Qcow2

    top = chain[0][0] if chain else None
    return top if isinstance(top, Qcow2) else None


def _readable_bitmaps(source: Source, header: Header, extensions: list[Extension]) -> list[Bitmap]:
    """The bitmaps up to the first one that is damaged."""
    from imgloop.formats.qcow2 import schema
    from imgloop.formats.qcow2.bitmaps import bitmap_extension, read_bitmaps
    from imgloop.formats.qcow2.header import MAX_BITMAP_DIRECTORY

    bitmaps: list[Bitmap] = []
    extension = bitmap_extension(extensions)
    if extension is None or not header.autoclear_features & schema.BITMAPS:
        return bitmaps
    if extension["directory_size"] > MAX_BITMAP_DIRECTORY:
        return bitmaps
    try:
        for bitmap in read_bitmaps(source, header, extension):
            bitmaps.append(bitmap)
    except FormatError:
        pass
    return bitmaps


def _chain_events(chain: list[Link]) -> Iterator[Event]:
    """What is odd between an image and its backing file, for each pair of the chain."""
    for (upper, node), (lower, lower_node) in pairwise(chain):
        named = upper.backing
        if named is None or node.backing is not None:
            continue
        if named.format is None:
            yield Event("BACKING_FORMAT_MISSING", (named.name,))
        else:
            try:
                looks = probe(lower.source.pread(PROBE_LENGTH, 0), lower_node.filename)
            except ReadError:
                looks = named.format
            if looks not in (named.format, "raw"):
                yield Event("BACKING_FORMAT_MISMATCH", (named.name, named.format, looks))
        if lower.size != upper.size:
            yield Event("BACKING_SIZE", (upper.size, named.name, lower.size))
