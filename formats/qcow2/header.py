"""The qcow2 header and its extensions: parsed without judgement, then judged in QEMU's order.

`read_header` and `read_extensions` take what is there, so that damaged images can be shown. `problems` and
`extension_problems` yield what QEMU would refuse, in the order in which it looks; opening raises the first.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from imgloop.formats.driver import SECTOR
from imgloop.formats.errors import FormatError, OpenError, ReadError, Where
from imgloop.formats.qcow2 import schema
from imgloop.formats.source import MAX_LENGTH, MAX_OFFSET, Source
from imgloop.formats.structures import c_string as c_string

VERSIONS = (2, 3)
CLUSTER_BITS = range(9, 22)  # 512 bytes to 2 MiB
MAX_L1_ENTRIES = 4194304  # a table of 32 MiB, active or of a snapshot
MAX_REFCOUNT_TABLE = 8 << 20  # bytes
MAX_SNAPSHOTS = 65536
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY = 1024 * MAX_BITMAPS  # bytes
MAX_BACKING_NAME = 1023  # bytes
MAX_BACKING_FORMAT = 15  # bytes
EXTENSION_HEAD: int = schema.ExtensionHeader.sizeof()  # bytes of type and length
INT_MAX = (1 << 31) - 1
UINT64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Header:
    """The header's fields as stored, those that version 2 lacks with the values that it implies."""

    magic: int
    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int
    compatible_features: int
    autoclear_features: int
    refcount_order: int
    header_length: int
    compression_type: int

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def recognised(self) -> bool:
        """Whether it is a qcow2 header with a size of clusters: else nothing more can be said of it."""
        return self.magic == schema.MAGIC and self.version in VERSIONS and self.cluster_bits in CLUSTER_BITS

    @property
    def virtual_size(self) -> int:
        """Bytes that the guest sees: the stored size, down to a whole sector."""
        return self.size // SECTOR * SECTOR

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have 128 bits and clusters have subclusters."""
        return bool(self.incompatible_features & schema.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Whether the guest's clusters are in an external data file."""
        return bool(self.incompatible_features & schema.DATA_FILE)

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table, which has one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def l1_entries_needed(self) -> int:
        """L1 entries for the virtual size; computed in 64 bits as QEMU does, so sizes near 2^64 wrap to 0."""
        span = self.cluster_size * self.l2_entries
        return (self.size + span - 1 & UINT64) // span

    @property
    def extensions_end(self) -> int:
        """Where the header extensions must end (bytes), never past the first cluster."""
        return min(self.backing_file_offset or self.cluster_size, self.cluster_size)


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension: where it starts, its type, and its data without the padding."""

    offset: int  # of its type field
    type: int
    data: bytes

    @property
    def data_offset(self) -> int:
        """Where the data starts (bytes)."""
        return self.offset + EXTENSION_HEAD

    @property
    def name(self) -> str:
        """The specification's name for the type."""
        return schema.EXTENSION_NAMES.get(self.type, "unknown")

    @property
    def text(self) -> str:
        """The data as the C string that QEMU takes it for."""
        return c_string(self.data)


def read_header(source: Source) -> Header:
    """The header as it stands at the start of the file; nothing is checked."""
    data = schema.record(schema.Header, source.pread(schema.Header.sizeof(), 0))
    if data["version"] < 3:
        data |= {
            "incompatible_features": 0,
            "compatible_features": 0,
            "autoclear_features": 0,
            "refcount_order": 4,
            "header_length": schema.V2_LENGTH,
        }
    if data["header_length"] <= schema.V3_LENGTH:
        data["compression_type"] = 0
    return Header(**{field.name: data[field.name] for field in fields(Header)})


def read_extensions(source: Source, header: Header) -> tuple[list[Extension], int | None]:
    """The header extensions, and the offset of the first that does not fit (None: all is well).

    The end extension is not among them. Padding may reach past the end of the area: QEMU allows it.
    """
    found: list[Extension] = []
    offset, end = header.header_length, header.extensions_end
    area = source.pread(max(0, end - offset), offset)
    base, head = offset, EXTENSION_HEAD
    while offset < end:
        entry = schema.record(schema.ExtensionHeader, area[offset - base : offset - base + head])
        if offset > end - head:
            return found, offset
        if entry["length"] > end - offset - head:
            return found, offset
        if entry["type"] == schema.END:
            break
        first = offset - base + head
        found.append(Extension(offset, entry["type"], area[first : first + entry["length"]]))
        offset += head + (entry["length"] + 7 & ~7)
    return found, None


@contextmanager
def needed_to_open(failure: str) -> Iterator[None]:
    """A read that fails in here keeps the image from being opened: `failure: reason`."""
    try:
        yield
    except ReadError as error:
        raise OpenError(f"{failure}: {os.strerror(error.errno)}", error.where) from error


def last_extension(extensions: list[Extension], kind: int) -> Extension | None:
    """The extension of a type that counts: QEMU lets the last one win."""
    return next((found for found in reversed(extensions) if found.type == kind), None)


def feature_names(extensions: list[Extension]) -> dict[tuple[int, int], str]:
    """Names of feature bits, by type and bit, from the feature name table; it ends at an empty name.

    The first name of a bit counts, and a last row that is cut short as well.
    """
    table = last_extension(extensions, schema.FEATURE_NAMES)
    data = table.data if table else b""
    names: dict[tuple[int, int], str] = {}
    size = schema.FeatureName.sizeof()
    for at in range(0, len(data), size):
        row = schema.record(schema.FeatureName, data[at : at + size])
        name = c_string(row["name"])
        if not name:
            break
        names.setdefault((row["type"], row["bit"]), name)
    return names


def problems(source: Source, header: Header, *, checking: bool = False) -> Iterator[FormatError]:
    """What QEMU refuses in the header's own fields, in its order (qcow2_do_open).

    `checking` leaves out what `qemu-img check` looks at later by itself.
    """
    yield from _layout_problems(source, header)
    if header.recognised:
        yield from _feature_problems(source, header)
        yield from _table_problems(source, header, checking=checking)


def all_problems(source: Source, header: Header) -> list[FormatError]:
    """Everything that QEMU refuses in header and extensions when it checks an image, as far as one can see."""
    found = list(problems(source, header, checking=True))
    if header.magic == schema.MAGIC and 9 <= header.cluster_bits <= 21:
        found += extension_problems(source, header)
    return found


def walkable(header: Header) -> bool:
    """Whether the header's numbers lead to tables that can be looked at, whatever else is wrong with it."""
    size = header.refcount_table_clusters * header.cluster_size if header.cluster_bits <= 21 else 0
    return (
        header.magic == schema.MAGIC
        and 9 <= header.cluster_bits <= 21
        and header.refcount_order <= 6
        and size <= MAX_REFCOUNT_TABLE
        and not _misplaced(header, header.refcount_table_offset, size)
        and header.l1_size <= MAX_L1_ENTRIES
        and not _misplaced(header, header.l1_table_offset, header.l1_size * schema.L1.size)
    )


def _bad(source: Source, header: Header, field: str, message: str) -> FormatError:
    where = Where(source.name, schema.offset_of(schema.Header, field), field, getattr(header, field))
    return FormatError(message, where)


def _layout_problems(source: Source, header: Header) -> Iterator[FormatError]:
    """The fields that say where everything else is."""

    def bad(field: str, message: str) -> FormatError:
        return _bad(source, header, field, message)

    if header.magic != schema.MAGIC:
        yield bad("magic", "Image is not in qcow2 format")
        return
    if header.version not in VERSIONS:
        yield bad("version", f"Unsupported qcow2 version {header.version}")
        return
    if header.cluster_bits not in CLUSTER_BITS:
        yield bad("cluster_bits", f"Unsupported cluster size: 2^{header.cluster_bits}")
        return
    if header.version >= 3 and header.header_length < schema.V3_LENGTH:
        yield bad("header_length", "qcow2 header too short")
    if header.header_length > header.cluster_size:
        yield bad("header_length", "qcow2 header exceeds cluster size")
    if header.backing_file_offset > header.cluster_size:
        yield bad("backing_file_offset", "Invalid backing file offset")


def _feature_problems(source: Source, header: Header) -> Iterator[FormatError]:
    """Feature bits that are unknown, or do not fit the other fields."""

    def bad(field: str, message: str) -> FormatError:
        return _bad(source, header, field, message)

    if header.compression_type not in schema.COMPRESSION_TYPES:
        yield bad("compression_type", f"qcow2: unknown compression type: {header.compression_type}")
    elif bool(header.compression_type) != bool(header.incompatible_features & schema.COMPRESSION):
        must = "must be set" if header.compression_type else "must not be set"
        yield bad("incompatible_features", f"qcow2: Compression type incompatible feature bit {must}")
    unknown = header.incompatible_features & ~((1 << len(schema.INCOMPATIBLE)) - 1)
    if unknown:
        names = unknown_features(source, header, unknown)
        yield bad("incompatible_features", f"Unsupported qcow2 feature(s): {names}")
    subcluster = header.cluster_size // schema.SUBCLUSTERS
    if header.extended_l2 and subcluster < SECTOR:
        yield bad("cluster_bits", f"Unsupported subcluster size: {subcluster}")
    if header.refcount_order > 6:
        message = "Reference count entry width too large; may not exceed 64 bits"
        yield bad("refcount_order", message)


def unknown_features(source: Source, header: Header, unknown: int) -> str:
    """The incompatible features that QEMU does not know, by the image's own names where it gives them."""
    extensions, _ = read_extensions(source, header)
    named = []
    for (kind, bit), name in feature_names(extensions).items():
        mask = 1 << bit % 64
        if kind == 0 and unknown & mask:
            named.append(name)
            unknown &= ~mask
    if unknown:
        named.append(f"Unknown incompatible feature: {unknown:x}")
    return ", ".join(named)


def _table_problems(source: Source, header: Header, *, checking: bool) -> Iterator[FormatError]:
    """Sizes and places of the tables that the header names; nothing is allocated before these."""

    def bad(field: str, message: str) -> FormatError:
        return _bad(source, header, field, message)

    table_size = header.refcount_table_clusters * header.cluster_size
    snapshots_size: int = header.nb_snapshots * schema.SnapshotEntry.sizeof()
    if not header.refcount_table_clusters and not checking:
        yield bad("refcount_table_clusters", "Image does not contain a reference count table")
    if table_size > MAX_REFCOUNT_TABLE:
        yield bad("refcount_table_clusters", "Reference count table too large")
    elif _misplaced(header, header.refcount_table_offset, table_size):
        yield bad("refcount_table_offset", "Reference count table offset invalid")
    if header.nb_snapshots > MAX_SNAPSHOTS and not checking:
        yield bad("nb_snapshots", "Snapshot table too large")
    elif not checking and _misplaced(header, header.snapshots_offset, snapshots_size):
        yield bad("snapshots_offset", "Snapshot table offset invalid")
    yield from _l1_problems(source, header)
    if header.crypt_method not in schema.CRYPT_METHODS:
        yield bad("crypt_method", f"Unsupported encryption method {header.crypt_method}")
    if table_size and header.refcount_table_offset + table_size > MAX_LENGTH:
        yield bad("refcount_table_offset", f"Could not initialize refcount handling: {os.strerror(errno.EIO)}")


def _misplaced(header: Header, offset: int, size: int) -> bool:
    """Whether a table cannot lie there: not at a cluster's start, or reaching past the largest offset."""
    return offset % header.cluster_size != 0 or offset + size > MAX_OFFSET


def _l1_problems(source: Source, header: Header) -> Iterator[FormatError]:
    """The active L1 table, and whether it is large enough for the virtual size."""
    if header.l1_size > MAX_L1_ENTRIES:
        yield _bad(source, header, "l1_size", "Active L1 table too large")
    elif _misplaced(header, header.l1_table_offset, header.l1_size * schema.L1.size):
        yield _bad(source, header, "l1_table_offset", "Active L1 table offset invalid")
    if header.l1_entries_needed > INT_MAX:
        yield _bad(source, header, "size", "Image is too big")
    elif header.l1_size < header.l1_entries_needed:
        yield _bad(source, header, "l1_size", "L1 table is too small")
    if header.l1_size and header.l1_table_offset + header.l1_size * schema.L1.size > MAX_LENGTH:
        yield _bad(source, header, "l1_table_offset", f"Could not read L1 table: {os.strerror(errno.EIO)}")


def extension_problems(source: Source, header: Header) -> Iterator[FormatError]:
    """What QEMU refuses in the header extensions, in the order in which they stand (qcow2_read_extensions)."""
    extensions, overflow = read_extensions(source, header)
    for extension in extensions:
        judge = _EXTENSION_JUDGES.get(extension.type)
        sound = True
        for message in judge(header, extension) if judge else ():
            sound = False
            where = Where(source.name, extension.offset, f"header extension '{extension.name}'")
            yield FormatError(message, where)
        if sound and extension.type == schema.FULL_DISK_ENCRYPTION:
            yield from _luks_problems(source, extension)
    if overflow is not None:
        yield FormatError("Header extension too large", Where(source.name, overflow, "header extension"))


def _luks_problems(source: Source, extension: Extension) -> Iterator[FormatError]:
    """What is wrong with the LUKS header that the extension points to: QEMU opens it on the spot."""
    from imgloop.formats.luks.header import problems as luks_problems

    pointer = schema.record(schema.EncryptionPointer, extension.data)
    yield from luks_problems(source, pointer["offset"], pointer["length"])


def _judge_backing_format(header: Header, extension: Extension) -> Iterator[str]:
    if len(extension.data) > MAX_BACKING_FORMAT:
        yield f"ERROR: ext_backing_format: len={len(extension.data)} too large (>=16)"


def _judge_encryption(header: Header, extension: Extension) -> Iterator[str]:
    size = schema.EncryptionPointer.sizeof()
    if schema.CRYPT_METHODS.get(header.crypt_method) != "luks":
        yield "CRYPTO header extension only expected with LUKS encryption method"
    elif len(extension.data) != size:
        yield f"CRYPTO header extension size {len(extension.data)}, but expected size {size}"
    else:
        offset = schema.record(schema.EncryptionPointer, extension.data)["offset"]
        if offset % header.cluster_size:
            yield (
                f"Encryption header offset '{offset}' is not a multiple of cluster size '{header.cluster_size}'"
            )


def _judge_bitmaps(header: Header, extension: Extension) -> Iterator[str]:
    if len(extension.data) != schema.BitmapExtension.sizeof():
        yield "bitmaps_ext: Invalid extension length"
        return
    if not header.autoclear_features & schema.BITMAPS:
        return  # not to be trusted, and so not looked at: see bitmap_warning
    found: dict[str, Any] = schema.record(schema.BitmapExtension, extension.data)
    size = found["directory_size"]
    if found["reserved"]:
        yield "bitmaps_ext: Reserved field is not zero"
    if found["nb_bitmaps"] > MAX_BITMAPS:
        yield (
            f"bitmaps_ext: Image has {found['nb_bitmaps']} bitmaps, exceeding the QEMU supported "
            f"maximum of {MAX_BITMAPS}"
        )
    if not found["nb_bitmaps"]:
        yield "found bitmaps extension with zero bitmaps"
    if found["directory_offset"] % header.cluster_size:
        yield "bitmaps_ext: invalid bitmap directory offset"
    if size > MAX_BITMAP_DIRECTORY:
        yield (
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size "
            f"({MAX_BITMAP_DIRECTORY})"
        )


_EXTENSION_JUDGES = {
    schema.BACKING_FORMAT: _judge_backing_format,
    schema.FULL_DISK_ENCRYPTION: _judge_encryption,
    schema.BITMAP_DIRECTORY: _judge_bitmaps,
}


def promise_problems(
    source: Source, header: Header, extensions: list[Extension], *, reading: bool
) -> Iterator[FormatError]:
    """What the header promises and the rest of it does not keep; for the data file, only who reads data asks."""
    if reading and header.autoclear_features & schema.RAW_DATA and not header.has_data_file:
        yield _bad(source, header, "autoclear_features", "data-file-raw requires a data file")
    luks = schema.CRYPT_METHODS.get(header.crypt_method) == "luks"
    if luks and not last_extension(extensions, schema.FULL_DISK_ENCRYPTION):
        message = f"Missing CRYPTO header for crypt method {header.crypt_method}"
        yield _bad(source, header, "crypt_method", message)


def size_problems(source: Source, header: Header) -> Iterator[FormatError]:
    """The very last thing that QEMU refuses: a virtual size that slipped through as its arithmetic wraps."""
    if header.size > MAX_OFFSET:
        yield _bad(source, header, "size", "Could not refresh total sector count: File too large")


def bitmap_warning(header: Header, extensions: list[Extension]) -> str | None:
    """QEMU's warning about bitmaps that a program without bitmap support may have made stale."""
    trusted = header.autoclear_features & schema.BITMAPS
    if trusted or not last_extension(extensions, schema.BITMAP_DIRECTORY):
        return None
    if header.version < 3:
        return (
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without "
            "persistent bitmap support; so now they must all be considered inconsistent"
        )
    return "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"


def read_backing_name(source: Source, header: Header) -> str | None:
    """The backing file's name as stored, None where there is none; FormatError where it is too long."""
    if not header.backing_file_offset:
        return None
    length = header.backing_file_size
    if length > min(MAX_BACKING_NAME, header.cluster_size - header.backing_file_offset):
        raise _bad(source, header, "backing_file_size", "Backing file name too long")
    return c_string(source.pread(length, header.backing_file_offset)) or None
