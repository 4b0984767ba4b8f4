"""The tables of `dump` that numpy decodes: L1, one L2 table, the refcount table and the refcounts.

Only what is not zero becomes a row. Tables are read in pieces and never past the end of the file, where there
are only zeros, so memory stays bounded whatever a header says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.columns import Columns, Table
from imgloop.formats.errors import OutOfRangeError, Where
from imgloop.formats.extents import Kind
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.dump import BEYOND, NO_CLUSTER_SIZE, Findings, Inspected, Part, Rows
from imgloop.formats.qcow2.header import MAX_L1_ENTRIES, MAX_REFCOUNT_TABLE, Header
from imgloop.formats.qcow2.mapping import Mapping
from imgloop.formats.qcow2.refcounts import decode_refcounts, entries_per_block
from imgloop.formats.source import MAX_OFFSET

PIECE = 1 << 16  # bytes of a table that are decoded at a time
UNIT = 8  # bytes: whole refcounts, of any width
MAX_REFCOUNT_ORDER = 6
Span = tuple[int, int, int | str]  # first and last cluster, and their refcount
SUBCLUSTER_MARKS = {Kind.UNALLOCATED: ".", Kind.DATA: "D", Kind.ZERO: "0", Kind.INVALID: "!"}


def nonzero(image: Inspected, columns: Columns, offset: int, entries: int) -> Iterator[tuple[list[Part], Table]]:
    """The entries that are not zero, of a table at `offset`: some as rows of their fields, and as a table."""
    entries = min(entries, max(0, -(-(image.source.size - offset) // columns.size)))
    step = PIECE // columns.size
    for first in range(0, entries, step):
        data = image.source.pread(min(step, entries - first) * columns.size, offset + first * columns.size)
        whole = columns.table(data).entries
        found = np.flatnonzero(whole.any(axis=1))
        if len(found):
            table = Table(columns, whole[found])
            yield list(_fields(table, (found + first).tolist(), offset)), table


def _fields(table: Table, indexes: list[int], offset: int) -> Rows:
    """A row for each entry of `table`, whose indexes in the table at `offset` are given."""
    columns = table.columns
    flags = [columns[name].mask == 1 for name in columns]
    names = ["index", "at", "entry", *(name.replace("_", "-") for name in columns)]
    values = [table[name].tolist() for name in columns]
    values = [list(map(bool, column)) if flag else column for column, flag in zip(values, flags, strict=True)]
    places = [offset + index * columns.size for index in indexes]
    for row in zip(indexes, places, _hex(table), *values, strict=True):
        yield dict(zip(names, row, strict=True))


def _hex(table: Table) -> list[str]:
    """The entries as they are stored: beyond 2^53 a number would not survive every reader of JSON."""
    template = "0x" + f"%0{table.columns.word_size * 2}x" * table.columns.words
    return [template % tuple(words) for words in table.entries.tolist()]


# --- L1 and L2 --------------------------------------------------------------------------------------------


def l1(image: Inspected) -> Part:
    """The active L1 table: its entries that are not zero."""
    hidden = _l1_hidden(image)
    if hidden:
        return {"not-shown": hidden}
    header = image.header
    part: Part = {"offset": header.l1_table_offset, "entries": header.l1_size, "needed": header.l1_entries_needed}
    return part | {"rows": _l1_rows(image)}


def _l1_hidden(image: Inspected) -> str | None:
    """Why the L1 table is not shown; None where it can be."""
    header = image.header
    if not image.measurable:
        return NO_CLUSTER_SIZE
    if header.l1_size > MAX_L1_ENTRIES:
        return f"Active L1 table too large: {header.l1_size} entries, at most {MAX_L1_ENTRIES} are allowed"
    if header.l1_table_offset + header.l1_size * schema.L1.size > MAX_OFFSET:
        return "Active L1 table offset invalid: no file reaches that far"
    return None


def _l1_rows(image: Inspected) -> Rows:
    header, findings = image.header, Findings(image)
    for rows, _ in nonzero(image, schema.L1, header.l1_table_offset, header.l1_size):
        for row in rows:
            row["guest-offset"] = row["index"] * header.l2_entries * header.cluster_size
            yield findings.judged(row, _l1_problem(image, row), "L1 entry")
    findings.close()


def _l1_problem(image: Inspected, row: Part) -> str | None:
    """What `qemu-img check` says of an L1 entry by itself."""
    if row["reserved-high"] or row["reserved-low"]:
        return f"found L1 entry with reserved bits set: {int(row['entry'], 16):x}"
    if row["offset"] >= image.source.size:
        return BEYOND.format(row["offset"], image.header.cluster_size)
    if row["offset"] % image.header.cluster_size:
        return f"l2_offset={row['offset']:x}: Table is not cluster aligned; L1 entry corrupted"
    return None


def l2(image: Inspected, number: int) -> Part:
    """The L2 table of L1 entry `number`: its entries that are not zero, and what they mean.

    Raises OutOfRangeError where the L1 table has no such entry.
    """
    hidden = _l1_hidden(image)
    if hidden:
        return {"not-shown": hidden}
    header = image.header
    if not 0 <= number < header.l1_size:
        message = f"There is no L1 entry {number}: the L1 table has {header.l1_size} entries"
        raise OutOfRangeError(message, Where(image.source.name, field="l1_size", value=header.l1_size))
    at = header.l1_table_offset + number * schema.L1.size
    word = int.from_bytes(image.source.pread(schema.L1.size, at), "big")
    offset = schema.L1["offset"].of(word)
    guest = number * header.l2_entries * header.cluster_size
    part: Part = {"l1-index": number, "l1-entry": f"{word:#018x}", "offset": offset, "guest-offset": guest}
    if not offset:
        return part | {"not-shown": f"L1 entry {number} names no L2 table"}
    return part | {"entries": header.l2_entries, "rows": _l2_rows(image, number, offset)}


def _l2_rows(image: Inspected, number: int, offset: int) -> Rows:
    """The entries of the L2 table at `offset`, each with what it says of its cluster."""
    header, findings = image.header, Findings(image)
    mapping = Mapping(image.source, header, header.l1_table_offset, header.l1_size)
    first = number * header.l2_entries
    if offset % header.cluster_size:
        place = header.l1_table_offset + number * schema.L1.size
        message = f"l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
        findings.add(message, Where(image.source.name, place, f"L1 entry {number}", offset))
    for rows, table in nonzero(image, mapping.columns, offset, header.l2_entries):
        guest = [(first + row["index"]) * header.cluster_size for row in rows]
        units = mapping.classify(table, np.array(guest, dtype=np.int64))
        kinds = units.kind.reshape(len(rows), -1).tolist()
        streams = units.offset[:: mapping.subclusters].tolist(), units.stored[:: mapping.subclusters].tolist()
        for row, start, kind, stream, stored in zip(rows, guest, kinds, *streams, strict=True):
            row["guest-offset"] = start
            _describe(header, row, kind, stream, stored)
            unreadable = mapping.explain_invalid(start).message if Kind.INVALID in kind else None
            yield findings.judged(row, unreadable or _l2_problem(image, row), "L2 entry")
    findings.close()


def _describe(header: Header, row: Part, kinds: list[int], stream: int, stored: int) -> None:
    """Put the meaning of an L2 entry into its row: `kinds` of the cluster, or of its subclusters."""
    if row.pop("compressed") and kinds[0] == Kind.COMPRESSED:
        for name in ("offset", "zero", "reserved-high", "reserved-low"):
            del row[name]  # of a compressed cluster, these bits are its descriptor
        sectors = schema.compressed(header.cluster_bits)["sectors"].of(int(row["entry"][:18], 16)) + 1
        row |= {"kind": "compressed", "offset": stream, "sectors": sectors, "stored": stored}
        return
    row["kind"] = Kind(kinds[0]).name.lower() if len(set(kinds)) == 1 else "mixed"
    if header.extended_l2:
        row["subclusters"] = "".join(SUBCLUSTER_MARKS[Kind(kind)] for kind in kinds)


def _l2_problem(image: Inspected, row: Part) -> str | None:
    """What `qemu-img check` says of an L2 entry that can be read."""
    header, entry = image.header, f"{int(row['entry'][:18], 16):x}"
    if row["kind"] == "compressed":
        if row["copied"]:
            return f"coffset=0x{row['offset']:x}: copied flag must never be set for compressed clusters"
        if header.extended_l2 and (row["zero-bitmap"] or row["allocated-bitmap"]):
            return f"compressed cluster {row['index']} with non-zero subcluster allocation bitmap, entry=0x{entry}"
        reach = row["offset"] + row["stored"] - image.source.size
        return BEYOND.format(row["offset"], row["stored"]) if reach >= header.cluster_size else None
    if row["reserved-high"] or row["reserved-low"]:
        return f"found l2 entry with reserved bits set: {entry}"
    if row["offset"] >= image.source.size and not header.has_data_file:
        return BEYOND.format(row["offset"], header.cluster_size)
    return None


# --- refcounts --------------------------------------------------------------------------------------------


def refcounts(image: Inspected) -> Part:
    """The refcount table's entries that are not zero, and the refcounts themselves as runs of equal ones."""
    if not image.measurable:
        return {"not-shown": NO_CLUSTER_SIZE}
    header = image.header
    size = header.refcount_table_clusters * header.cluster_size
    if size > MAX_REFCOUNT_TABLE:
        return {
            "not-shown": f"Reference count table too large: {size} bytes, at most {MAX_REFCOUNT_TABLE} are allowed"
        }
    if header.refcount_table_offset + size > MAX_OFFSET:
        return {"not-shown": "Reference count table offset invalid: no file reaches that far"}
    part: Part = {
        "offset": header.refcount_table_offset,
        "entries": size // schema.REFCOUNT_TABLE.size,
        "rows": _block_rows(image, size),
    }
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        return part
    part["refcount-bits"] = 1 << header.refcount_order
    part["cluster-size"] = header.cluster_size
    part["refcounts-per-block"] = entries_per_block(header)
    return part | {"host-clusters": image.host_clusters, "runs": _runs(image, size)}


def _block_rows(image: Inspected, size: int) -> Rows:
    """The entries of the refcount table, each a refcount block."""
    header, findings, table = image.header, Findings(image), schema.REFCOUNT_TABLE
    repeated, times = _repeated(_block_offsets(image, size)), Counter[int]()
    for rows, _ in nonzero(image, table, header.refcount_table_offset, size // table.size):
        for row in rows:
            if header.refcount_order <= MAX_REFCOUNT_ORDER:
                per_block = entries_per_block(header)
                row["first-cluster"] = row["index"] * per_block
                row["last-cluster"] = row["first-cluster"] + per_block - 1
            message = _block_problem(image, row)
            if message is None and repeated[row["index"]]:
                times[row["offset"]] += 1
                message = f"refcount block {row['index']} refcount={times[row['offset']] + 1}"
            yield findings.judged(row, message, "refcount table entry")
    findings.close()


def _block_problem(image: Inspected, row: Part) -> str | None:
    """What `qemu-img check` says of an entry of the refcount table by itself."""
    if row["reserved"]:
        return f"refcount table entry {row['index']} has reserved bits set"
    if row["offset"] % image.header.cluster_size:
        return f"refcount block {row['index']} is not cluster aligned; refcount table entry corrupted"
    if row["offset"] >= image.source.size:
        return f"refcount block {row['index']} is outside image"
    return None


def _runs(image: Inspected, size: int) -> Rows:
    """Host clusters of equal refcount, in order: all of the file's, and beyond its end those that are not zero."""
    end, pending = image.host_clusters, None
    for first, last, count in _spans(image, size):
        if count == 0:
            last = min(last, end - 1)
        if first > last:
            continue
        if pending and pending[2] == count and pending[1] == first - 1:
            first = pending[0]
        elif pending:
            yield _run(*pending)
        pending = first, last, count
    if pending:
        yield _run(*pending)


def _run(first: int, last: int, count: int | str) -> Part:
    """A run as a row; a refcount that is not known says why."""
    run: Part = {"first": first, "last": last, "refcount": count}
    return run if isinstance(count, int) else run | {"refcount": None, "not-shown": count}


def _spans(image: Inspected, size: int) -> Iterator[Span]:
    """`_blocks`, with refcount 0 in between and up to the end of the file."""
    done = 0
    for first, last, count in _blocks(image, size):
        yield done, first - 1, 0
        yield first, last, count
        done = last + 1
    yield done, image.host_clusters - 1, 0


def _blocks(image: Inspected, size: int) -> Iterator[Span]:
    """Runs of the clusters that have a refcount block; where it is not read, the reason stands for the count."""
    header, source = image.header, image.source
    per_block = entries_per_block(header)
    offsets = _block_offsets(image, size)
    repeated = _repeated(offsets)
    for index in np.flatnonzero(offsets).tolist():
        offset, first = int(offsets[index]), index * per_block
        if offset % header.cluster_size:
            yield first, first + per_block - 1, "the block is not cluster aligned"
            continue
        if repeated[index]:  # read once: an image could else ask for endless reading
            yield first, first + per_block - 1, "the block is that of an earlier entry"
            continue
        # holes are refcounts of 0, and an image may have more of them than can be read
        for low, high in source.data_ranges(offset, offset + header.cluster_size):
            for at in range(low - low % UNIT, high, PIECE):
                piece = source.pread(min(PIECE, offset + header.cluster_size - at), at)
                if piece.strip(b"\0"):
                    start = first + ((at - offset) * 8 >> header.refcount_order)
                    yield from _equal(start, decode_refcounts(piece, header.refcount_order))


def _block_offsets(image: Inspected, size: int) -> NDArray[np.uint64]:
    """The refcount table (of `size` bytes) as the offset of each block; 0: none."""
    data = image.source.pread(size, image.header.refcount_table_offset)
    return schema.REFCOUNT_TABLE.table(data)["offset"]


def _repeated(offsets: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which entries name a refcount block that an earlier entry names too."""
    again = np.ones(len(offsets), dtype=bool)
    again[np.unique(offsets, return_index=True)[1]] = False
    return again


def _equal(first: int, counts: NDArray[np.uint64]) -> Iterator[tuple[int, int, int]]:
    """Runs of equal refcounts, the first of cluster `first`."""
    starts = np.flatnonzero(np.concatenate(([True], counts[1:] != counts[:-1])))
    lasts = np.concatenate((starts[1:], [len(counts)])) - 1
    yield from zip((starts + first).tolist(), (lasts + first).tolist(), counts[starts].tolist(), strict=True)
