"""The structures of a qcow2 file as they lie on disk, damaged or not, as plain data.

`inspect` reads the header and collects what QEMU would refuse; the functions in `PARTS` (and `l2` below them)
each give one part of the file as a dict that is ready for JSON, but for one thing: a table is an iterator of
rows, for it may have millions. While rows are taken, what is wrong in the table is added to
`Inspected.problems`.

Nothing here raises for what an image holds. A part that cannot be shown has a key `not-shown` that says why; a
table whose declared size is beyond QEMU's limit is never read. Keys that name a field on disk are the
schema's, with dashes; offsets are in bytes, from the start of the file unless they are called guest's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from imgloop.formats.errors import FormatError, ImageError, Where
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.bitmaps import (
    Bitmap,
    bad_entries,
    bitmap_extension,
    check_bitmap_tables,
    judged_bitmaps,
    read_bitmap_table,
)
from imgloop.formats.qcow2.header import (
    CLUSTER_BITS,
    MAX_BACKING_NAME,
    MAX_BITMAP_DIRECTORY,
    MAX_L1_ENTRIES,
    MAX_SNAPSHOTS,
    VERSIONS,
    Extension,
    Header,
    bitmap_warning,
    extension_problems,
    feature_names,
    last_extension,
    problems,
    promise_problems,
    read_backing_name,
    read_extensions,
    read_header,
    size_problems,
)
from imgloop.formats.qcow2.snapshots import Snapshot, read_snapshots
from imgloop.formats.source import MAX_OFFSET, Source

Part = dict[str, Any]
Rows = Iterator[dict[str, Any]]

SHOWN_BYTES = 256  # of data whose meaning is unknown
NEWEST = max(VERSIONS)
NO_CLUSTER_SIZE = "without a valid cluster size it is not known what is where"
BEYOND = (
    "counting reference for region exceeding the end of the file by one cluster or more: offset {:#x} size {:#x}"
)


@dataclass(frozen=True, slots=True)
class Inspected:
    """A qcow2 file whose header was read, and what is wrong with it, in the order in which QEMU looks."""

    source: Source
    header: Header
    extensions: list[Extension]
    overflow: int | None  # offset of the first extension that does not fit
    problems: list[ImageError] = field(default_factory=list)

    @property
    def measurable(self) -> bool:
        """Whether the size of a cluster is known, without which nothing else can be found."""
        return self.header.cluster_bits in CLUSTER_BITS

    @property
    def host_clusters(self) -> int:
        """Clusters of the file, the last perhaps in part."""
        return -(-self.source.size // self.header.cluster_size)


def inspect(source: Source) -> Inspected:
    """Read the header of the file and collect what QEMU refuses when it opens the image; nothing is raised."""
    header = read_header(source)
    if header.cluster_bits not in CLUSTER_BITS:
        return Inspected(source, header, [], None, list(_header_problems(source, header)))
    extensions, overflow = read_extensions(source, header) if _placed(header) else ([], None)
    image = Inspected(source, header, extensions, overflow, list(_header_problems(source, header)))
    if _placed(header):
        image.problems.extend(extension_problems(source, header))
        image.problems.extend(promise_problems(source, header, extensions, reading=True))
    image.problems.extend(_content_problems(image))
    image.problems.extend(size_problems(source, header))
    return image


def _placed(header: Header) -> bool:
    """Whether the header's length is one that extensions can follow."""
    return header.version < NEWEST or schema.V3_LENGTH <= header.header_length <= header.cluster_size


def _header_problems(source: Source, header: Header) -> Iterator[ImageError]:
    """`problems`, which stops at a wrong magic or version, as if these were right from there on."""
    yield from problems(source, header)
    if header.magic != schema.MAGIC:
        yield from _header_problems(source, replace(header, magic=schema.MAGIC))
    elif header.version not in VERSIONS:
        yield from problems(source, replace(header, version=NEWEST))


def _content_problems(image: Inspected) -> Iterator[ImageError]:
    """What QEMU refuses in the tables that it reads when it opens the image."""
    try:
        read_backing_name(image.source, image.header)
    except FormatError as error:
        yield error
    if _snapshots_hidden(image.header) is None:
        try:
            for entry in read_snapshots(image.source, image.header):
                if entry.offset >= image.source.size:  # from here on there are only zeros
                    break
        except ImageError as error:
            yield error
    extension = bitmap_extension(image.extensions)
    if extension and image.header.autoclear_features & schema.BITMAPS and _bitmaps_hidden(extension) is None:
        yield from _bitmap_problems(image, extension)


def _bitmap_problems(image: Inspected, extension: dict[str, Any]) -> Iterator[ImageError]:
    sound: list[Bitmap] = []
    for bitmap, problem in judged_bitmaps(image.source, image.header, extension):
        if problem:
            yield problem
        elif bitmap:
            sound.append(bitmap)
    try:
        check_bitmap_tables(image.source, image.header, sound)
    except ImageError as error:
        yield error


# --- the header -------------------------------------------------------------------------------------------


def header(image: Inspected) -> Part:
    """Every field of the header, with what it means and what is wrong with it."""
    length = _shown_length(image.header)
    raw = schema.record(schema.Header, image.source.pread(schema.Header.sizeof(), 0))
    wrong = {problem.where.field: problem.message for problem in reversed(image.problems)}
    rows = []
    for part in schema.Header.subcons:
        offset, value = schema.offset_of(schema.Header, part.name), raw[part.name]
        if offset >= length:
            break
        row: dict[str, Any] = {"name": part.name, "offset": offset, "size": part.sizeof()}
        row["value"] = value if isinstance(value, int) else value.hex()
        if isinstance(value, int):
            row["hex"] = f"{value:#x}"
        meaning = _MEANINGS.get(part.name)
        if meaning:
            row |= meaning(image, value)
        if part.name in wrong:
            row["problem"] = wrong[part.name]
        rows.append(row)
    found: Part = {"offset": 0, "length": length, "fields": rows}
    tail = image.header.header_length - schema.Header.sizeof()
    if tail > 0 and image.measurable and _placed(image.header):
        found["unknown-fields"] = _unknown(
            image.source.pread(tail, schema.Header.sizeof()), schema.Header.sizeof()
        )
    return found


def _shown_length(header: Header) -> int:
    """Bytes of the header that have a meaning: what its version and its length say, within reason."""
    if header.version < NEWEST:
        return schema.V2_LENGTH
    known: int = schema.Header.sizeof()
    return max(schema.V3_LENGTH, min(header.header_length, known))


def _unknown(data: bytes, offset: int) -> dict[str, Any]:
    """Bytes without a known meaning, the first of them in hex."""
    return {"offset": offset, "length": len(data), "data": data[:SHOWN_BYTES].hex()}


def _backing(image: Inspected, value: int) -> dict[str, Any]:
    if not value:
        return {"meaning": "no backing file"}
    size = image.header.backing_file_size
    if not image.measurable or value > image.header.cluster_size or size > MAX_BACKING_NAME:
        return {}
    name = image.source.pread(size, value).decode("utf-8", "surrogateescape")
    return {"meaning": f"backing file {name!r}", "name-stored": name}


def _features(kind: int, known: tuple[str, ...]) -> Callable[[Inspected, int], dict[str, Any]]:
    """The meaning of a field of feature bits: their names, for unknown ones those that the image has for them."""

    def meaning(image: Inspected, value: int) -> dict[str, Any]:
        own = feature_names(image.extensions)
        bits: list[dict[str, Any]] = []
        for bit in (bit for bit in range(64) if value >> bit & 1):
            name = known[bit] if bit < len(known) else own.get((kind, bit))
            bits.append({"bit": bit, "name": name, "known": bit < len(known)})
        shown = [bit["name"] for bit in bits if bit["known"]]
        shown += [f"unknown bit {bit['bit']} {bit['name']!r}" for bit in bits if not bit["known"] and bit["name"]]
        nameless = sum(1 << bit["bit"] for bit in bits if not bit["name"])
        if nameless:
            shown.append(f"unknown {nameless:#x}")
        return {"meaning": ", ".join(shown) or "none", "bits": bits}

    return meaning


def _l1_meaning(image: Inspected, value: int) -> dict[str, Any]:
    if not image.measurable:
        return {"meaning": "entries"}
    return {"meaning": f"{image.header.l1_entries_needed} needed"}


def _clusters_meaning(image: Inspected, value: int) -> dict[str, Any]:
    if not image.measurable:
        return {}
    size = value * image.header.cluster_size
    return {"meaning": f"{size // schema.REFCOUNT_TABLE.size} entries", "bytes": size}


_MEANINGS: dict[str, Callable[[Inspected, int], dict[str, Any]]] = {
    "magic": lambda _, value: {"meaning": r"'QFI\xfb'" if value == schema.MAGIC else "not qcow2"},
    "version": lambda _, value: {"meaning": {2: "compat 0.10", NEWEST: "compat 1.1"}.get(value, "unknown")},
    "backing_file_offset": _backing,
    "cluster_bits": lambda image, value: (
        {"meaning": "cluster size", "bytes": 1 << value} if image.measurable else {"meaning": "not 9 to 21"}
    ),
    "size": lambda image, _: {"meaning": "virtual size", "bytes": image.header.virtual_size},
    "crypt_method": lambda _, value: {"meaning": schema.CRYPT_METHODS.get(value, "unknown")},
    "l1_size": _l1_meaning,
    "refcount_table_clusters": _clusters_meaning,
    "incompatible_features": _features(0, schema.INCOMPATIBLE),
    "compatible_features": _features(1, schema.COMPATIBLE),
    "autoclear_features": _features(2, schema.AUTOCLEAR),
    "refcount_order": lambda _, value: {"meaning": f"{1 << value} bits a refcount" if value <= 6 else "too large"},
    "compression_type": lambda _, value: {"meaning": schema.COMPRESSION_TYPES.get(value, "unknown")},
}


# --- the header extensions --------------------------------------------------------------------------------


def extensions(image: Inspected) -> Part:
    """The header extensions in the order in which they stand, each with its content decoded."""
    if not image.measurable:
        return _not_shown(NO_CLUSTER_SIZE)
    if not _placed(image.header):
        return _not_shown(f"header_length {image.header.header_length} says nothing of where they start")
    wrong: dict[int | None, str] = {}
    for problem in extension_problems(image.source, image.header):
        wrong.setdefault(problem.where.offset, problem.message)
    rows = []
    for extension in image.extensions:
        row = _extension_row(extension.offset, extension.type, len(extension.data))
        row |= _content(image, extension)
        if extension.offset in wrong:
            row["problem"] = wrong[extension.offset]
        rows.append(row)
    if image.overflow is not None:
        head = image.source.pread(schema.ExtensionHeader.sizeof(), image.overflow)
        entry = schema.record(schema.ExtensionHeader, head)
        row = _extension_row(image.overflow, entry["type"], entry["length"])
        rows.append(row | {"problem": wrong.get(image.overflow, "Header extension too large")})
    return {"offset": image.header.header_length, "end": image.header.extensions_end, "extensions": rows}


def _extension_row(offset: int, kind: int, length: int) -> dict[str, Any]:
    name = schema.EXTENSION_NAMES.get(kind, "unknown")
    return {"offset": offset, "type": f"{kind:#010x}", "name": name, "length": length}


def _content(image: Inspected, extension: Extension) -> dict[str, Any]:
    """What the extension holds."""
    if extension.type in (schema.BACKING_FORMAT, schema.DATA_FILE_NAME):
        return {"text": extension.data.decode("utf-8", "surrogateescape")}
    if extension.type == schema.FEATURE_NAMES:
        named = feature_names([extension])
        kinds = dict(enumerate(schema.FEATURE_TYPES))
        return {
            "features": [
                {"type": kinds.get(kind, f"type {kind}"), "bit": bit, "name": name}
                for (kind, bit), name in named.items()
            ]
        }
    if extension.type == schema.BITMAP_DIRECTORY:
        return {"content": _dashed(schema.record(schema.BitmapExtension, extension.data))}
    if extension.type == schema.FULL_DISK_ENCRYPTION:
        return _encryption(image, schema.record(schema.EncryptionPointer, extension.data))
    return {"content": _unknown(extension.data, extension.data_offset)}


def _encryption(image: Inspected, pointer: dict[str, Any]) -> dict[str, Any]:
    """The pointer to a LUKS header, and that header where it can be read."""
    from imgloop.formats.luks import header as luks

    found: dict[str, Any] = {"content": pointer}
    wrong = {problem.where.field: problem.message for problem in luks.problems(image.source, **pointer)}
    try:
        read = luks.read_header(image.source, **pointer)
    except FormatError as error:
        return found | {"problem": error.message}
    found["luks"] = luks.info(read)
    if wrong:
        found["problem"] = next(iter(wrong.values()))
    return found


# --- snapshots --------------------------------------------------------------------------------------------


def snapshots(image: Inspected) -> Part:
    """The snapshot table, with everything that its entries hold."""
    hidden = _snapshots_hidden(image.header) if image.measurable else NO_CLUSTER_SIZE
    if hidden:
        return _not_shown(hidden)
    return {
        "offset": image.header.snapshots_offset,
        "entries": image.header.nb_snapshots,
        "rows": _snapshot_rows(image),
    }


def _snapshots_hidden(header: Header) -> str | None:
    """Why the snapshot table is not shown; None where it can be."""
    if header.nb_snapshots > MAX_SNAPSHOTS:
        return f"Snapshot table too large: {header.nb_snapshots} entries, at most {MAX_SNAPSHOTS} are allowed"
    if header.snapshots_offset + header.nb_snapshots * schema.SnapshotEntry.sizeof() > MAX_OFFSET:
        return "Snapshot table offset invalid: no file reaches that far"
    return None


def _snapshot_rows(image: Inspected) -> Rows:
    findings = Findings(image)
    end, index = image.header.snapshots_offset, 0
    try:
        for index, entry in enumerate(read_snapshots(image.source, image.header)):
            if entry.offset >= image.source.size:
                count = image.header.nb_snapshots - index
                message = BEYOND.format(entry.offset, count * schema.SnapshotEntry.sizeof())
                row = {"index": index, "offset": entry.offset, "more": count - 1}
                yield findings.judged(row, message, "snapshot table entry")
                break
            row = _snapshot_row(image, index, entry)
            yield findings.judged(row, _snapshot_problem(image, index, entry), "snapshot table entry")
            end, index = entry.end, index + 1
    except ImageError as error:  # already among the problems: what can still be told of this entry is its head
        offset = end + 7 & ~7
        head = image.source.pread(schema.SnapshotEntry.sizeof(), offset)
        fields = _dashed(schema.record(schema.SnapshotEntry, head))
        yield {"index": index, "offset": offset, **fields, "problem": error.message}
    findings.close()


def _snapshot_row(image: Inspected, index: int, entry: Snapshot) -> dict[str, Any]:
    """One entry whole: its fields, its extra data as far as it goes, and what is behind the known extra data."""
    size = schema.SnapshotEntry.sizeof()
    row: dict[str, Any] = {"index": index, "offset": entry.offset, "length": entry.end - entry.offset}
    row |= {"id": entry.id, "name": entry.name}
    row |= _dashed(schema.record(schema.SnapshotEntry, image.source.pread(size, entry.offset)))
    data = image.source.pread(entry.extra_data_size, entry.offset + size)
    extra = schema.record(schema.SnapshotExtra, data[: schema.SnapshotExtra.sizeof()])
    row["extra-data"] = {
        name.replace("_", "-"): value
        for name, value in extra.items()
        if schema.offset_of(schema.SnapshotExtra, name) + 8 <= len(data)
    }
    if len(data) > schema.SnapshotExtra.sizeof():
        known = schema.SnapshotExtra.sizeof()
        row["unknown-extra-data"] = _unknown(data[known:], entry.offset + size + known)
    return row


def _snapshot_problem(image: Inspected, index: int, entry: Snapshot) -> str | None:
    """What `qemu-img check` says of an entry that can be read."""
    name = f"snapshot {entry.id} ({entry.name})"
    if entry.l1_table_offset % image.header.cluster_size:
        return (
            f"{name} l1_offset={entry.l1_table_offset:#x}: L1 table is not cluster aligned; "
            "snapshot table entry corrupted"
        )
    if entry.l1_size > MAX_L1_ENTRIES:
        return f"{name} l1_size={entry.l1_size:#x}: L1 table is too large; snapshot table entry corrupted"
    if image.header.version >= NEWEST and entry.extra_data_size < 16:
        return f"snapshot table entry {index} is incomplete"
    return None


# --- bitmaps ----------------------------------------------------------------------------------------------


def bitmaps(image: Inspected) -> Part:
    """The bitmap directory, and what the table of each bitmap comes to."""
    if not image.measurable:
        return _not_shown(NO_CLUSTER_SIZE)
    extension = bitmap_extension(image.extensions)
    if extension is None:
        return {"entries": 0, "rows": iter(())}
    found = last_extension(image.extensions, schema.BITMAP_DIRECTORY)
    part: Part = {
        "extension-offset": found.offset if found else None,
        "offset": extension["directory_offset"],
        "length": extension["directory_size"],
        "entries": extension["nb_bitmaps"],
        "trusted": bool(image.header.autoclear_features & schema.BITMAPS),
    }
    warning = bitmap_warning(image.header, image.extensions)
    if warning:
        part["warning"] = warning
    hidden = _bitmaps_hidden(extension)
    return part | ({"not-shown": hidden} if hidden else {"rows": _bitmap_rows(image, extension)})


def _bitmaps_hidden(extension: dict[str, Any]) -> str | None:
    """Why the bitmap directory is not shown; None where it can be."""
    size = extension["directory_size"]
    if size > MAX_BITMAP_DIRECTORY:
        return f"bitmap directory size ({size}) exceeds the maximum supported size ({MAX_BITMAP_DIRECTORY})"
    if extension["directory_offset"] + size > MAX_OFFSET:
        return "invalid bitmap directory offset: no file reaches that far"
    return None


def _bitmap_rows(image: Inspected, extension: dict[str, Any]) -> Rows:
    index = 0
    for bitmap, problem in judged_bitmaps(image.source, image.header, extension):
        if bitmap is None:
            if problem:
                yield {"index": index, "offset": problem.where.offset, "problem": problem.message}
            continue
        row: dict[str, Any] = {"index": index, "offset": bitmap.offset, "name": bitmap.name}
        row |= {
            "table-offset": bitmap.table_offset,
            "table-size": bitmap.table_size,
            "flags": bitmap.flags,
            "flag-names": _flag_names(bitmap.flags),
            "type": bitmap.type,
            "granularity-bits": bitmap.granularity_bits,
            "extra-data-size": bitmap.extra_data_size,
        }
        if problem is None:
            row["table"] = _table_summary(image, bitmap)
            problem = _table_problem(image, bitmap)
        if problem:
            row["problem"] = problem.message
        yield row
        index += 1


def _flag_names(flags: int) -> list[str]:
    return [
        schema.BITMAP_FLAGS[bit] if bit < len(schema.BITMAP_FLAGS) else f"bit {bit}"
        for bit in range(32)
        if flags >> bit & 1
    ]


def _table_problem(image: Inspected, bitmap: Bitmap) -> FormatError | None:
    try:
        check_bitmap_tables(image.source, image.header, [bitmap])
    except FormatError as error:
        return error
    return None


def _table_summary(image: Inspected, bitmap: Bitmap) -> dict[str, int]:
    """How many entries of the bitmap's table are of which kind."""
    table = read_bitmap_table(image.source, bitmap)
    bad = bad_entries(table, image.header)
    present = (table["offset"] != 0) & ~bad
    ones = (table["offset"] == 0) & (table["all_ones"] != 0) & ~bad
    counts = {"clusters": present.sum(), "all-ones": ones.sum(), "bad": bad.sum()}
    found = {name: int(count) for name, count in counts.items()}
    return {**found, "all-zero": len(table) - sum(found.values())}


# --- what all parts share ---------------------------------------------------------------------------------


def _not_shown(reason: str) -> Part:
    return {"not-shown": reason}


def _dashed(record: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in record.items()}


class Findings:
    """What is wrong in the rows of one table: the first is kept whole, of the others only how many they are."""

    def __init__(self, image: Inspected) -> None:
        self.image = image
        self.first: FormatError | None = None
        self.count = 0

    def add(self, message: str, where: Where) -> None:
        """One more row with something wrong."""
        self.first = self.first or FormatError(message, where)
        self.count += 1

    def judged(self, row: Part, message: str | None, kind: str) -> Part:
        """`row` of an entry of that kind, with its problem if it has one."""
        if message:
            place = row["at"] if "at" in row else row["offset"]
            value = int(row["entry"], 16) if "entry" in row else None
            self.add(message, Where(self.image.source.name, place, f"{kind} {row['index']}", value))
            row["problem"] = message
        return row

    def close(self) -> None:
        """The table is at its end: tell the image."""
        if self.first:
            more = f" (and {self.count - 1} more entries of this table)" if self.count > 1 else ""
            self.image.problems.append(FormatError(self.first.message + more, self.first.where))


def _tables(name: str) -> Callable[[Inspected], Part]:
    def part(image: Inspected) -> Part:
        from imgloop.formats.qcow2 import dump_tables  # needs numpy, which a header does not

        found: Part = getattr(dump_tables, name)(image)
        return found

    return part


PARTS: dict[str, Callable[[Inspected], Part]] = {
    "header": header,
    "extensions": extensions,
    "l1": _tables("l1"),
    "refcounts": _tables("refcounts"),
    "snapshots": snapshots,
    "bitmaps": bitmaps,
}
