"""The on-disk structures of qcow2, each declared once (specification: docs/interop/qcow2 of QEMU).

All integers are big endian. Structures that occur once are construct `Struct`s; entries of tables are
bit structures, which `imgloop.formats.columns` also reads a whole table at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from construct import (
    Bytes,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    Struct,
)

from imgloop.formats.columns import BitsInteger, BitStruct, Columns, Flag, Scaled
from imgloop.formats.structures import offset_of as offset_of
from imgloop.formats.structures import record as record

MAGIC = 0x514649FB  # "QFI\xfb"

# --- the header (section "Header") ------------------------------------------------------------------------

Header = Struct(
    "magic" / Int32ub,
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,  # bytes; 0: no backing file
    "backing_file_size" / Int32ub,  # bytes of the name, not NUL terminated
    "cluster_bits" / Int32ub,
    "size" / Int64ub,  # bytes
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,  # entries
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
    # version 3; a version 2 header ends here (72 bytes)
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
    # only if header_length > 104
    "compression_type" / Int8ub,
    "padding" / Bytes(7),
)
V2_LENGTH = 72
V3_LENGTH = 104

CRYPT_METHODS = {0: "none", 1: "aes", 2: "luks"}
COMPRESSION_TYPES = {0: "zlib", 1: "zstd"}

INCOMPATIBLE = ("dirty", "corrupt", "external data file", "compression type", "extended l2")
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
COMPATIBLE = ("lazy refcounts",)
LAZY_REFCOUNTS = 1
AUTOCLEAR = ("bitmaps", "raw external data")
BITMAPS, RAW_DATA = 1, 2

# --- header extensions (section "Header extensions") ------------------------------------------------------

ExtensionHeader = Struct("type" / Int32ub, "length" / Int32ub)  # then the data, padded to 8 bytes

END = 0x00000000
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
FULL_DISK_ENCRYPTION = 0x0537BE77
BITMAP_DIRECTORY = 0x23852875
DATA_FILE_NAME = 0x44415441
EXTENSION_NAMES = {
    END: "end",
    BACKING_FORMAT: "backing format",
    FEATURE_NAMES: "feature names",
    FULL_DISK_ENCRYPTION: "full disk encryption",
    BITMAP_DIRECTORY: "bitmaps",
    DATA_FILE_NAME: "data file name",
}

FeatureName = Struct(
    "type" / Int8ub,  # 0 incompatible, 1 compatible, 2 autoclear
    "bit" / Int8ub,
    "name" / Bytes(46),  # NUL padded
)
FEATURE_TYPES = ("incompatible", "compatible", "autoclear")

EncryptionPointer = Struct("offset" / Int64ub, "length" / Int64ub)

BitmapExtension = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "directory_size" / Int64ub,  # bytes
    "directory_offset" / Int64ub,
)

# --- snapshots (section "Snapshots") ----------------------------------------------------------------------

SnapshotEntry = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)  # then the extra data, the id and the name; the next entry starts at a multiple of 8

SnapshotExtra = Struct(
    "vm_state_size" / Int64ub,  # if extra_data_size >= 8
    "disk_size" / Int64ub,  # if extra_data_size >= 16
    "icount" / Int64ub,  # if extra_data_size >= 24
)

# --- bitmaps (section "Bitmaps") --------------------------------------------------------------------------

BitmapDirectoryEntry = Struct(
    "table_offset" / Int64ub,
    "table_size" / Int32ub,  # entries
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)  # then the extra data and the name; the next entry starts at a multiple of 8
BITMAP_FLAGS = ("in-use", "auto", "extra-data-compatible")
BITMAP_IN_USE, BITMAP_AUTO = 1, 2
DIRTY_TRACKING = 1  # the only bitmap type

# --- entries of tables ------------------------------------------------------------------------------------

L1Entry = BitStruct(
    "copied" / Flag,  # the L2 table's refcount is exactly one
    "reserved_high" / BitsInteger(7),
    "offset" / Scaled(47, 512),  # of the L2 table; 0: none
    "reserved_low" / BitsInteger(9),
)
L1 = Columns(L1Entry)

L2Entry = BitStruct(
    "copied" / Flag,  # the cluster's refcount is exactly one
    "compressed" / Flag,  # then the rest is a compressed cluster descriptor
    "reserved_high" / BitsInteger(6),
    "offset" / Scaled(47, 512),  # of the host cluster
    "reserved_low" / BitsInteger(8),
    "zero" / Flag,  # reads as zeros (version 3, standard entries only)
)
L2 = Columns(L2Entry)

ExtendedL2Entry = BitStruct(
    *L2Entry.subcon.subcons,  # its bit 0 has no meaning
    "zero_bitmap" / BitsInteger(32),  # bit n: subcluster n reads as zeros
    "allocated_bitmap" / BitsInteger(32),  # bit n: subcluster n is in the host cluster
)
EXTENDED_L2_COLUMNS = Columns(ExtendedL2Entry)
SUBCLUSTERS = 32

RefcountTableEntry = BitStruct(
    "offset" / Scaled(55, 512),  # of the refcount block; 0: all its refcounts are 0
    "reserved" / BitsInteger(9),
)
REFCOUNT_TABLE = Columns(RefcountTableEntry)

BitmapTableEntry = BitStruct(
    "reserved_high" / BitsInteger(8),
    "offset" / Scaled(47, 512),  # of the cluster of bits; 0: see all_ones
    "reserved_low" / BitsInteger(8),
    "all_ones" / Flag,  # without an offset: all bits are 1, else all are 0
)
BITMAP_TABLE = Columns(BitmapTableEntry)


def compressed_entry(cluster_bits: int) -> Any:
    """The L2 entry of a compressed cluster; its split depends on the cluster size.

    `host_offset` is in bytes, with no alignment; `sectors` counts the 512-byte sectors after the first.
    """
    sector_bits = cluster_bits - 8
    return BitStruct(
        "copied" / Flag,  # must be 0
        "compressed" / Flag,
        "sectors" / BitsInteger(sector_bits),
        "host_offset" / BitsInteger(62 - sector_bits),
    )


@cache
def compressed(cluster_bits: int) -> Columns:
    """`compressed_entry` as columns."""
    return Columns(compressed_entry(cluster_bits))


def refcount_unit(order: int) -> Any:
    """The smallest whole number of bytes of a refcount block, for refcounts of 2^order bits.

    Refcounts narrower than a byte are packed from its least significant bits on; field "n" is the
    n-th refcount of the unit.
    """
    width = 1 << order
    return BitStruct(*(str(n) / BitsInteger(width) for n in reversed(range(max(1, 8 // width)))))


@cache
def refcounts(order: int) -> Columns:
    """`refcount_unit` as columns."""
    return Columns(refcount_unit(order))
