"""What guest bytes an image gives, entry by entry, and which entries cannot be read.

One row for each rule of QEMU's read path: an image whose tables are written by hand, a guest range, and what
is read there. Bytes are given as such; `Refused` holds QEMU's words (none: an I/O error without any). The
QEMU on PATH reads the same ranges.
"""

import errno
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import imgloop
from imgloop import CorruptError, Gate, ImageError, Trust
from imgloop.formats.qcow2.compression import DecodeError, inflate, inflate_fast
from tests.live import LIVE, qemu
from tests.patching import (
    BACKING_FORMAT,
    COMPRESSED,
    COPIED,
    DATA,
    DATA_FILE,
    MIB,
    ZERO,
    build,
    extension,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NAME = "t.qcow2"
K = 1024
CLUSTER = 4 * K
TABLE = 3 * CLUSTER  # the L1 table of `build`
HOST = 5 * CLUSTER  # the data cluster of `build`
BEYOND = 1 << 40  # far past the end of every file here
RESERVED = 0x3F000000000001FE  # of a standard L2 entry
ZEROS = bytes(CLUSTER)
HERE = DATA(CLUSTER)


@dataclass(frozen=True)
class Refused:
    """A read that fails, and what QEMU says of the image; it says nothing of compressed streams."""

    words: str = ""


@dataclass(frozen=True)
class Row:
    """One image, what else lies beside it, a guest range, and what is read there."""

    id: str
    expected: bytes | Refused
    image: bytes
    start: int = 0
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Bytes to read."""
        return len(self.expected) if isinstance(self.expected, bytes) else 512

    def write(self, folder: Path) -> None:
        """Put the image and its companions into a folder."""
        for name, data in {NAME: self.image, **self.files}.items():
            (folder / name).write_bytes(data)


def entry(id: str, expected: bytes | Refused, word: int, **build_arguments: Any) -> Row:
    """A row whose first cluster has the L2 entry `word`."""
    return Row(id, expected, build(l2={0: word}, **build_arguments))


# --- L1 and standard L2 entries ---------------------------------------------------------------------------

STANDARD = [
    entry("data", HERE, COPIED | HOST),
    entry("data, copied bit clear", HERE, HOST),
    entry("data, reserved bits", HERE, HOST | RESERVED),
    entry("unallocated", ZEROS, 0),
    entry("unallocated, reserved bits", ZEROS, RESERVED),
    entry("copied bit alone", ZEROS, COPIED),
    entry("zero", ZEROS, ZERO),
    entry("zero, cluster kept", ZEROS, COPIED | HOST | ZERO),
    entry("zero, reserved bits", ZEROS, HOST | ZERO | RESERVED),
    entry(
        "zero, cluster kept at an impossible place",
        Refused("Cluster allocation offset 0x5200 unaligned (L2 offset: 0x4000, L2 index: 0)"),
        HOST | 0x200 | ZERO,
    ),
    entry(
        "data unaligned",
        Refused("Cluster allocation offset 0x5200 unaligned (L2 offset: 0x4000, L2 index: 0)"),
        COPIED | HOST | 0x200,
    ),
    entry("data past the end", ZEROS, BEYOND),
    entry("data as far as an entry reaches", ZEROS, 0x00FFFFFFFFFFF000),
    Row("data over the end", HERE[:100] + bytes(CLUSTER - 100), build(l2={0: HOST})[: HOST + 100]),
    entry("data at the refcount table", struct.pack(">Q", 2 * CLUSTER) + bytes(CLUSTER - 8), CLUSTER),
    entry("data at the L2 table itself", struct.pack(">Q", 4 * CLUSTER) + bytes(CLUSTER - 8), 4 * CLUSTER),
    Row("two entries, one cluster", HERE * 2, build(l2={0: HOST, 1: HOST})),
    Row(
        "entries in reverse",
        DATA(2 * CLUSTER)[CLUSTER:] + HERE,
        build({}, {HOST: DATA(2 * CLUSTER)}, l2={0: HOST + CLUSTER, 1: HOST}),
    ),
    Row("from within a cluster", HERE[512:] + ZEROS[:512], build(), start=512),
    Row("across unlike entries", HERE + ZEROS + ZEROS + HERE, build(l2={0: HOST, 1: ZERO, 3: HOST})),
    Row("the last cluster", HERE, build(l2={255: HOST}), start=MIB - CLUSTER),
    Row(
        "the last sector of an odd size",
        HERE[512:1024],
        build(l2={1: HOST}, size=CLUSTER + 1024),
        start=CLUSTER + 512,
    ),
    Row(
        "bad entry further on",
        Refused("Cluster allocation offset 0x5e00 unaligned (L2 offset: 0x4000, L2 index: 0x11)"),
        build(l2={0x11: 0x5E00}),
        start=0x11000,
    ),
    # L1 entries
    Row("l1 0", ZEROS, build({}, {TABLE: bytes(8)})),
    Row("l1 reserved bits alone", ZEROS, build({}, {TABLE: struct.pack(">Q", 0xFF000000000001FF)})),
    Row("l1 reserved bits", HERE, build({}, {TABLE: struct.pack(">Q", 0xFF000000000001FF | 4 * CLUSTER)})),
    Row("l2 table past the end", ZEROS, build({}, {TABLE: struct.pack(">Q", BEYOND)})),
    Row(
        "l2 table over the end",
        HERE + ZEROS,
        build({}, {TABLE: struct.pack(">Q", 6 * CLUSTER), 6 * CLUSTER: struct.pack(">Q", HOST)}),
    ),
    Row(
        "l2 table unaligned",
        Refused("L2 table offset 0x4200 unaligned (L1 index: 0)"),
        build({}, {TABLE: struct.pack(">Q", COPIED | 0x4200)}),
    ),
    Row(
        "second l2 table unaligned",
        Refused("L2 table offset 0x4e00 unaligned (L1 index: 0x1)"),
        build({"l1_size": 2}, {TABLE + 8: struct.pack(">Q", 0x4E00)}, size=4 * MIB),
        start=2 * MIB,
    ),
    Row(
        "beside an unaligned l2 table",
        HERE,
        build({"l1_size": 2}, {TABLE + 8: struct.pack(">Q", 0x4E00)}, size=4 * MIB),
    ),
    Row(
        "two l1 entries, one table",
        HERE,
        build({"l1_size": 2}, {TABLE + 8: struct.pack(">Q", 4 * CLUSTER)}, size=4 * MIB),
        start=2 * MIB,
    ),
    # version 2
    entry("v2 data", HERE, COPIED | HOST, version=2),
    entry(
        "v2 zero",
        Refused("Zero cluster entry found in pre-v3 image (L2 offset: 0x4000, L2 index: 0)"),
        ZERO,
        version=2,
    ),
    entry(
        "v2 zero, cluster kept",
        Refused("Zero cluster entry found in pre-v3 image (L2 offset: 0x4000, L2 index: 0)"),
        COPIED | HOST | ZERO,
        version=2,
    ),
    entry(
        "v2 zero, cluster kept at an impossible place",
        Refused("Zero cluster entry found in pre-v3 image (L2 offset: 0x4000, L2 index: 0)"),
        HOST | 0x200 | ZERO,
        version=2,
    ),
    entry("512-byte clusters", DATA(512), COPIED | 5 * 512, cluster_bits=9, size=32 * K),
    entry("2 MiB clusters", DATA(2 * MIB), COPIED | 10 * MIB, cluster_bits=21, size=4 * MIB),
]


# --- compressed clusters ----------------------------------------------------------------------------------


def pack(data: bytes, wbits: int = -12, flush: int = zlib.Z_FINISH) -> bytes:
    """A raw deflate stream, as QEMU writes it."""
    encoder = zlib.compressobj(6, zlib.DEFLATED, wbits, 9)
    return encoder.compress(data) + encoder.flush(flush)


def stored(
    id: str,
    expected: bytes | Refused,
    stream: bytes,
    *,
    offset: int | None = None,
    sectors: int | None = None,
    copied: int = 0,
    cluster_bits: int = 12,
    kind: int = 0,
    end: int | None = None,
) -> Row:
    """A row whose first cluster is compressed: `stream` at `offset`, whose entry counts `sectors` more than one.

    Zeros follow it up to the sector's end. `kind` is the compression type; `end` cuts the file there.
    """
    cluster = 1 << cluster_bits
    offset = 6 * cluster if offset is None else offset
    if sectors is None:
        sectors = (offset % 512 + len(stream) - 1) // 512
    x = 62 - (cluster_bits - 8)
    assert sectors < 1 << cluster_bits - 8
    word = copied | COMPRESSED | sectors << x | offset
    fields = {"incompatible_features": 8, "compression_type": kind} if kind else {}
    tail = stream + bytes(-(offset + len(stream)) % 512)
    size = min(MIB, cluster * cluster // 8) if cluster < MIB else cluster
    image = build(fields, {offset: tail}, cluster_bits=cluster_bits, size=size, l2={0: word})
    return Row(id, expected, image[:end])


# thousands of different bytes that compress to about half: nothing in it is near to its like
TEXT = b"".join(b"%05x" % (n * 7919 % 1048573) for n in range(CLUSTER))[:CLUSTER]
NOISE = bytes(zlib.crc32(b"%d" % n) & 0xFF for n in range(16 * K))
SMALL = pack(TEXT)
PLAIN = struct.pack("<BHH", 1, CLUSTER, CLUSTER ^ 0xFFFF) + TEXT  # five bytes, and then the text as it is
DEFLATE = [
    stored("deflate", TEXT, SMALL),
    stored("deflate, copied bit", TEXT, SMALL, copied=COPIED),
    stored("deflate within a sector", TEXT, SMALL, offset=6 * CLUSTER + 77),
    stored("deflate at an odd place", TEXT, SMALL, offset=6 * CLUSTER + 511),
    stored("deflate of zeros", ZEROS, pack(ZEROS)),
    stored("deflate of two clusters", TEXT, pack(TEXT * 2)),
    stored("deflate with more behind it", TEXT, SMALL + NOISE[:200]),
    stored("deflate without compression", TEXT, PLAIN),
    stored("deflate of too little", Refused(), pack(TEXT[:-1])),
    stored("deflate of nothing", Refused(), pack(b"")),
    stored("deflate with a zlib head", Refused(), zlib.compress(TEXT)),
    stored("deflate with a gzip head", Refused(), pack(TEXT, 31)),
    stored("garbage as deflate", Refused(), b"\xff" * 512),
    stored("zeros as deflate", Refused(), bytes(512)),
    stored("zstd as deflate", Refused(), zstd.compress(TEXT)),
    stored("deflate cut by its entry", Refused(), SMALL, sectors=len(SMALL) // 512 - 1),
    stored("deflate with sectors to spare", TEXT, SMALL, sectors=15),
    stored("deflate past the end", Refused(), SMALL, end=6 * CLUSTER),
    stored("deflate over the end", TEXT[:1000] + bytes(3096), PLAIN, end=6 * CLUSTER + 1005),
    stored("deflate up to the end", TEXT, SMALL, end=6 * CLUSTER + len(SMALL)),
    stored("damage where the cluster is full", Refused(), pack(TEXT, -12, zlib.Z_SYNC_FLUSH) + b"\x07\xff\xff"),
    stored("damage behind the cluster", TEXT, pack(TEXT * 2)[:-40] + b"\xff" * 40),
    # back-references beyond the 4 KiB that QEMU's own window has
    stored("window of 32 KiB", NOISE * 4, pack(NOISE * 4, -15), cluster_bits=16),
    stored(
        "window of 16 KiB",
        (NOISE[: 10 * K] * 7)[: 64 * K],
        pack((NOISE[: 10 * K] * 7)[: 64 * K], -14),
        cluster_bits=16,
    ),
    stored("deflate, 512-byte clusters", TEXT[:512], pack(TEXT[:512]), cluster_bits=9),
    stored("deflate, 2 MiB clusters", TEXT * 512, pack(TEXT * 512), cluster_bits=21),
]


def frame(data: bytes, checksum: bool = False) -> bytes:
    """A zstd frame that knows its size."""
    options = {zstd.CompressionParameter.checksum_flag.value: int(checksum)}
    return zstd.compress(data, options=options)


def frame_in_pieces(data: bytes) -> bytes:
    """A zstd frame that does not know its size, of several blocks."""
    encoder = zstd.ZstdCompressor()
    pieces = [
        encoder.compress(data[at : at + 1000], zstd.ZstdCompressor.FLUSH_BLOCK) for at in range(0, len(data), 1000)
    ]
    return b"".join(pieces) + encoder.flush()


def unfinished(data: bytes) -> bytes:
    """A zstd frame with all of its bytes but without its end."""
    return bytes(zstd.ZstdCompressor().compress(data, zstd.ZstdCompressor.FLUSH_BLOCK))


FRAME = frame(TEXT)
SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"aside"
CHECKED = frame(TEXT, checksum=True)
ZSTD = [
    stored(f"zstd: {id}", expected, stream, kind=1, **more)
    for id, expected, stream, more in (
        ("frame", TEXT, FRAME, {}),
        ("frame at an odd place", TEXT, FRAME, {"offset": 6 * CLUSTER + 511}),
        ("frame in pieces", TEXT, frame_in_pieces(TEXT), {}),
        ("two frames", TEXT, frame(TEXT[:100]) + frame(TEXT[100:]), {}),
        ("many frames", TEXT, b"".join(frame(TEXT[at : at + 512]) for at in range(0, CLUSTER, 512)), {}),
        ("empty frames first", TEXT, frame(b"") * 2 + FRAME, {}),
        ("skippable frame first", TEXT, SKIPPABLE + FRAME, {}),
        ("skippable frame between", TEXT, frame(TEXT[:100]) + SKIPPABLE + frame(TEXT[100:]), {}),
        ("garbage behind", TEXT, FRAME + b"\xff" * 60, {}),
        ("checksum", TEXT, CHECKED, {}),
        ("wrong checksum", Refused(), CHECKED[:-1] + bytes([CHECKED[-1] ^ 1]), {}),
        ("frame too long", Refused(), frame(TEXT + b"x"), {}),
        ("frame of two clusters", Refused(), frame(TEXT * 2), {}),
        ("frame too short", Refused(), frame(TEXT[:-1]), {}),
        ("frame too short, then garbage", Refused(), frame(TEXT[:-1]) + b"garbage!", {}),
        ("second frame too long", Refused(), frame(TEXT[:100]) + FRAME, {}),
        ("unfinished", Refused(), unfinished(TEXT), {}),
        ("cut by its entry", Refused(), FRAME, {"sectors": len(FRAME) // 512 - 1}),
        ("past the end", Refused(), FRAME, {"end": 6 * CLUSTER}),
        ("garbage", Refused(), b"\xff" * 512, {}),
        ("zeros", Refused(), bytes(512), {}),
        ("deflate", Refused(), SMALL, {}),
        ("a window of 128 GiB", Refused(), b"\x28\xb5\x2f\xfd\x00\xd8\x01\x00\x00", {}),
        ("2 MiB", TEXT * 512, frame(TEXT * 512), {"cluster_bits": 21}),
    )
]


# --- extended L2 entries ----------------------------------------------------------------------------------

WIDE = 16 * K  # clusters of 32 subclusters with 512 bytes each
WIDE_HOST = 5 * WIDE
WIDE_DATA = DATA(WIDE)


def extended(id: str, expected: bytes | Refused, word: int, bitmap: int, start: int = 0, **more: Any) -> Row:
    """A row whose first cluster has an extended L2 entry; subcluster n starts at n * 512."""
    fields = {"incompatible_features": 16}
    return Row(id, expected, build(fields, cluster_bits=14, l2={0: (word, bitmap)}, **more), start)


def zero(*numbers: int) -> int:
    """The bits for subclusters that read as zeros."""
    return sum(1 << 32 + n for n in numbers)


def allocated(*numbers: int) -> int:
    """The bits for subclusters that are in the host cluster."""
    return sum(1 << n for n in numbers)


def sub(*numbers: int | None) -> bytes:
    """The bytes of subclusters of the data cluster; None stands for zeros."""
    return b"".join(bytes(512) if n is None else WIDE_DATA[512 * n : 512 * n + 512] for n in numbers)


LONG = pack(TEXT * 4)
INVALID = Refused("Invalid cluster entry found (L2 offset: 0x10000, L2 index: 0)")
UNALIGNED = Refused("Cluster allocation offset 0x14200 unaligned (L2 offset: 0x10000, L2 index: 0)")
EXTENDED = [
    extended("extended: all allocated", WIDE_DATA, COPIED | WIDE_HOST, 0xFFFFFFFF),
    extended("extended: none allocated", bytes(WIDE), COPIED | WIDE_HOST, 0),
    extended("extended: some allocated", sub(0, None, 2, None), COPIED | WIDE_HOST, allocated(0, 2)),
    extended("extended: the last allocated", sub(None, 31), WIDE_HOST, allocated(31), start=30 * 512),
    extended("extended: zero", sub(0, None, 2), WIDE_HOST, allocated(0, 2) | zero(1)),
    extended("extended: all zero", bytes(WIDE), WIDE_HOST, 0xFFFFFFFF << 32),
    extended("extended: zero without a cluster", bytes(WIDE), 0, zero(0, 31)),
    extended("extended: unallocated", bytes(WIDE), 0, 0),
    extended("extended: bit 0 means nothing", WIDE_DATA, WIDE_HOST | 1, 0xFFFFFFFF),
    extended("extended: bit 0 means nothing without a cluster", bytes(WIDE), 1, 0),
    extended("extended: reserved bits", WIDE_DATA, WIDE_HOST | RESERVED, 0xFFFFFFFF),
    extended("extended: both bits", INVALID, WIDE_HOST, allocated(0) | zero(0)),
    extended("extended: both bits elsewhere", INVALID, WIDE_HOST, allocated(0, 31) | zero(31)),
    extended("extended: both bits elsewhere, a hole", INVALID, WIDE_HOST, allocated(31) | zero(31)),
    extended("extended: allocated without a cluster", INVALID, 0, allocated(0)),
    extended("extended: allocated without a cluster elsewhere", INVALID, 0, allocated(31) | zero(0)),
    extended("extended: allocated, copied bit alone", INVALID, COPIED, allocated(3)),
    extended("extended: unaligned", UNALIGNED, WIDE_HOST | 0x200, allocated(0)),
    extended("extended: unaligned, zero", UNALIGNED, WIDE_HOST | 0x200, zero(0)),
    extended("extended: unaligned, none allocated", UNALIGNED, WIDE_HOST | 0x200, 0),
    extended("extended: both bits and unaligned", INVALID, WIDE_HOST | 0x200, allocated(5) | zero(5)),
    extended("extended: past the end", bytes(WIDE), BEYOND, 0xFFFFFFFF),
    *(
        Row(
            f"extended: compressed, bitmap {bitmap:#x}",
            (TEXT * 4)[512:1024],
            build(
                {"incompatible_features": 16},
                {6 * WIDE: LONG},
                cluster_bits=14,
                l2={0: (COMPRESSED | len(LONG) // 512 << 56 | 6 * WIDE, bitmap)},
            ),
            start=512,
        )
        for bitmap in (0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, zero(1))
    ),
    Row(
        "extended: second entry",
        sub(0, None),
        build({"incompatible_features": 16}, cluster_bits=14, l2={1: (WIDE_HOST, allocated(0))}),
        start=WIDE,
    ),
]


# --- backing files ----------------------------------------------------------------------------------------


def over(id: str, expected: bytes | Refused, base: bytes, format: str, start: int = 0, **more: Any) -> Row:
    """A row with a backing file; nothing is allocated in the overlay unless told otherwise."""
    arguments = {"l2": {}} | more
    fields = {"backing_file_offset": 2048, "backing_file_size": 4} | arguments.pop("fields", {})
    image = build(fields, {2048: b"base"}, extensions=[extension(BACKING_FORMAT, format.encode())], **arguments)
    return Row(id, expected, image, start, {"base": base})


BASE = DATA(2 * CLUSTER)
BACKING = [
    over("backing: raw", BASE, BASE, "raw"),
    over("backing: raw, to its end and on", BASE[CLUSTER:] + ZEROS, BASE, "raw", start=CLUSTER),
    over("backing: raw, beyond its end", ZEROS, BASE, "raw", start=8 * CLUSTER),
    over("backing: raw of odd length", BASE[:700] + bytes(CLUSTER - 700), BASE[:700], "raw"),
    over("backing: empty raw", ZEROS, b"", "raw"),
    over("backing: under data", HERE + BASE[CLUSTER:], BASE[::-1][:CLUSTER] + BASE[CLUSTER:], "raw", l2={0: HOST}),
    over("backing: under zeros", ZEROS + BASE[CLUSTER:], BASE, "raw", l2={0: ZERO, 1: 0}),
    over("backing: under zeros with a cluster", ZEROS + BASE[CLUSTER:], BASE, "raw", l2={0: HOST | ZERO}),
    over("backing: under the copied bit", BASE, BASE, "raw", l2={0: COPIED}),
    over(
        "backing: under an empty l1 entry",
        BASE,
        BASE,
        "raw",
        size=4 * MIB,
        fields={"l1_size": 2, "l1_table_offset": 8 * CLUSTER},
    ),
    over("backing: longer than the overlay", BASE[512:1024], BASE, "raw", start=512, size=1024),
    over("backing: qcow2", HERE + ZEROS, build(), "qcow2"),
    over("backing: shorter qcow2", HERE[:1024] + bytes(CLUSTER), build(size=1024), "qcow2"),
    over("backing: qcow2 of odd size", HERE[:512] + bytes(CLUSTER), build(size=1023), "qcow2"),
    over("backing: qcow2 as raw", build()[:CLUSTER], build(), "raw"),
    over(
        "backing: damaged",
        Refused("Cluster allocation offset 0x5200 unaligned (L2 offset: 0x4000, L2 index: 0)"),
        build(l2={0: 0x5200}),
        "qcow2",
    ),
    over("backing: damaged, but under data", HERE, build(l2={0: 0x5200}), "qcow2", l2={0: HOST}),
    over(
        "backing: under subclusters",
        sub(0) + BASE[512:1024] + bytes(512) + BASE[1536:2048],
        BASE,
        "raw",
        fields={"incompatible_features": 16},
        cluster_bits=14,
        l2={0: (WIDE_HOST, allocated(0) | zero(2))},
    ),
]


# --- external data files ----------------------------------------------------------------------------------


def external(
    id: str,
    expected: bytes | Refused,
    l2: Mapping[int, Any],
    start: int = 0,
    *,
    data: bytes = BASE,
    features: int = 4,
    **more: Any,
) -> Row:
    """A row with an external data file, `data`."""
    extensions = [extension(DATA_FILE, b"data")]
    image = build({"incompatible_features": features}, extensions=extensions, l2=l2, **more)
    return Row(id, expected, image, start, {"data": data})


def mismatch(host: str, guest: str, index: str) -> Refused:
    """QEMU's words, unbalanced as they are."""
    words = f"host cluster offset {host} does not match guest cluster offset: {guest}, L2 index: {index})"
    return Refused(f"External data file {words}")


EXTERNAL = [
    external("data file: at 0", BASE[:CLUSTER], {0: COPIED}),
    external("data file: at 0, bit 63 clear", ZEROS, {0: 0}),
    external("data file: at its own place", BASE[CLUSTER:], {1: COPIED | CLUSTER}, start=CLUSTER),
    external("data file: copied bit clear", BASE[CLUSTER:], {1: CLUSTER}, start=CLUSTER),
    external("data file: zeros", ZEROS, {0: ZERO}),
    external("data file: zeros with a cluster", ZEROS, {1: COPIED | CLUSTER | ZERO}, start=CLUSTER),
    external("data file: zeros at 0", ZEROS, {0: COPIED | ZERO}),
    external("data file: past its end", ZEROS, {9: COPIED | 9 * CLUSTER}, start=9 * CLUSTER),
    external("data file: over its end", BASE[:100] + bytes(CLUSTER - 100), {0: COPIED}, data=BASE[:100]),
    external("data file: empty", ZEROS, {0: COPIED}, data=b""),
    external("data file: elsewhere", mismatch("0x5000", "0", "0"), {0: COPIED | HOST}),
    external(
        "data file: at 0 for another cluster", mismatch("0", "0x2000", "0x2"), {2: COPIED}, start=2 * CLUSTER
    ),
    external("data file: zeros elsewhere", mismatch("0x5000", "0x1000", "0x1"), {1: HOST | ZERO}, start=CLUSTER),
    external(
        "data file: unaligned",
        Refused("Cluster allocation offset 0x1200 unaligned (L2 offset: 0x4000, L2 index: 0x1)"),
        {1: COPIED | 0x1200},
        start=CLUSTER,
    ),
    external(
        "data file: compressed",
        Refused(
            "Compressed cluster entry found in image with external data file (L2 offset: 0x4000, L2 index: 0)"
        ),
        {0: COMPRESSED | HOST},
    ),
    external(
        "data file: subclusters at 0",
        BASE[:512] + bytes(512) + BASE[1024:1536],
        {0: (COPIED, allocated(0, 2) | zero(1))},
        features=4 | 16,
        cluster_bits=14,
    ),
    external(
        "data file: both bits at 0",
        INVALID,
        {0: (COPIED, allocated(0) | zero(0))},
        features=4 | 16,
        cluster_bits=14,
    ),
    external(
        "data file: subclusters at 0, bit 63 clear",
        INVALID,
        {0: (0, allocated(0))},
        features=4 | 16,
        cluster_bits=14,
    ),
    external(
        "data file: no subcluster elsewhere",
        mismatch("0x14000", "0", "0"),
        {0: (WIDE_HOST, 0)},
        features=4 | 16,
        cluster_bits=14,
    ),
]

ROWS = [*STANDARD, *DEFLATE, *ZSTD, *EXTENDED, *BACKING, *EXTERNAL]
EVERY = pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@EVERY
def test_read(row: Row, folder: Path) -> None:
    row.write(folder)
    with imgloop.open(NAME, "qcow2") as image:
        if isinstance(row.expected, bytes):
            assert image.pread(row.length, row.start) == row.expected
        else:
            assert corruption(image, row) == plain(row.expected.words)


def corruption(image: imgloop.Image, row: Row) -> str:
    """What is said of a range that cannot be read; of compressed streams, nothing that QEMU says."""
    with pytest.raises(CorruptError) as caught:
        image.pread(row.length, row.start)
    error = caught.value
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert error.where.file
    assert error.where.offset is not None
    words = error.message.removeprefix("Image is corrupt: ")
    assert words != error.message
    return "" if (error.where.field or "").startswith("compressed") else plain(words)


def plain(text: str) -> str:
    """A text without runs of blanks."""
    return " ".join(text.split())


@EVERY
def test_read_in_pieces(row: Row, folder: Path) -> None:
    # what has been read once comes from caches, and sectors need not be asked for in order
    row.write(folder)
    if isinstance(row.expected, Refused):
        return
    with imgloop.open(NAME, "qcow2") as image:
        step = max(512, row.length // 16)
        starts = range(0, row.length, step)
        pieces = {at: image.pread(min(step, row.length - at), row.start + at) for at in reversed(starts)}
        assert b"".join(pieces[at] for at in starts) == row.expected
        file = image.as_file()
        file.seek(row.start)
        assert file.read(row.length) == row.expected


@LIVE
@EVERY
def test_qemu_reads_alike(row: Row, folder: Path) -> None:
    row.write(folder)
    command = f"read -v {row.start} {row.length}"
    done = qemu("qemu-io", "-r", "-f", "qcow2", "-c", command, NAME, cwd=folder)
    if isinstance(row.expected, bytes):
        assert done.returncode == 0, done.stderr
        assert dumped(done.stdout) == row.expected
    else:
        assert done.returncode == 1
        assert b"read failed: Input/output error" in done.stdout + done.stderr
        found = re.search(r"qcow2: Image is corrupt: (.*);", done.stderr.decode())
        assert plain(found[1] if found else "") == plain(row.expected.words)


def dumped(text: bytes) -> bytes:
    """The bytes of a hex dump."""
    return bytes.fromhex("".join(line[11:58].decode() for line in text.splitlines() if line[8:10] == b": "))


# --- the two deflate decoders -----------------------------------------------------------------------------


def outcome(decode: Any, stream: bytes, size: int) -> bytes | None:
    """What a decoder gives; None where it refuses."""
    try:
        data: bytes = decode(stream, size)
    except DecodeError:
        return None
    assert len(data) == size
    return data


def streams() -> Iterator[Any]:
    """The streams of the rows above, as (stream, size of the cluster)."""
    for row in DEFLATE:
        bits = struct.unpack_from(">I", row.image, 20)[0]
        word = struct.unpack_from(">Q", row.image, 4 << bits)[0] & (1 << 62) - 1
        x = 62 - (bits - 8)
        offset = word & (1 << x) - 1
        length = (word >> x) * 512 + 512 - offset % 512
        yield pytest.param(row.image[offset : offset + length].ljust(length, b"\0"), 1 << bits, id=row.id)


@pytest.mark.parametrize(("stream", "size"), list(streams()))
def test_isal_as_zlib(stream: bytes, size: int) -> None:
    pytest.importorskip("isal")
    assert outcome(inflate_fast, stream, size) == outcome(inflate, stream, size)


# Always the same streams: of very many, isal takes one or another whose code tables zlib refuses.
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(CLUSTER - 1, CLUSTER + 1),
    st.integers(0, 9),
    st.sampled_from([zlib.Z_FINISH, zlib.Z_SYNC_FLUSH, zlib.Z_BLOCK, zlib.Z_PARTIAL_FLUSH]),
    st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 7)), max_size=1),
    st.binary(max_size=40),
)
def test_isal_as_zlib_on_damaged_streams(
    length: int, level: int, flush: int, flips: list[tuple[int, int]], tail: bytes
) -> None:
    pytest.importorskip("isal")
    encoder = zlib.compressobj(level, zlib.DEFLATED, -12)
    stream = bytearray(encoder.compress((TEXT * 2)[:length]) + encoder.flush(flush) + tail)
    for at, bit in flips:
        stream[at % len(stream)] ^= 1 << bit
    assert outcome(inflate_fast, bytes(stream), CLUSTER) == outcome(inflate, bytes(stream), CLUSTER)


def test_without_isal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgloop.formats.qcow2.compression.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "isal", None)
    for row in DEFLATE:
        row.write(folder)
        with imgloop.open(NAME) as image:
            if isinstance(row.expected, bytes):
                assert image.pread(row.length, row.start) == row.expected, row.id
            else:
                assert corruption(image, row) == "", row.id


# --- where a data file is looked for ----------------------------------------------------------------------


@pytest.fixture
def two_data_files(folder: Path) -> Path:
    """An image in `sub`, and a file of its data file's name both there and in the current directory."""
    (folder / "sub").mkdir()
    EXTERNAL[0].write(folder / "sub")
    (folder / "data").write_bytes(BASE[::-1])
    return folder


def test_a_data_file_counts_from_the_current_directory(two_data_files: Path) -> None:
    with imgloop.open(f"sub/{NAME}", gate=Gate(trust=Trust.FULL)) as image:
        assert image.pread(CLUSTER, 0) == BASE[::-1][:CLUSTER]


@LIVE
def test_qemu_counts_from_the_current_directory(two_data_files: Path) -> None:
    done = qemu("qemu-io", "-r", "-c", f"read -v 0 {CLUSTER}", f"sub/{NAME}", cwd=two_data_files)
    assert dumped(done.stdout) == BASE[::-1][:CLUSTER]


def test_another_data_file_by_option(two_data_files: Path) -> None:
    options = f"driver=qcow2,file.filename=sub/{NAME},data-file.driver=file,data-file.filename=sub/data"
    with imgloop.open(options, image_opts=True) as image:
        assert image.pread(CLUSTER, 0) == BASE[:CLUSTER]


# --- snapshots --------------------------------------------------------------------------------------------


def with_snapshot(
    l1: int, l1_size: int = 1, disk_size: int = MIB, *, at: Mapping[int, bytes] | None = None
) -> bytes:
    """An image with a snapshot "s" whose L1 table is at `l1`; the live image has nothing in it."""
    head = struct.pack(">QIHHIIQII", l1, l1_size, 1, 1, 0, 0, 0, 0, 16)
    table = head + struct.pack(">QQ", 0, disk_size) + b"1s"
    tables = {8 * CLUSTER: struct.pack(">Q", 4 * CLUSTER), 9 * CLUSTER: table, TABLE: bytes(8)}
    return build({"nb_snapshots": 1, "snapshots_offset": 9 * CLUSTER}, tables | dict(at or {}))


@pytest.mark.parametrize("wanted", ["s", "1"])
def test_a_snapshot_has_tables_of_its_own(wanted: str, folder: Path) -> None:
    (folder / NAME).write_bytes(with_snapshot(8 * CLUSTER))
    with imgloop.open(NAME) as image:
        assert image.pread(CLUSTER, 0) == ZEROS
    with imgloop.open(NAME, snapshot=wanted) as image:
        assert image.pread(2 * CLUSTER, 0) == HERE + ZEROS


@pytest.mark.parametrize(("stored", "seen"), [(CLUSTER, CLUSTER), (1023, 512), (0, 0), (3 * MIB, 3 * MIB)])
def test_a_snapshot_has_a_size_of_its_own(stored: int, seen: int, folder: Path) -> None:
    (folder / NAME).write_bytes(with_snapshot(8 * CLUSTER, disk_size=stored))
    with imgloop.open(NAME, snapshot="s") as image:
        assert image.size == seen
        assert image.pread(min(seen, CLUSTER), 0) == HERE[:seen]
        # what its L1 table does not reach is not in it
        assert not any(image.pread(max(0, seen - 2 * MIB), min(seen, 2 * MIB)))


HOSTILE_SNAPSHOTS = {
    "none of that name": (with_snapshot(0), "other", "Can't find snapshot"),
    "l1 too large": (with_snapshot(8 * CLUSTER, 4194305), "s", "Snapshot L1 table too large"),
    "l1 unaligned": (with_snapshot(8 * CLUSTER + 8), "s", "Snapshot L1 table offset invalid"),
    "l1 beyond 2^63": (with_snapshot((1 << 63) - CLUSTER, 513), "s", "Snapshot L1 table offset invalid"),
    "l1 out of reach": (with_snapshot((1 << 63) - CLUSTER), "s", "Failed to read l1 table for snapshot"),
}


@pytest.mark.parametrize(
    ("image", "wanted", "words"), [pytest.param(*row, id=id) for id, row in HOSTILE_SNAPSHOTS.items()]
)
def test_refused_snapshot(image: bytes, wanted: str, words: str, folder: Path) -> None:
    (folder / NAME).write_bytes(image)
    with pytest.raises(ImageError, match="Failed to load snapshot: ") as caught:
        imgloop.open(NAME, snapshot=wanted)
    assert words in str(caught.value)


@LIVE
@pytest.mark.parametrize(
    ("image", "wanted", "words"), [pytest.param(*row, id=id) for id, row in HOSTILE_SNAPSHOTS.items()]
)
def test_qemu_refuses_snapshot(image: bytes, wanted: str, words: str, folder: Path) -> None:
    (folder / NAME).write_bytes(image)
    done = qemu("qemu-img", "convert", "-O", "raw", "-l", wanted, NAME, "out", cwd=folder)
    assert done.returncode == 1
    assert f"Failed to load snapshot: {words}" in done.stderr.decode()


def test_a_snapshot_of_a_hostile_size(folder: Path) -> None:
    (folder / NAME).write_bytes(with_snapshot(8 * CLUSTER, disk_size=2**64 - 1))
    with pytest.raises(ImageError, match="File too large"):
        imgloop.open(NAME, snapshot="s")
    with imgloop.open(NAME) as image:  # nobody asked for it
        assert image.size == MIB


# --- ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "start"), [(1, MIB), (513, MIB - 512), (1, -1), (-1, 0), (1 << 70, 0), (0, MIB + 1), (1, 1 << 63)]
)
def test_outside_of_the_image(length: int, start: int, folder: Path) -> None:
    (folder / NAME).write_bytes(build())
    with imgloop.open(NAME) as image, pytest.raises(imgloop.OutOfRangeError, match=f"has {MIB} bytes"):
        image.pread(length, start)


def test_nothing_at_the_end(folder: Path) -> None:
    (folder / NAME).write_bytes(build())
    with imgloop.open(NAME) as image:
        assert image.pread(0, MIB) == b""
