"""What is refused when a qcow2 image is opened, in which words, and what is not.

One row for each rule of QEMU's open path, in its order. The message of a row is what QEMU says, written
down; ours must begin with it, and the QEMU on PATH is asked whether it still says so. Every row stands for
one damage to a sound image, most of them to one field of the header.
"""

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from imgloop.cli import run
from tests.live import LIVE, complaint, qemu
from tests.patching import (
    BACKING_FORMAT,
    BITMAPS,
    DATA_FILE,
    ENCRYPTION,
    END,
    FEATURE_NAMES,
    FIELDS,
    MIB,
    build,
    extension,
)

NAME = "t.qcow2"
CLUSTER = 4096
FREE = 8 * CLUSTER  # where tables of a row's own may stand
FAR = 1 << 63  # one byte past the last offset that a file can have
REACH = FAR - (1 << 30)  # where QEMU's block layer ends
BOTH, INFO, MAP = ("info", "map"), ("info",), ("map",)


@dataclass(frozen=True)
class Row:
    """One image: its name as a test, how it differs from a sound one, and what QEMU says of it."""

    id: str
    message: str = ""  # empty: it is accepted
    fields: dict[str, int] = field(default_factory=dict)
    at: Mapping[int, bytes] = field(default_factory=dict)
    extensions: Iterable[bytes] = ()
    version: int = 3
    cluster_bits: int = 12
    size: int = MIB
    verbs: tuple[str, ...] = BOTH  # that say it
    culprit: str = ""  # the header field that we must name
    says: Mapping[str, object] = field(default_factory=dict)  # of an accepted one: what info must contain

    def write(self, folder: Path) -> None:
        """Put the image into a folder."""
        image = build(
            self.fields,
            self.at,
            version=self.version,
            cluster_bits=self.cluster_bits,
            size=self.size,
            extensions=self.extensions,
        )
        (folder / NAME).write_bytes(image)


def blame(id: str, message: str, culprit: str, value: int, **others: int) -> Row:
    """A row with one wrong header field (and perhaps others that it is wrong beside)."""
    return Row(id, message, {culprit: value, **others}, culprit=culprit)


def unknown(id: str, message: str, bits: int, *names: tuple[int, int, bytes]) -> Row:
    """A row with unknown incompatible features, and names for features: (type, bit, name)."""
    table = b"".join(struct.pack(">BB46s", *name) for name in names)
    return Row(
        id,
        f"Unsupported qcow2 feature(s): {message}",
        {"incompatible_features": bits},
        extensions=[extension(FEATURE_NAMES, table)] if names else [],
        culprit="incompatible_features",
    )


HEADER = [
    blame("magic", "Image is not in qcow2 format", "magic", 0x514649FC),
    blame("version 0", "Unsupported qcow2 version 0", "version", 0),
    blame("version 1", "Unsupported qcow2 version 1", "version", 1),
    blame("version 4", "Unsupported qcow2 version 4", "version", 4),
    blame("version 2^32-1", "Unsupported qcow2 version 4294967295", "version", 0xFFFFFFFF),
    blame("cluster_bits 0", "Unsupported cluster size: 2^0", "cluster_bits", 0),
    blame("cluster_bits 8", "Unsupported cluster size: 2^8", "cluster_bits", 8),
    blame("cluster_bits 22", "Unsupported cluster size: 2^22", "cluster_bits", 22),
    blame("cluster_bits 63", "Unsupported cluster size: 2^63", "cluster_bits", 63),
    blame("cluster_bits 2^32-1", "Unsupported cluster size: 2^4294967295", "cluster_bits", 0xFFFFFFFF),
    blame("header_length 0", "qcow2 header too short", "header_length", 0),
    blame("header_length 103", "qcow2 header too short", "header_length", 103),
    blame("header_length 4097", "qcow2 header exceeds cluster size", "header_length", 4097),
    blame("header_length 2^32-1", "qcow2 header exceeds cluster size", "header_length", 0xFFFFFFFF),
    blame("backing_file_offset", "Invalid backing file offset", "backing_file_offset", 4097),
    blame("backing_file_offset 2^64-1", "Invalid backing file offset", "backing_file_offset", 2**64 - 1),
    blame("compression 2", "qcow2: unknown compression type: 2", "compression_type", 2),
    blame("compression 255", "qcow2: unknown compression type: 255", "compression_type", 255, header_length=105),
    blame(
        "compression bit without type",
        "qcow2: Compression type incompatible feature bit must not be set",
        "incompatible_features",
        8,
    ),
    blame(
        "compression bit, type beyond the header",
        "qcow2: Compression type incompatible feature bit must not be set",
        "incompatible_features",
        8,
        compression_type=1,
        header_length=104,
    ),
    replace(
        blame(
            "compression type without bit",
            "qcow2: Compression type incompatible feature bit must be set",
            "compression_type",
            1,
        ),
        culprit="incompatible_features",
    ),
    unknown("feature 5", "Unknown incompatible feature: 20", 1 << 5),
    unknown("feature 63", "Unknown incompatible feature: 8000000000000000", 1 << 63),
    unknown(
        "features, some named",
        "my feature, other, Unknown incompatible feature: 10000000000",
        1 << 5 | 1 << 6 | 1 << 40,
        (0, 5, b"my feature"),
        (1, 40, b"compatible"),
        (0, 7, b"not set"),
        (0, 6, b"other"),
    ),
    unknown("feature named by bit 69", "wraps", 1 << 5, (0, 69, b"wraps")),
    unknown(
        "feature names end at an empty one",
        "first, Unknown incompatible feature: 40",
        1 << 5 | 1 << 6,
        (0, 5, b"first"),
        (0, 9, b""),
        (0, 6, b"unseen"),
    ),
    unknown("feature name of 46 bytes", "n" * 46, 1 << 5, (0, 5, b"n" * 46)),
    unknown("feature named twice", "one", 1 << 5, (0, 5, b"one"), (0, 5, b"two")),
    unknown("features in the table's order", "nine, five", 1 << 5 | 1 << 9, (0, 9, b"nine"), (0, 5, b"five")),
    Row(
        "feature names cut short",
        "Unsupported qcow2 feature(s): whole, part",
        {"incompatible_features": 1 << 5 | 1 << 6},
        extensions=[extension(FEATURE_NAMES, struct.pack(">BB46s", 0, 5, b"whole") + b"\0\6part")],
        culprit="incompatible_features",
    ),
    blame("subclusters 128", "Unsupported subcluster size: 128", "incompatible_features", 16),
    Row("subclusters 16", "Unsupported subcluster size: 16", {"incompatible_features": 16}, cluster_bits=9),
    Row("subclusters 256", "Unsupported subcluster size: 256", {"incompatible_features": 16}, cluster_bits=13),
    blame(
        "refcount_order 7",
        "Reference count entry width too large; may not exceed 64 bits",
        "refcount_order",
        7,
    ),
    blame(
        "refcount_order 2^32-1",
        "Reference count entry width too large; may not exceed 64 bits",
        "refcount_order",
        0xFFFFFFFF,
    ),
    blame("no refcount table", "Image does not contain a reference count table", "refcount_table_clusters", 0),
    blame("refcount table", "Reference count table too large", "refcount_table_clusters", 2049),
    blame("refcount table 2^32-1", "Reference count table too large", "refcount_table_clusters", 0xFFFFFFFF),
    blame("refcount table unaligned", "Reference count table offset invalid", "refcount_table_offset", 4104),
    blame("refcount table 2^64", "Reference count table offset invalid", "refcount_table_offset", 2**64 - CLUSTER),
    blame("refcount table 2^63", "Reference count table offset invalid", "refcount_table_offset", FAR - CLUSTER),
    blame("snapshots 65537", "Snapshot table too large", "nb_snapshots", 65537),
    blame("snapshots 2^32-1", "Snapshot table too large", "nb_snapshots", 0xFFFFFFFF),
    blame("snapshots_offset", "Snapshot table offset invalid", "snapshots_offset", 8),
    blame("snapshots_offset, one", "Snapshot table offset invalid", "snapshots_offset", 8, nb_snapshots=1),
    blame(
        "snapshots_offset 2^63",
        "Snapshot table offset invalid",
        "snapshots_offset",
        FAR - CLUSTER,
        nb_snapshots=CLUSTER // 40 + 1,
    ),
    blame("l1_size", "Active L1 table too large", "l1_size", 4194305),
    blame("l1_size 2^32-1", "Active L1 table too large", "l1_size", 0xFFFFFFFF),
    blame("l1 unaligned", "Active L1 table offset invalid", "l1_table_offset", 12290),
    blame("l1 unaligned, empty", "Active L1 table offset invalid", "l1_table_offset", 512, l1_size=0, size=0),
    blame("l1 2^63", "Active L1 table offset invalid", "l1_table_offset", FAR - CLUSTER, l1_size=513),
    blame("l1 2^64", "Active L1 table offset invalid", "l1_table_offset", 2**64 - CLUSTER),
    blame("size 2^63", "Image is too big", "size", FAR),
    blame("size 2^61", "Image is too big", "size", 1 << 61),
    blame("size by one sector", "L1 table is too small", "size", 2 * MIB + 512),
    blame("size by one byte", "L1 table is too small", "size", 2 * MIB + 1),
    blame("no l1", "L1 table is too small", "l1_size", 0),
    blame("l1 unreadable", "Could not read L1 table: Input/output error", "l1_table_offset", FAR - CLUSTER),
    blame("l1 just out of reach", "Could not read L1 table: Input/output error", "l1_table_offset", REACH),
    blame("crypt_method 3", "Unsupported encryption method 3", "crypt_method", 3),
    blame(
        "refcounts unreadable",
        "Could not initialize refcount handling: Input/output error",
        "refcount_table_offset",
        FAR - 2 * CLUSTER,
    ),
    Row(
        "luks without header",
        "Missing CRYPTO header for crypt method 2",
        {"crypt_method": 2},
        verbs=BOTH,
        culprit="crypt_method",
    ),
    blame("backing name 1024", "Backing file name too long", "backing_file_size", 1024, backing_file_offset=256),
    blame(
        "backing name over the cluster",
        "Backing file name too long",
        "backing_file_size",
        97,
        backing_file_offset=4000,
    ),
    blame(
        "backing name at the end", "Backing file name too long", "backing_file_size", 1, backing_file_offset=4096
    ),
    blame("size 2^64-1", "Could not refresh total sector count: File too large", "size", 2**64 - 1),
]
# "L1 table is too small" speaks of l1_size, whatever made it so; a subcluster's size is the cluster's
_CULPRITS = {"size by one": "l1_size", "subclusters": "cluster_bits"}
HEADER = [
    replace(row, culprit=next((_CULPRITS[key] for key in _CULPRITS if row.id.startswith(key)), row.culprit))
    for row in HEADER
]


def area(used: int, *parts: bytes) -> bytes:
    """Extensions after `used` bytes of header that come to an end 8 bytes before the first cluster does."""
    rest = b"".join(parts)
    return extension(0x12345678, bytes(CLUSTER - used - len(rest) - 16)) + rest


LARGE = "Header extension too large"
EXTENSIONS = [
    Row("extension too long", LARGE, extensions=[extension(0x1234, b"", length=CLUSTER)]),
    Row("extension too long by one", LARGE, extensions=[extension(0x1234, b"", length=CLUSTER - 112 - 8 + 1)]),
    Row("extension of 2^32-1", LARGE, extensions=[extension(0x1234, b"", length=0xFFFFFFFF)]),
    Row("end too long", LARGE, extensions=[extension(END, length=CLUSTER)]),
    Row(
        "half an extension",  # four bytes of room for a head of eight
        LARGE,
        {"backing_file_offset": 124, "backing_file_size": 4},
        {124: b"back"},
        extensions=[extension(0x1234)],
    ),
    Row(
        "half an end",  # even the end extension needs its eight bytes
        LARGE,
        {"backing_file_offset": 116, "backing_file_size": 4},
        {116: b"back"},
    ),
    Row(
        "backing format of 16",
        "ERROR: ext_backing_format: len=16 too large (>=16)",
        extensions=[extension(BACKING_FORMAT, b"0123456789abcdef")],
    ),
    Row(
        "luks extension in a plain image",
        "CRYPTO header extension only expected with LUKS encryption method",
        extensions=[extension(ENCRYPTION, bytes(16))],
    ),
    Row(
        "luks extension of an aes image",
        "CRYPTO header extension only expected with LUKS encryption method",
        {"crypt_method": 1},
        extensions=[extension(ENCRYPTION, bytes(16))],
    ),
    Row(
        "luks extension of 8",
        "CRYPTO header extension size 8, but expected size 16",
        {"crypt_method": 2},
        extensions=[extension(ENCRYPTION, bytes(8))],
    ),
    Row(
        "luks header unaligned",
        "Encryption header offset '513' is not a multiple of cluster size '4096'",
        {"crypt_method": 2},
        extensions=[extension(ENCRYPTION, struct.pack(">QQ", 513, 4096))],
    ),
    Row(
        "the first bad extension counts",
        "ERROR: ext_backing_format: len=17 too large (>=16)",
        extensions=[
            extension(BACKING_FORMAT, b"0123456789abcdefg"),
            extension(ENCRYPTION, bytes(16)),
            extension(0x1234, b"", length=0xFFFFFFFF),
        ],
    ),
    Row(
        "a bad extension before one too long",
        "CRYPTO header extension only expected with LUKS encryption method",
        extensions=[extension(ENCRYPTION, bytes(16)), extension(0x1234, b"", length=0xFFFFFFFF)],
    ),
]


def bitmaps(id: str, message: str, entries: bytes = b"", *, trusted: bool = True, **changes: int) -> Row:
    """A row with a bitmap extension and the directory that it names."""
    values = {"count": 1, "reserved": 0, "size": len(entries), "offset": FREE} | changes
    data = struct.pack(">IIQQ", *(values[key] for key in ("count", "reserved", "size", "offset")))
    return Row(
        id,
        message,
        {"autoclear_features": int(trusted)},
        {FREE: entries} if entries else {},
        extensions=[extension(BITMAPS, data)],
    )


TABLE = FREE + CLUSTER  # a bitmap table of zeros: past the end of the file


def entry(name: bytes = b"b0", **changes: int) -> bytes:
    """An entry of the bitmap directory; sound, for an image of one MiB."""
    values = {"table": TABLE, "entries": 1, "flags": 2, "type": 1, "bits": 16, "length": len(name), "extra": 0}
    values |= changes
    data = struct.pack(">QIIBBHI", *values.values()) + name
    return data + bytes(-len(data) % 8)


BROKEN = "Broken bitmap directory"
FAILS = "Bitmap 'b0' doesn't satisfy the constraints"
UNREAD = "Could not read bitmap_table table from image for bitmap 'b0': Invalid argument"
BITMAP = [
    Row(
        "bitmap extension of 16",
        "bitmaps_ext: Invalid extension length",
        {"autoclear_features": 1},
        extensions=[extension(BITMAPS, bytes(16))],
    ),
    Row(
        "bitmap extension of 16, not trusted",
        "bitmaps_ext: Invalid extension length",
        extensions=[extension(BITMAPS, bytes(16))],
    ),
    bitmaps("bitmaps reserved", "bitmaps_ext: Reserved field is not zero", entry(), reserved=1, count=65536),
    bitmaps(
        "bitmaps 65536",
        "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
        entry(),
        count=65536,
        offset=1,
    ),
    bitmaps("no bitmaps", "found bitmaps extension with zero bitmaps", entry(), count=0, offset=1),
    bitmaps("bitmaps offset", "bitmaps_ext: invalid bitmap directory offset", entry(), offset=8, size=1 << 40),
    bitmaps(
        "bitmaps directory of 64 MiB",
        "bitmaps_ext: bitmap directory size (67107841) exceeds the maximum supported size (67107840)",
        entry(),
        size=67107841,
    ),
    bitmaps(
        "bitmaps directory of 2^64-1",
        "bitmaps_ext: bitmap directory size (18446744073709551615) exceeds the maximum supported size (67107840)",
        entry(),
        size=2**64 - 1,
    ),
    bitmaps("directory of 0", "Requested bitmap directory size is zero", entry(), size=0),
    bitmaps(
        "directory unreadable",
        "Failed to read bitmap directory: Input/output error",
        size=32,
        offset=FAR - CLUSTER,
    ),
    bitmaps("entry cut in its head", BROKEN, entry()[:23]),
    bitmaps("entry cut in its name", BROKEN, entry()[:24]),
    bitmaps("entry cut in its padding", BROKEN, entry()[:26]),
    bitmaps("name over the end", BROKEN, entry(length=9)),
    bitmaps("extra bitmap data over the end", BROKEN, entry(extra=4096)),
    # 2^31 and more wrap around in QEMU's integers, so that the next test refuses them
    bitmaps("extra bitmap data of 2^32-1", "Bitmap extra data is not supported", entry(extra=0xFFFFFFFF)),
    bitmaps("second entry cut", BROKEN, entry() + entry(b"b1")[:16], count=2),
    bitmaps(
        "more bitmaps than said", "More bitmaps found than specified in header extension", entry() + entry(b"b1")
    ),
    bitmaps("less bitmaps than said", "Less bitmaps found than specified in header extension", entry(), count=2),
    bitmaps("extra bitmap data", "Bitmap extra data is not supported", entry(b"b0" + bytes(6), length=2, extra=4)),
    bitmaps("table_size 0", FAILS, entry(entries=0)),
    bitmaps("table_size 2^27+1", FAILS, entry(entries=0x8000001)),
    bitmaps("bitmap over 512 MiB", FAILS, entry(entries=131073)),
    bitmaps("table_offset 0", FAILS, entry(table=0)),
    bitmaps("table_offset unaligned", FAILS, entry(table=TABLE + 8)),
    bitmaps("granularity 8", FAILS, entry(bits=8)),
    bitmaps("granularity 32", FAILS, entry(bits=32)),
    bitmaps("granularity 255", FAILS, entry(bits=255)),
    bitmaps("flag 2", FAILS, entry(flags=4)),
    bitmaps("flag 31", FAILS, entry(flags=1 << 31)),
    bitmaps("type 0", FAILS, entry(type=0)),
    bitmaps("type 2", FAILS, entry(type=2)),
    bitmaps("in use, but unsound", FAILS, entry(flags=1, type=2)),
    replace(
        bitmaps("bitmap too short", FAILS, entry(bits=9)),
        size=16 * MIB + 512,
        fields={"autoclear_features": 1, "l1_size": 9},
    ),
    bitmaps(
        "name of 1024",
        f"Bitmap '{'n' * 1024}' doesn't satisfy the constraints",
        entry(b"n" * 1024),
    ),
    *(
        replace(
            bitmaps(f"bitmap table entry {word:#x}", UNREAD, entry()),
            at={FREE: entry(), TABLE: struct.pack(">Q", word)},
        )
        for word in (2, 0x100, 1 << 56, 1 << 63, 0x5001, 0x5200)
    ),
    bitmaps(
        "bitmap table unreadable",
        "Could not read bitmap_table table from image for bitmap 'b0': Input/output error",
        entry(table=FAR - CLUSTER),
    ),
    bitmaps(
        "bitmap table too long",
        "Could not read bitmap 'b0' from image: Invalid argument",
        entry(entries=2),
    ),
    bitmaps("bitmap twice", "Bitmap already exists: b0", entry() + entry(), count=2),
    bitmaps("bitmap twice, once in use", "Bitmap already exists: b0", entry(flags=1) + entry(), count=2),
]


def snapshot(
    name: bytes = b"snap", id: bytes = b"1", extra: bytes | None = None, *, extra_size: int | None = None
) -> bytes:
    """An entry of the snapshot table, padded."""
    extra = struct.pack(">QQQ", 0, MIB, 2**64 - 1) if extra is None else extra
    size = len(extra) if extra_size is None else extra_size
    head = struct.pack(">QIHHIIQII", 3 * CLUSTER, 1, len(id), len(name), 1700000000, 5, 7000000001, 0, size)
    data = head + extra + id + name
    return data + bytes(-len(data) % 8)


def snapshots(id: str, message: str, *entries: bytes, count: int | None = None, **fields: int) -> Row:
    """A row with a snapshot table."""
    fields = {"nb_snapshots": len(entries) if count is None else count, "snapshots_offset": FREE} | fields
    return Row(id, message, fields, {FREE: b"".join(entries)} if entries else {})


MUCH = "Too much extra metadata in snapshot table entry"
SNAPSHOT = [
    snapshots(
        "snapshot table unreadable",
        "Failed to read snapshot table: Input/output error",
        count=1,
        snapshots_offset=FAR - CLUSTER,
    ),
    snapshots("extra data of 1025", f"{MUCH} 0", snapshot(extra=bytes(1025))),
    snapshots("extra data of 2^32-1", f"{MUCH} 0", snapshot(extra_size=0xFFFFFFFF)),
    snapshots("extra data of the second", f"{MUCH} 1", snapshot(), snapshot(extra=bytes(1025))),
    # the first entry claims eight bytes less than it has, so the second is read from within it
    snapshots("extra data out of step", f"{MUCH} 1", snapshot(extra_size=16), snapshot(b"snap2"), count=2),
    # entries of the largest size there is: with 1024 bytes of extra data and names they fill 64 MiB
    snapshots(
        "snapshot table over 64 MiB",
        "Snapshot table is too big",
        *[snapshot(b"n" * 65535, b"i" * 65535, bytes(1024))] * 509,
    ),
]

NEEDED = "'data-file' is required for this image"
DATA = [
    Row("data file without a name", NEEDED, {"incompatible_features": 4}, verbs=MAP),
    Row(
        "data file that is not there",
        "Could not open 'missing.raw': No such file or directory",
        {"incompatible_features": 4},
        extensions=[extension(DATA_FILE, b"missing.raw")],
        verbs=MAP,
    ),
    Row(
        "data file by protocol",  # a plain name, whatever it looks like
        "Could not open 'file:t.qcow2': No such file or directory",
        {"incompatible_features": 4},
        extensions=[extension(DATA_FILE, b"file:t.qcow2")],
        verbs=MAP,
    ),
    Row(
        "data file by json",
        """Could not open 'json:{"driver":"file","filename":"t.qcow2"}': No such file or directory""",
        {"incompatible_features": 4},
        extensions=[extension(DATA_FILE, b'json:{"driver":"file","filename":"t.qcow2"}')],
        verbs=MAP,
    ),
    Row(
        "raw data without data file",
        "data-file-raw requires a data file",
        {"autoclear_features": 2},
        verbs=MAP,
        culprit="autoclear_features",
    ),
]


# --- of two damages, the one that QEMU looks at first is told ---------------------------------------------


def rules(rows: list[Row]) -> list[Row]:
    """The first row of each rule: messages that differ in more than a number, on images alike otherwise."""
    found = {re.sub(r"[0-9]+", "", row.message): row for row in reversed(rows) if row.cluster_bits == 12}
    return list(found.values())[::-1]


def both(first: Row, second: Row) -> Row:
    """A row with two damages."""
    return replace(first, id=f"{first.id} before {second.id}", fields=first.fields | second.fields, verbs=MAP)


ORDER = [
    both(first, second)
    for at, first in enumerate(rules(HEADER))
    for second in rules(HEADER)[at + 1 : at + 5]
    if first.culprit != second.culprit and not first.fields.keys() & second.fields.keys()
]


# --- what is accepted -------------------------------------------------------------------------------------


def backing(id: str, *, offset: int = 2048, name: bytes = b"base", says: Mapping[str, object], **more: Any) -> Row:
    """A row that names a backing file."""
    fields = {"backing_file_offset": offset, "backing_file_size": len(name)}
    return replace(Row(id, "", fields, {offset: name}, verbs=INFO, says=says), **more)


FORMAT = "backing-filename-format"
NO_FORMAT: dict[str, object] = {"backing-filename": "base", FORMAT: None}
SPECIFIC = "format-specific"
ACCEPTED = [
    Row("sound", says={"virtual-size": MIB, "dirty-flag": False, "cluster-size": CLUSTER}),
    Row("sound v2", version=2, says={"virtual-size": MIB}),
    Row("size down to a sector", fields={"size": MIB - 100}, says={"virtual-size": MIB - 512}),
    Row("size 511", fields={"size": 511}, says={"virtual-size": 0}),
    Row("size 0 without l1", fields={"size": 0, "l1_size": 0}, says={"virtual-size": 0}),
    Row("l1 out of reach, but empty", fields={"size": 0, "l1_size": 0, "l1_table_offset": FAR - CLUSTER}),
    Row("l1 at the end of reach", fields={"l1_table_offset": REACH - CLUSTER}),
    Row("l1 of 32 MiB", fields={"l1_size": 4194304}, verbs=INFO),
    Row("header_length 104", fields={"header_length": 104}),
    Row("header_length 105", fields={"header_length": 105}),
    Row("header_length of a cluster", fields={"header_length": CLUSTER}),
    Row("type beyond the header", fields={"header_length": 104, "compression_type": 7}),
    Row(
        "zstd",
        fields={"incompatible_features": 8, "compression_type": 1},
        says={SPECIFIC: {"compression-type": "zstd"}},
    ),
    Row(
        "zstd, header_length 105", fields={"incompatible_features": 8, "compression_type": 1, "header_length": 105}
    ),
    Row("padding of the header", at={105: b"\xff" * 7}),
    Row(
        "compatible features",
        fields={"compatible_features": 2**64 - 2},
        says={SPECIFIC: {"lazy-refcounts": False}},
    ),
    Row("lazy refcounts", fields={"compatible_features": 1}, says={SPECIFIC: {"lazy-refcounts": True}}),
    Row("autoclear features", fields={"autoclear_features": 2**64 - 4}),
    Row("bitmaps bit alone", fields={"autoclear_features": 1}),
    Row("dirty", fields={"incompatible_features": 1}, says={"dirty-flag": True}),
    Row("corrupt", fields={"incompatible_features": 2}, says={SPECIFIC: {"corrupt": True}}),
    Row("refcount table at 0", fields={"refcount_table_offset": 0}),
    Row("refcount table of 8 MiB", fields={"refcount_table_clusters": 2048}),
    Row("refcount_order 0", fields={"refcount_order": 0}, says={SPECIFIC: {"refcount-bits": 1}}),
    Row("refcount_order 6", fields={"refcount_order": 6}, says={SPECIFIC: {"refcount-bits": 64}}),
    Row("backing_file_size without offset", fields={"backing_file_size": 0xFFFFFFFF}),
    Row("empty backing name at the end", fields={"backing_file_offset": CLUSTER}, says={"backing-filename": None}),
    Row("empty backing name", fields={"backing_file_offset": 512}, says={"backing-filename": None}),
    Row(
        "backing name of NUL",
        fields={"backing_file_offset": 512, "backing_file_size": 5},
        says={"backing-filename": None},
    ),
    backing("backing name", says=NO_FORMAT),
    backing("backing name of 1023", name=b"b" * 1023, says={"backing-filename": "b" * 1023}),
    backing("backing name up to the cluster's end", offset=CLUSTER - 4, says=NO_FORMAT),
    backing("backing name cut at NUL", name=b"base\0rest", says=NO_FORMAT),
    backing("backing format", says={FORMAT: "raw"}, extensions=[extension(BACKING_FORMAT, b"raw")]),
    backing(
        "backing format of 15",
        says={FORMAT: "123456789012345"},
        extensions=[extension(BACKING_FORMAT, b"123456789012345")],
    ),
    backing(
        "the last backing format",
        says={FORMAT: "qcow2"},
        extensions=[extension(BACKING_FORMAT, b"raw"), extension(BACKING_FORMAT, b"qcow2")],
    ),
    backing("backing format cut at NUL", says={FORMAT: "raw"}, extensions=[extension(BACKING_FORMAT, b"raw\0x")]),
    backing("empty backing format", says=NO_FORMAT, extensions=[extension(BACKING_FORMAT, b"")]),
    backing(
        "extensions end at the name",  # no end extension, and none is needed
        offset=128,
        says={FORMAT: "raw"},
        extensions=[extension(BACKING_FORMAT, b"raw")],
    ),
    backing(
        "padding over the end",  # the name stands where the last extension's padding would be
        offset=123,
        says={FORMAT: "raw"},
        extensions=[extension(BACKING_FORMAT, b"raw")],
    ),
    backing(
        "nothing after the end", says=NO_FORMAT, extensions=[extension(END), extension(BACKING_FORMAT, b"raw")]
    ),
    backing(
        "end with a length",
        says=NO_FORMAT,
        extensions=[extension(END, length=1000), extension(BACKING_FORMAT, b"raw")],
    ),
    Row(
        "name within the header: no extensions",
        fields={"header_length": 200, "backing_file_offset": 150, "backing_file_size": 4},
        at={150: b"base", 200: extension(BACKING_FORMAT, b"0123456789abcdef")},  # would be refused
        verbs=INFO,
        says=NO_FORMAT,
    ),
    Row(
        "name from the header's fields",
        fields={"backing_file_offset": 1, "backing_file_size": 3},
        verbs=INFO,
        says=NO_FORMAT | {"backing-filename": "FI\ufffd"},
    ),
    backing("v2 backing format", version=2, says={FORMAT: "raw"}, extensions=[extension(BACKING_FORMAT, b"raw")]),
    Row(
        "unknown extensions",
        extensions=[extension(0x1234, b"abc"), extension(0x1234), extension(0xFFFFFFFF, bytes(99))],
    ),
    Row("extension to the end", extensions=[extension(0x1234, bytes(CLUSTER - 120))]),
    Row(
        "extensions to the end, no room for an end",
        extensions=[extension(0x1234, bytes(CLUSTER - 128)), extension(0x99)],
    ),
    Row("feature names nobody asks for", extensions=[extension(FEATURE_NAMES, b"\1" * 47)]),
    Row(
        "data file name without the bit",
        extensions=[extension(DATA_FILE, b"/nowhere")],
        says={SPECIFIC: {"data-file": "/nowhere"}},
    ),
    Row(
        "data file",
        fields={"incompatible_features": 4},
        extensions=[extension(DATA_FILE, b"missing.raw")],
        verbs=INFO,
        says={SPECIFIC: {"data-file": "missing.raw", "data-file-raw": False}},
    ),
    Row(
        "data file without a name",
        fields={"incompatible_features": 4},
        verbs=INFO,
        says={SPECIFIC: {"data-file": None}},
    ),
    Row("raw data without data file", fields={"autoclear_features": 2}, verbs=INFO),
    Row(
        "extended l2",
        fields={"incompatible_features": 16},
        cluster_bits=14,
        says={SPECIFIC: {"extended-l2": True}},
    ),
    Row("cluster_bits 9", cluster_bits=9, size=32768, says={"cluster-size": 512}),
    Row("cluster_bits 21", cluster_bits=21, says={"cluster-size": 2 * MIB}),
    # version 2 has neither features nor lengths: the same bytes are the first extension there
    Row("v2 with feature bits", version=2, fields={"incompatible_features": 0x20}),
    Row(
        "v2 with other fields", version=2, fields={"refcount_order": 99, "header_length": 9, "compression_type": 9}
    ),
    Row("v2 with autoclear bit 1", version=2, fields={"autoclear_features": 2}),
    snapshots("snapshots_offset without snapshots", "", count=0),
    snapshots("snapshots out of reach, but none", "", count=0, snapshots_offset=FAR - CLUSTER),
    snapshots("snapshot past the end of the file", "", count=1, snapshots_offset=1 << 40),
    replace(snapshots("snapshot", "", snapshot()), says={"snapshots": [{"id": "1", "name": "snap"}]}),
    snapshots("snapshot without extra data", "", snapshot(extra=b"")),
    snapshots("snapshot with 8 bytes of extra data", "", snapshot(extra=bytes(8))),
    snapshots("snapshot with icount", "", snapshot(extra=struct.pack(">QQQ", 1 << 33, MIB, 77))),
    snapshots("snapshot with 1024 bytes of extra data", "", snapshot(extra=bytes(1024))),
    snapshots("snapshots of odd lengths", "", snapshot(b"a"), snapshot(b"bb", b"22"), snapshot(b"", b"")),
    replace(
        snapshots("snapshot names with NUL", "", snapshot(b"sn\0ap", b"1\0001")),
        says={"snapshots": [{"id": "1", "name": "sn"}]},
    ),
    bitmaps("bitmap", "", entry()),
    bitmaps("bitmap of granularity 31", "", entry(bits=31)),
    bitmaps("bitmap in use", "", entry(flags=1, entries=5)),
    bitmaps("bitmap in use, table unreadable", "", entry(flags=3, table=FAR - CLUSTER)),
    bitmaps("bitmap with a name of 1023", "", entry(b"n" * 1023)),
    bitmaps("bitmaps", "", entry() + entry(b"another"), count=2),
    replace(bitmaps("bitmap of ones", "", entry()), at={FREE: entry(), TABLE: struct.pack(">Q", 1)}),
    replace(bitmaps("bitmap with bits", "", entry()), at={FREE: entry(), TABLE: struct.pack(">Q", 5 * CLUSTER)}),
    bitmaps("bitmaps not trusted", "", b"\xff" * 24, trusted=False),
    bitmaps("bitmaps not trusted, unsound", "", trusted=False, count=0, reserved=1, offset=1),
]

REFUSED = [*HEADER, *EXTENSIONS, *BITMAP, *SNAPSHOT, *DATA, *ORDER]


def cases(rows: Iterable[Row]) -> list[Any]:
    """A test for each verb of each row."""
    return [pytest.param(row, verb, id=f"{row.id}-{verb}") for row in rows for verb in row.verbs]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(verb: str) -> list[str]:
    """The words of a command, ours and QEMU's alike."""
    return [verb, "-f", "qcow2", "--output=json", NAME]


@pytest.mark.parametrize(("row", "verb"), cases(REFUSED))
def test_refused(row: Row, verb: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row.write(folder)
    assert run(ask(verb)) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    prefix = f"imgloop: error: Could not open '{NAME}': {row.message}"
    assert err.startswith(prefix)
    place = err.removeprefix(prefix).rstrip("\n")
    assert place == "" or (place.startswith(" [") and place.endswith("]"))
    if row.culprit:
        image = (folder / NAME).read_bytes()
        offset, layout = FIELDS[row.culprit]
        value = struct.unpack_from(layout, image, offset)[0]
        assert place == f" [{row.culprit} at offset {offset:#x} of '{NAME}' is {value} ({value:#x})]"


@LIVE
@pytest.mark.parametrize(("row", "verb"), cases(REFUSED))
def test_qemu_refuses(row: Row, verb: str, folder: Path) -> None:
    row.write(folder)
    done = qemu("qemu-img", *ask(verb), cwd=folder)
    if row.id == "luks without header" and verb == "info" and done.returncode < 0:
        pytest.skip("this QEMU crashes on such an image")
    assert done.returncode == 1
    assert complaint(done) == f"Could not open '{NAME}': {row.message}"


@pytest.mark.parametrize(("row", "verb"), cases(ACCEPTED))
def test_accepted(row: Row, verb: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row.write(folder)
    assert run(ask(verb)) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    if verb == "info":
        assert lacking(json.loads(out), row.says) == {}


@LIVE
@pytest.mark.parametrize(("row", "verb"), cases(ACCEPTED))
def test_qemu_says_the_same(row: Row, verb: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row.write(folder)
    run(ask(verb))
    ours = json.loads(capfd.readouterr().out)
    done = qemu("qemu-img", *ask(verb), cwd=folder)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert comparable(ours) == comparable(theirs)


def comparable(said: Any) -> Any:
    """What is to be compared of info's or map's JSON: not what belongs to the file system or to new QEMUs."""
    if isinstance(said, list):
        return [comparable(one) for one in said]
    if isinstance(said, dict):
        skipped = ("children", "actual-size", "compressed")
        return {key: comparable(value) for key, value in said.items() if key not in skipped}
    return said


def lacking(found: Mapping[str, object], wanted: Mapping[str, object]) -> dict[str, object]:
    """What of `wanted` is not so in `found` (info's JSON): None stands for a key that is not there."""
    missing: dict[str, object] = {}
    for key, value in wanted.items():
        have = found.get(key)
        if isinstance(value, Mapping):
            assert isinstance(have, dict)
            missing |= lacking(have["data"], value)
        elif isinstance(value, list):
            assert isinstance(have, list)
            if any(lacking(one, want) for one, want in zip(have, value, strict=True)):
                missing[key] = have
        elif have != value:
            missing[key] = have
    return missing
