"""Damaged images, each made by name: `python tools/damage.py NAME OUT`, or `--list`.

`Builder` makes a small, sound qcow2 image without any other program; a damage changes it. The images are the
same in every run. DAMAGES, by name, says of each what it does and how its base is built; the tests compare what
checks say of every one of them with qemu-img.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from imgloop.formats.qcow2 import schema  # noqa: E402

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
MIB = 1 << 20
FIRST_LINES = 12  # of qemu-img's messages that are recorded as they are
DATE = 1714564800  # of every snapshot: 2024-05-01 12:00:00 UTC, in seconds


class Builder:
    """A qcow2 image in memory: clusters are taken one after the other, refcounts follow.

    With the defaults: cluster 0 header, 1 refcount table, 2 refcount block, 3 L1 table, 4 L2 table, and three
    data clusters, 5 to 7, of guest clusters 0 to 2.
    """

    def __init__(
        self,
        *,
        version: int = 3,
        cluster_bits: int = 16,
        size: int = 8 * MIB,
        order: int = 4,
        extended: bool = False,
        data: int = 3,
        streams: int = 0,
        snapshots: int = 0,
        bitmaps: int = 0,
        bitmap_flags: int = 0,
        data_file: str | None = None,
        raw_data: bool = False,
        backing: tuple[str, str | None] | None = None,
    ) -> None:
        self.cluster = 1 << cluster_bits
        self.order, self.extended, self.data_file = order, extended, data_file
        self.entry_size = 16 if extended else 8
        self.file = bytearray()
        self.header: dict[str, Any] = {
            "magic": schema.MAGIC, "version": version, "backing_file_offset": 0, "backing_file_size": 0,
            "cluster_bits": cluster_bits, "size": size, "crypt_method": 0, "l1_size": 0, "l1_table_offset": 0,
            "refcount_table_offset": 0, "refcount_table_clusters": 1, "nb_snapshots": 0, "snapshots_offset": 0,
            "incompatible_features": (16 if extended else 0) | (4 if data_file else 0),
            "compatible_features": 0,
            "autoclear_features": (1 if bitmaps else 0) | (2 if raw_data else 0),
            "refcount_order": order, "header_length": 112, "compression_type": 0, "padding": bytes(7),
        }  # fmt: skip
        self.extensions: list[tuple[int, bytes]] = []
        self.backing = backing
        self.take()
        self.reftable = self.take()
        self.refblock = self.take()
        per_table = self.cluster // self.entry_size
        self.l1_size = max(1, -(-size // (self.cluster * per_table)))
        self.l1 = self.take(self.l1_size * 8)
        self.l2 = self.take()
        self.put(self.reftable, self.refblock)
        self.put(self.l1, self.l2 | COPIED)
        for number in range(data):
            self.add_data(number)
        if streams:
            self.add_streams(data, streams)
        for number in range(snapshots):
            self.add_snapshot(f"{number + 1}", f"snap{number + 1}")
        if snapshots:
            self.write_snapshots()
        if bitmaps:
            self.add_bitmaps(bitmaps, bitmap_flags)
        self.header |= {
            "l1_size": self.l1_size, "l1_table_offset": self.l1, "refcount_table_offset": self.reftable
        }  # fmt: skip
        if data_file:
            self.extensions.append((schema.DATA_FILE_NAME, data_file.encode()))
        self.write_header()

    # --- bytes and clusters ---

    @property
    def clusters(self) -> int:
        """Clusters in the file, the last one perhaps not whole."""
        return -(-len(self.file) // self.cluster)

    def take(self, size: int | None = None, refcount: int = 1) -> int:
        """Take clusters at the end for `size` bytes (one cluster); their offset."""
        count = -(-(size or self.cluster) // self.cluster)
        offset = len(self.file)
        self.file += bytes(count * self.cluster)
        if hasattr(self, "refblock"):
            for number in range(count):
                self.set_refcount(offset // self.cluster + number, refcount)
        elif offset == 2 * self.cluster:
            self.refblock = offset
            for number in range(3):
                self.set_refcount(number, 1)
        return offset

    def put(self, offset: int, word: int) -> None:
        """Write a 64-bit word."""
        struct.pack_into(">Q", self.file, offset, word)

    def word(self, offset: int) -> int:
        """Read a 64-bit word."""
        return int(struct.unpack_from(">Q", self.file, offset)[0])

    def refcount(self, cluster: int) -> int:
        """A refcount in the first block."""
        bits = 1 << self.order
        if bits >= 8:
            at = self.refblock + cluster * bits // 8
            return int.from_bytes(self.file[at : at + bits // 8], "big")
        return self.file[self.refblock + cluster * bits // 8] >> cluster * bits % 8 & (1 << bits) - 1

    def set_refcount(self, cluster: int, value: int) -> None:
        """Write a refcount in the first block; as many as fit."""
        bits = 1 << self.order
        value = min(value, (1 << bits) - 1)
        at = self.refblock + cluster * bits // 8
        if bits >= 8:
            self.file[at : at + bits // 8] = value.to_bytes(bits // 8, "big")
        else:
            shift = cluster * bits % 8
            self.file[at] = self.file[at] & ~(((1 << bits) - 1) << shift) | value << shift

    def set_header(self, **fields: Any) -> None:
        """Change header fields."""
        self.header |= fields
        self.write_header()

    def write_header(self) -> None:
        """Write header, extensions and backing file name."""
        head = bytearray(self.cluster)
        version2 = self.header["version"] < 3
        length = schema.V2_LENGTH if version2 else 112
        tail = b""
        if self.backing and self.backing[1]:
            tail += _extension(schema.BACKING_FORMAT, self.backing[1].encode())
        for kind, data in self.extensions:
            tail += _extension(kind, data)
        tail += bytes(8)
        if self.backing:
            name = self.backing[0].encode()
            self.header |= {"backing_file_offset": length + len(tail), "backing_file_size": len(name)}
            tail += name
        head[: schema.Header.sizeof()] = schema.Header.build(self.header)
        head[length:] = tail.ljust(self.cluster - length, b"\0")
        self.file[: self.cluster] = head

    # --- what the guest sees ---

    def entry(self, index: int) -> int:
        """Where L2 entry `index` of the first table is."""
        return self.l2 + index * self.entry_size

    def get(self, index: int) -> int:
        """L2 entry `index` (its first word)."""
        return self.word(self.entry(index))

    def set(self, index: int, word: int, bitmap: int | None = None) -> None:
        """Change L2 entry `index`; `bitmap` is the second word of an extended one."""
        self.put(self.entry(index), word)
        if bitmap is not None:
            self.put(self.entry(index) + 8, bitmap)

    def add_data(self, index: int) -> int:
        """A data cluster for guest cluster `index`; its host offset."""
        if self.data_file:
            offset = index * self.cluster
        else:
            offset = self.take()
            pattern = b"%08d" % index
            self.file[offset : offset + self.cluster] = pattern * (self.cluster // len(pattern))
        self.set(index, offset | COPIED, 0xFFFFFFFF if self.extended else None)
        return offset

    def add_streams(self, first: int, count: int) -> None:
        """Compressed guest clusters from `first` on, one stream behind the other."""
        bits = self.header["cluster_bits"]
        offset = at = self.take(2 * self.cluster, refcount=0)
        for index in range(first, first + count):
            stream = _deflate(self.text(index))
            self.file[at : at + len(stream)] = stream
            sectors = (at + len(stream) - 1) // 512 - at // 512
            self.set(index, COMPRESSED | sectors << 62 - (bits - 8) | at, 0 if self.extended else None)
            for cluster in range(at // self.cluster, ((at + len(stream) - 1) // 512 * 512) // self.cluster + 1):
                self.set_refcount(cluster, self.refcount(cluster) + 1)
            at += len(stream)
        del self.file[-(-at // self.cluster) * self.cluster :]
        assert at > offset

    def text(self, index: int) -> bytes:
        """A cluster that compresses, but not to nothing."""
        words = b"".join(b"%d " % (number * number * (index + 7) % 10007) for number in range(self.cluster))
        return words[: self.cluster]

    # --- snapshots and bitmaps ---

    def add_snapshot(self, snapshot_id: str, name: str, extra: bytes | None = None) -> None:
        """Copy the active L1 table; what is below is shared from now on."""
        self._snapshots = getattr(self, "_snapshots", [])
        size = self.l1_size * 8
        table = self.take(size)
        for index in range(self.l1_size):
            l2 = self.word(self.l1 + index * 8) & ~COPIED
            if not l2:
                continue
            self.put(self.l1 + index * 8, l2)
            self._share(l2)
        self.file[table : table + size] = self.file[self.l1 : self.l1 + size]
        if extra is None:
            extra = struct.pack(">QQQ", 0, self.header["size"], 0)
        self._snapshots.append((table, snapshot_id.encode(), name.encode(), extra))

    def _share(self, l2: int) -> None:
        cluster = l2 // self.cluster
        self.set_refcount(cluster, self.refcount(cluster) + 1)
        columns = schema.compressed(self.header["cluster_bits"])
        for at in range(l2, l2 + self.cluster, self.entry_size):
            word = self.word(at)
            if word & COMPRESSED:
                start = columns["host_offset"].of(word)
                end = start // 512 * 512 + (columns["sectors"].of(word) + 1) * 512
            elif word & ~(COPIED | ZERO) and not self.data_file:
                start = word & ~(COPIED | ZERO)
                end = start + self.cluster
                self.put(at, word & ~COPIED)
            else:
                continue
            for number in range(start // self.cluster, (end - 1) // self.cluster + 1):
                self.set_refcount(number, self.refcount(number) + 1)

    def write_snapshots(self) -> None:
        """Write the snapshot table."""
        table = bytearray()
        for offset, snapshot_id, name, extra in self._snapshots:
            table += bytes(-len(table) % 8)
            table += struct.pack(
                ">QIHHIIQII", offset, self.l1_size, len(snapshot_id), len(name), DATE, 0, 0, 0, len(extra)
            )
            table += extra + snapshot_id + name
        self.snapshots = self.take(len(table))
        self.file[self.snapshots : self.snapshots + len(table)] = table
        self.header |= {"nb_snapshots": len(self._snapshots), "snapshots_offset": self.snapshots}

    def add_bitmaps(self, count: int, flags: int) -> None:
        """Persistent bitmaps, each of one cluster of bits, granularity 64 KiB."""
        self.bitmap_tables = []
        directory = b""
        for number in range(count):
            table, bits = self.take(8), self.take()
            self.file[bits] = 0x0F
            self.put(table, bits)
            self.bitmap_tables.append(table)
            name = b"bitmap%d" % number
            entry = struct.pack(">QIIBBHI", table, 1, flags, 1, 16, len(name), 0) + name
            directory += entry + bytes(-len(entry) % 8)
        self.directory = self.take(len(directory))
        self.file[self.directory : self.directory + len(directory)] = directory
        extension = struct.pack(">IIQQ", count, 0, len(directory), self.directory)
        self.extensions.append((schema.BITMAP_DIRECTORY, extension))

    # --- out ---

    def write(self, path: Path) -> None:
        """Write the image, with holes for zeros, and its data file beside it."""
        with path.open("wb") as file:
            for at in range(0, len(self.file), 4096):
                part = self.file[at : at + 4096]
                if any(part):
                    file.seek(at)
                    file.write(part)
            file.truncate(len(self.file))
        if self.data_file:
            (path.parent / self.data_file).write_bytes(bytes(range(256)) * (self.header["size"] // 256))


def _extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


@dataclass(frozen=True)
class Damage:
    """One way to damage an image: what it does, to which base, and how."""

    name: str
    what: str
    base: dict[str, Any]
    apply: Callable[[Builder], None]
    after: Callable[[Path], None] | None = None  # what is done to the files when they are written
    tags: frozenset[str] = field(default_factory=frozenset)

    def build(self, path: Path) -> None:
        """Make the damaged image, and the files beside it that it needs."""
        builder = Builder(**self.base)
        self.apply(builder)
        builder.write(path)
        if self.after:
            self.after(path)


DAMAGES: dict[str, Damage] = {}


def damage(
    what: str, *, after: Callable[[Path], None] | None = None, tags: str = "", **base: Any
) -> Callable[[Callable[[Builder], None]], Callable[[Builder], None]]:
    """Declare a damage: the function's name is its name; `base` goes to `Builder`.

    Tags: `hangs` (qemu-img does not end, or crashes), `refused` (it does not open the image).
    """

    def declare(apply: Callable[[Builder], None]) -> Callable[[Builder], None]:
        name = apply.__name__.replace("_", "-")
        DAMAGES[name] = Damage(name, what, base, apply, after, frozenset(tags.split()))
        return apply

    return declare


def _declare(name: str, what: str, apply: Callable[[Builder], None], tags: str = "", **base: Any) -> None:
    DAMAGES[name] = Damage(name, what, base, apply, None, frozenset(tags.split()))


# --- nothing is wrong with these -------------------------------------------------------------------------

_declare("none", "A sound image.", lambda b: None)
_declare("none-v2", "A sound image of version 2.", lambda b: None, version=2)
_declare("none-compressed", "A sound image with compressed clusters that share sectors.", lambda b: None,
         streams=5)  # fmt: skip
_declare("none-snapshots", "A sound image with three snapshots.", lambda b: None, snapshots=3, streams=3)
_declare("none-bitmaps", "A sound image with two bitmaps.", lambda b: None, bitmaps=2)
_declare("none-extended", "A sound image with extended L2 entries.", lambda b: None, extended=True, streams=2)
_declare("none-data-file", "A sound image with a data file.", lambda b: None, data_file="guest.raw")
for _order in range(7):
    _declare(f"none-refcount-{1 << _order}", f"A sound image with refcounts of {1 << _order} bits.",
             lambda b: None, order=_order)  # fmt: skip


_declare("none-full", "A sound image whose L2 table maps one run of clusters.", lambda b: None, cluster_bits=12,
         size=2 * MIB, data=512)  # fmt: skip


@damage("None of the entries of a full L2 table has the COPIED flag.", cluster_bits=12, size=2 * MIB, data=512)
def full_not_copied(b: Builder) -> None:
    for index in range(512):
        b.set(index, b.get(index) & ~COPIED)


@damage("In a run of clusters, one has refcount 0 and one has 3.", cluster_bits=12, size=2 * MIB, data=512)
def full_refcounts(b: Builder) -> None:
    b.set_refcount(100, 0)
    b.set_refcount(400, 3)


@damage("A full L2 table is shared with a snapshot, but one entry has the COPIED flag.", cluster_bits=12,
        size=2 * MIB, data=512, snapshots=1)  # fmt: skip
def full_shared(b: Builder) -> None:
    b.set(300, b.get(300) | COPIED)


# --- L1 entries --------------------------------------------------------------------------------------------


@damage("An L1 entry has a reserved bit set.")
def l1_reserved(b: Builder) -> None:
    b.put(b.l1, b.word(b.l1) | 1 << 57)


@damage("The L1 entry lacks the COPIED flag.")
def l1_not_copied(b: Builder) -> None:
    b.put(b.l1, b.l2)


@damage("The L1 entry names a table past the end of the file.")
def l1_past_end(b: Builder) -> None:
    b.put(b.l1, 0x10000000 | COPIED)


@damage("The L1 entry names a table right at the end of the file.")
def l1_at_end(b: Builder) -> None:
    b.put(b.l1, len(b.file) | COPIED)


@damage("The L1 entry names a table that is not at a cluster's start.")
def l1_unaligned(b: Builder) -> None:
    b.put(b.l1, b.l2 + 512 | COPIED)


@damage("The L1 entry has no offset, only the COPIED flag.")
def l1_only_copied(b: Builder) -> None:
    b.put(b.l1, COPIED)


@damage("The L1 entry names a data cluster.")
def l1_to_data(b: Builder) -> None:
    b.put(b.l1, b.get(0))


@damage("Two L1 entries name the same L2 table, whose refcounts say so.", size=1024 * MIB)
def l1_duplicate(b: Builder) -> None:
    b.put(b.l1, b.l2)
    b.put(b.l1 + 8, b.l2)
    for cluster in range(4, 8):
        b.set_refcount(cluster, 2)
    for index in range(3):
        b.set(index, b.get(index) & ~COPIED)


@damage("Two L1 entries name the same L2 table, and the refcounts do not say so.", size=1024 * MIB)
def l1_duplicate_uncounted(b: Builder) -> None:
    b.put(b.l1 + 8, b.word(b.l1))


@damage("The header names an L1 table past the end of the file.")
def l1_table_past_end(b: Builder) -> None:
    b.set_header(l1_table_offset=0x10000000)


@damage("The L1 table was cut off with the file's tail; qemu-img says that nothing is wrong.",
        after=lambda path: _cut(path, 0x30000))  # fmt: skip
def l1_cut_off(b: Builder) -> None:
    pass


# --- L2 entries --------------------------------------------------------------------------------------------


@damage("An L2 entry lacks the COPIED flag.")
def l2_not_copied(b: Builder) -> None:
    b.set(0, b.get(0) & ~COPIED)


@damage("An L2 entry has reserved bits set.")
def l2_reserved(b: Builder) -> None:
    b.set(0, b.get(0) | 2)
    b.set(1, b.get(1) | 1 << 56)
    b.set(9, 4)


@damage("A data cluster is not at a cluster's start.")
def l2_unaligned(b: Builder) -> None:
    b.set(0, b.get(0) + 512)


@damage("A preallocated zero cluster is not at a cluster's start.")
def l2_unaligned_zero(b: Builder) -> None:
    b.set(0, b.get(0) + 512 | ZERO)


@damage("The last data cluster is not at a cluster's start: it ends past the end, within the next cluster.")
def l2_unaligned_last(b: Builder) -> None:
    b.file += bytes(512)
    b.set(2, b.get(2) + 512)


@damage("A data cluster lies right at the end of the file.")
def l2_at_end(b: Builder) -> None:
    b.set(0, len(b.file) | COPIED)


@damage("A data cluster lies far past the end of the file.")
def l2_past_end(b: Builder) -> None:
    b.set(0, 0x00FFFFFFFFFF0000 | COPIED)


@damage("A guest cluster is mapped to another one's host cluster.")
def l2_duplicate(b: Builder) -> None:
    b.set(0, b.get(1))


@damage("Two guest clusters are one host cluster, and its refcount is 2: qemu-img sees nothing.")
def l2_duplicate_counted(b: Builder) -> None:
    b.set(0, b.get(1) & ~COPIED)
    b.set(1, b.get(0))
    b.set_refcount(5, 0)
    b.set_refcount(6, 2)


@damage("A guest cluster is mapped to the L2 table.")
def l2_to_l2(b: Builder) -> None:
    b.set(0, b.l2 | COPIED)


@damage("A guest cluster is also the L2 table, and the refcount is 2: qemu-img sees nothing.")
def l2_to_l2_counted(b: Builder) -> None:
    b.set(0, b.l2)
    b.put(b.l1, b.l2)
    b.set_refcount(4, 2)
    b.set_refcount(5, 0)


@damage("A guest cluster is mapped to the refcount table.")
def l2_to_reftable(b: Builder) -> None:
    b.set(0, b.reftable | COPIED)


@damage("A guest cluster is mapped to the refcount block.")
def l2_to_refblock(b: Builder) -> None:
    b.set(0, b.refblock | COPIED)


@damage("The L2 table was cut off with the file's tail.", after=lambda path: _cut(path, 0x40000))
def l2_cut_off(b: Builder) -> None:
    pass


@damage("The last data cluster was cut in half.", after=lambda path: _cut(path, 0x78000))
def data_cut_off(b: Builder) -> None:
    pass


@damage("Only the header is left of the file.", after=lambda path: _cut(path, 112))
def only_header(b: Builder) -> None:
    pass


@damage("Zero flags in an image of version 2, which has none: qemu-img sees nothing.", version=2)
def zero_flag_v2(b: Builder) -> None:
    b.set(0, b.get(0) | ZERO)
    b.set(9, ZERO)


@damage("An L2 entry has no offset, only the COPIED flag.")
def l2_only_copied(b: Builder) -> None:
    b.set(9, COPIED)


# --- compressed clusters -----------------------------------------------------------------------------------


@damage("A compressed cluster has the COPIED flag.", streams=2)
def compressed_copied(b: Builder) -> None:
    b.set(3, b.get(3) | COPIED)


@damage("A compressed stream is garbage: qemu-img sees nothing.", streams=3)
def compressed_garbage(b: Builder) -> None:
    offset = schema.compressed(16)["host_offset"].of(b.get(4))
    b.file[offset + 10 : offset + 74] = bytes([0xFF]) * 64


@damage("A compressed cluster's stream is past the end of the file.", streams=2)
def compressed_past_end(b: Builder) -> None:
    b.set(3, b.get(3) + 0x10000000)


@damage("A compressed cluster claims more sectors than its stream has.", streams=2)
def compressed_long(b: Builder) -> None:
    b.set(3, b.get(3) | 0xFF << 54)


@damage("A compressed cluster in an image with a data file.", data_file="guest.raw")
def compressed_data_file(b: Builder) -> None:
    b.set(5, COMPRESSED | COPIED | 0x50000)


@damage("A compressed cluster with a subcluster bitmap.", extended=True, streams=2)
def compressed_bitmap(b: Builder) -> None:
    b.set(3, b.get(3), 5)


@damage("A compressed cluster lies in a data cluster; the refcount is right.", streams=2)
def compressed_in_data(b: Builder) -> None:
    b.set(0, b.get(0) & ~COPIED)
    b.set(9, COMPRESSED | b.get(0))
    b.set_refcount(5, 2)


# --- subclusters -------------------------------------------------------------------------------------------


@damage("Subclusters are allocated and zero at once.", extended=True)
def subclusters_contradict(b: Builder) -> None:
    b.set(0, b.get(0), 0x3_0000_0001)


@damage("Subclusters are allocated without a cluster.", extended=True)
def subclusters_without_cluster(b: Builder) -> None:
    b.set(9, 0, 0x5)


@damage("Clusters with subclusters are not at a cluster's start, one with data and one without.", extended=True)
def subclusters_unaligned(b: Builder) -> None:
    b.set(0, b.get(0) + 512)
    b.set(1, b.get(1) + 1024, 0xFF_00000000)


# --- refcounts ---------------------------------------------------------------------------------------------


@damage("A data cluster has refcount 0.")
def refcount_zero(b: Builder) -> None:
    b.set_refcount(5, 0)


@damage("A data cluster has refcount 2.")
def refcount_two(b: Builder) -> None:
    b.set_refcount(5, 2)


@damage("A cluster that nobody uses has a refcount.")
def leak(b: Builder) -> None:
    b.take()


@damage("Hundreds of clusters leaked.", cluster_bits=12)
def leaks_many(b: Builder) -> None:
    for _ in range(300):
        b.take()


@damage("Refcounts for clusters past the end of the file: qemu-img sees nothing.")
def refcount_past_end(b: Builder) -> None:
    b.set_refcount(100, 1)
    b.set_refcount(200, 7)


@damage("A refcount table entry has a reserved bit set.")
def reftable_reserved(b: Builder) -> None:
    b.put(b.reftable, b.refblock | 8)


@damage("A refcount block is not at a cluster's start.")
def refblock_unaligned(b: Builder) -> None:
    b.put(b.reftable, b.refblock + 512)


@damage("A second refcount block is not at a cluster's start; its clusters are past the end of the file.")
def refblock_unaligned_unused(b: Builder) -> None:
    b.put(b.reftable + 8, b.refblock + 512)
    b.set(9, b.cluster * (b.cluster // 2 + 5) | COPIED)


@damage("A second refcount block lies past the end of the file.")
def refblock_outside(b: Builder) -> None:
    b.put(b.reftable + 8, 0x10000000)


@damage("A refcount block at an offset that no file has.")
def refblock_unreadable(b: Builder) -> None:
    b.put(b.reftable, 0x7FFFFFFFFFFF0000)


@damage("Two refcount table entries name one block.")
def refblock_duplicate(b: Builder) -> None:
    b.put(b.reftable + 8, b.refblock)


@damage("A refcount table entry names a data cluster.")
def refblock_to_data(b: Builder) -> None:
    b.put(b.reftable + 8, b.get(0) & ~COPIED)


@damage("The header says that there is no refcount table.")
def reftable_none(b: Builder) -> None:
    b.set_header(refcount_table_clusters=0)


@damage("The refcount table lies past the end of the file.")
def reftable_past_end(b: Builder) -> None:
    b.set_header(refcount_table_offset=0x10000000)


@damage("Refcounts of one bit, and two users of a cluster.", order=0)
def refcount_overflow(b: Builder) -> None:
    b.set(0, b.get(1))
    b.set(9, b.get(1))


@damage("Refcounts of two bits, and a snapshot more than they can count.", order=1, snapshots=2)
def refcount_overflow_snapshots(b: Builder) -> None:
    b.set(9, b.get(1))
    b.set(10, b.get(0))
    b.put(b.reftable + 8, b.refblock)


# --- snapshots ---------------------------------------------------------------------------------------------


@damage("The header counts a snapshot, but names no table.")
def snapshot_table_at_header(b: Builder) -> None:
    b.set_header(nb_snapshots=1, snapshots_offset=0)


@damage("More snapshots than QEMU takes.", snapshots=1)
def snapshots_too_many(b: Builder) -> None:
    b.set_header(nb_snapshots=70000)


@damage("The snapshot table is not at a cluster's start.", snapshots=1)
def snapshot_table_unaligned(b: Builder) -> None:
    b.set_header(snapshots_offset=b.snapshots + 8)


@damage("A snapshot's entry has too much extra data.", snapshots=2)
def snapshot_extra_data(b: Builder) -> None:
    struct.pack_into(">I", b.file, b.snapshots + 36, 2000)


@damage("The snapshot table is larger than QEMU takes.", snapshots=1)
def snapshot_table_too_big(b: Builder) -> None:
    entry = struct.pack(">QIHHIIQII", 0, 0, 0xFFFF, 0xFFFF, DATE, 0, 0, 0, 16)
    step = (40 + 16 + 2 * 0xFFFF + 7) // 8 * 8
    count = 64 * MIB // step + 5
    table = b.take(count * step)
    for number in range(count):
        b.file[table + number * step : table + number * step + 40] = entry
    b.set_header(nb_snapshots=count, snapshots_offset=table)


@damage("A snapshot's entry lacks the extra data that version 3 demands.", snapshots=1)
def snapshot_incomplete(b: Builder) -> None:
    b._snapshots = [(offset, name, label, b"") for offset, name, label, _ in b._snapshots]
    b.set_refcount(b.snapshots // b.cluster, 0)
    b.write_snapshots()
    b.write_header()


@damage("A snapshot's L1 table is not at a cluster's start.", snapshots=2)
def snapshot_l1_unaligned(b: Builder) -> None:
    b.put(b.snapshots, b.word(b.snapshots) + 512)


@damage("A snapshot's L1 table is larger than QEMU takes.", snapshots=2)
def snapshot_l1_too_large(b: Builder) -> None:
    struct.pack_into(">I", b.file, b.snapshots + 8, 4194305)


@damage("A snapshot's L1 table is past the end of the file.", snapshots=2)
def snapshot_l1_past_end(b: Builder) -> None:
    b.put(b.snapshots, 0x10000000)


@damage("A snapshot's L1 table is at an offset that no file has.", snapshots=2)
def snapshot_l1_unreadable(b: Builder) -> None:
    b.put(b.snapshots, 0x7FFFFFFFFFFF0000)


@damage("A snapshot's L1 entry names garbage.", snapshots=2)
def snapshot_l1_entry(b: Builder) -> None:
    b.put(b.word(b.snapshots), b.get(0) | 1 << 60)


@damage("Snapshots in an image with a data file.", data_file="guest.raw", snapshots=1)
def snapshots_data_file(b: Builder) -> None:
    pass


# --- bitmaps -----------------------------------------------------------------------------------------------


@damage("A bitmap was left in use: qemu-img sees nothing.", bitmaps=1, bitmap_flags=1)
def bitmap_in_use(b: Builder) -> None:
    pass


@damage("A bitmap in use has a table entry with a reserved bit.", bitmaps=2, bitmap_flags=1)
def bitmap_table_invalid(b: Builder) -> None:
    b.put(b.bitmap_tables[1], b.word(b.bitmap_tables[1]) | 2)


@damage("A bitmap's table has an invalid entry; QEMU does not open the image.", bitmaps=1, tags="refused")
def bitmap_table_refused(b: Builder) -> None:
    b.put(b.bitmap_tables[0], b.word(b.bitmap_tables[0]) | 2)


@damage("A bitmap's cluster is past the end of the file.", bitmaps=1, bitmap_flags=1)
def bitmap_past_end(b: Builder) -> None:
    b.put(b.bitmap_tables[0], 0x10000000)


@damage("A bitmap's table is past the end of the file.", bitmaps=1, bitmap_flags=1)
def bitmap_table_past_end(b: Builder) -> None:
    b.put(b.directory, 0x10000000)


@damage("A bitmap's cluster is a data cluster; the refcount is right.", bitmaps=1, bitmap_flags=1)
def bitmap_in_data(b: Builder) -> None:
    b.set_refcount(b.word(b.bitmap_tables[0]) // b.cluster, 0)
    b.put(b.bitmap_tables[0], b.get(0) & ~COPIED)
    b.set(0, b.get(0) & ~COPIED)
    b.set_refcount(5, 2)


@damage("The bitmaps are not vouched for.", bitmaps=1)
def bitmaps_stale(b: Builder) -> None:
    b.set_header(autoclear_features=0)


@damage("The autoclear bit vouches for bitmaps that are not there: qemu-img sees nothing.")
def autoclear_without_bitmaps(b: Builder) -> None:
    b.set_header(autoclear_features=1)


# --- the header --------------------------------------------------------------------------------------------


@damage("The dirty bit is set: qemu-img sees nothing.")
def dirty(b: Builder) -> None:
    b.set_header(incompatible_features=1)


@damage("The corrupt bit is set: qemu-img sees nothing.")
def corrupt(b: Builder) -> None:
    b.set_header(incompatible_features=2)


@damage("The L1 table is too small; QEMU does not open the image.", tags="refused")
def l1_too_small(b: Builder) -> None:
    b.set_header(size=8 << 40)


@damage("The header's version is unknown; QEMU does not open the image.", tags="refused")
def version_unknown(b: Builder) -> None:
    b.set_header(version=9)


@damage("An unknown incompatible feature and a leak; QEMU does not open the image.", tags="refused")
def feature_unknown(b: Builder) -> None:
    b.take()
    b.set_header(incompatible_features=1 << 7)


@damage("An unknown incompatible feature and an L1 table that is too small.", tags="refused")
def features_and_l1(b: Builder) -> None:
    b.set_header(incompatible_features=1 << 7, size=8 << 40)


@damage("Header extensions run over their end; QEMU does not open the image.", tags="refused")
def extension_too_large(b: Builder) -> None:
    b.extensions.append((0x12345678, b""))
    b.write_header()
    struct.pack_into(">I", b.file, 116, 1 << 20)


# --- data files --------------------------------------------------------------------------------------------


@damage("A cluster is not at its own offset in the data file: qemu-img sees nothing.", data_file="guest.raw",
        raw_data=True)  # fmt: skip
def data_file_swapped(b: Builder) -> None:
    first, second = b.get(1), b.get(2)
    b.set(1, second)
    b.set(2, first)


@damage("The data file ends before the data does: qemu-img sees nothing.", data_file="guest.raw",
        after=lambda path: _cut(path.parent / "guest.raw", 0x18000))  # fmt: skip
def data_file_short(b: Builder) -> None:
    pass


@damage("A cluster in a data file lacks the COPIED flag.", data_file="guest.raw")
def data_file_not_copied(b: Builder) -> None:
    b.set(1, b.get(1) & ~COPIED)
    b.set(7, 0x7_0200)


# --- chains ------------------------------------------------------------------------------------------------


@damage("The backing file is missing.", backing=("missing.qcow2", "qcow2"), tags="refused")
def backing_missing(b: Builder) -> None:
    pass


@damage("The image is its own backing file: qemu-img does not come back.", tags="hangs refused",
        after=lambda path: _own_backing(path))  # fmt: skip
def backing_loop(b: Builder) -> None:
    pass


@damage("The backing file is qcow2, but declared as raw: qemu-img sees nothing.", backing=("base.qcow2", "raw"),
        after=lambda path: Builder().write(path.parent / "base.qcow2"))  # fmt: skip
def backing_format(b: Builder) -> None:
    pass


@damage("The backing file's format is not recorded: qemu-img sees nothing.", backing=("base.qcow2", None),
        after=lambda path: Builder().write(path.parent / "base.qcow2"))  # fmt: skip
def backing_unrecorded(b: Builder) -> None:
    pass


@damage("The backing file shrank: qemu-img sees nothing.", backing=("base.qcow2", "qcow2"),
        after=lambda path: Builder(size=4 * MIB).write(path.parent / "base.qcow2"))  # fmt: skip
def backing_size(b: Builder) -> None:
    pass


def _cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def _own_backing(path: Path) -> None:
    Builder(backing=(path.name, "qcow2")).write(path)


def record() -> dict[str, Any]:
    """What the qemu-img on PATH says of every damage that it comes back from.

    The exit code, the JSON, and of stderr the number of lines, the first of them and a digest of all.
    """
    said: dict[str, Any] = {}
    for name, one in DAMAGES.items():
        if "hangs" in one.tags:
            continue
        with tempfile.TemporaryDirectory() as folder:
            one.build(Path(folder, "image.qcow2"))
            words = ["qemu-img", "check", "-f", "qcow2", "--output=json", "image.qcow2"]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        answer = json.loads(done.stdout) if done.stdout.strip() else None
        said[name] = {"rc": done.returncode, "json": answer, **summary(done.stderr.splitlines())}
    return said


def random_image(seed: int) -> Builder:
    """A small image with up to three damages, all drawn from the seed: any width, any features, any entries."""
    chance = random.Random(seed)
    version = chance.choice((2, 3, 3))
    extended = version == 3 and chance.random() < 0.3
    bits = chance.choice((14, 16) if extended else (9, 10, 12, 16))
    order = chance.randrange(7) if version == 3 else 4
    snapshots = chance.randrange(3) if order > 1 else 0
    data, streams = chance.randrange(1, 6), chance.choice((0, 0, 3))
    per_table = (1 << bits) // (16 if extended else 8)
    builder = Builder(
        version=version,
        cluster_bits=bits,
        order=order,
        extended=extended,
        data=data,
        streams=streams,
        snapshots=snapshots,
        bitmaps=int(version == 3 and chance.random() < 0.2),
        bitmap_flags=1,
        size=min(8 * MIB, per_table << bits),
    )
    for _ in range(chance.randrange(1, 4)):
        _damage_at_random(builder, chance, per_table)
    if chance.random() < 0.2:
        del builder.file[chance.randrange(builder.cluster, len(builder.file)) :]
    return builder


def _damage_at_random(b: Builder, chance: random.Random, per_table: int) -> None:
    offset = chance.choice(
        (
            chance.randrange(b.clusters + 3) * b.cluster,
            chance.randrange(len(b.file) + 2 * b.cluster) // 512 * 512,
            b.clusters * b.cluster,
            1 << chance.randrange(9, 62),
        )
    )
    entry = offset | chance.choice((0, COPIED, COPIED, 1 << chance.randrange(64)))
    index = chance.randrange(per_table)
    match chance.randrange(6):
        case 0:
            b.put(b.l1 + 8 * chance.randrange(b.l1_size + 1), entry)
        case 1 | 2:
            entry |= chance.choice((0, 0, 0, COMPRESSED, ZERO))
            bitmap = chance.choice((0, chance.getrandbits(64), 0xFFFFFFFF, 0xFF << 32))
            b.set(index, entry, bitmap if b.extended else None)
        case 3:
            b.set_refcount(chance.randrange(b.clusters + 2), chance.randrange(4))
        case 4:
            word = chance.choice((0, offset, b.refblock, chance.getrandbits(63)))
            b.put(b.reftable + 8 * chance.randrange(3), word)
        case 5:
            b.file[chance.randrange(b.cluster, len(b.file))] ^= 1 << chance.randrange(8)


def summary(lines: list[str]) -> dict[str, Any]:
    """Lines on stderr as they are recorded."""
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"lines": len(lines), "first": lines[:FIRST_LINES], "sha256": digest}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="write down what qemu-img says of all of them")
    parser.add_argument("--list", action="store_true", help="the names, and what each does")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("out", nargs="?", metavar="OUT", type=Path)
    arguments = parser.parse_args()
    if arguments.list:
        for one in DAMAGES.values():
            print(f"{one.name:28} {one.what}")
        return 0
    if arguments.record:
        arguments.record.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
        return 0
    if arguments.name not in DAMAGES or arguments.out is None:
        parser.error("NAME must be one of --list, and OUT a file to write")
    DAMAGES[arguments.name].build(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
