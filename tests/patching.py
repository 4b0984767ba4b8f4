"""Small qcow2 images written from the specification, so that a test can damage one field at a time.

The offsets below are the specification's, typed in here once more on purpose: the project's own schema is
what the tests judge, and a mistake in it must not be repeated by the image that is to reveal it.

An image has clusters of 4 KiB unless told otherwise, and this layout:

    cluster 0   header, extensions, backing file name
    cluster 1   refcount table
    cluster 2   refcount block
    cluster 3   L1 table
    cluster 4   L2 table
    cluster 5   data (`DATA`)
    cluster 8   free for what a test puts `at` it
"""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

FIELDS = {  # name: (offset in bytes, format)
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
}
V2_LENGTH, V3_LENGTH = 72, 112  # bytes of header that `build` writes

# types of header extensions
END, BACKING_FORMAT, FEATURE_NAMES = 0, 0xE2792ACA, 0x6803F857
ENCRYPTION, BITMAPS, DATA_FILE = 0x0537BE77, 0x23852875, 0x44415441

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1  # bits of L2 entries
MIB = 1 << 20


def build(
    fields: Mapping[str, int] | None = None,
    at: Mapping[int, bytes] | None = None,
    *,
    version: int = 3,
    cluster_bits: int = 12,
    size: int = MIB,
    extensions: Iterable[bytes] = (),
    l2: Mapping[int, int | tuple[int, int]] | None = None,
) -> bytes:
    """A qcow2 image, sound but for what the arguments change.

    `fields` sets header fields by name, `at` puts bytes at offsets of the file, both after all else. `l2`
    sets entries of the L2 table; a pair is an extended entry, its second half the bitmap.
    """
    cluster = 1 << cluster_bits
    image = bytearray(6 * cluster)
    header = {
        "magic": 0x514649FB,
        "version": version,
        "cluster_bits": cluster_bits,
        "size": size,
        "l1_size": 1,
        "l1_table_offset": 3 * cluster,
        "refcount_table_offset": cluster,
        "refcount_table_clusters": 1,
    }
    if version >= 3:
        header |= {"refcount_order": 4, "header_length": V3_LENGTH}
    set_fields(image, header)
    area = b"".join(extensions)
    start = V3_LENGTH if version >= 3 else V2_LENGTH
    image[start : start + len(area)] = area
    put(image, cluster, 2 * cluster | 0)
    for number in range(6):
        image[2 * cluster + 2 * number + 1] = 1
    put(image, 3 * cluster, 4 * cluster | COPIED)
    for index, entry in ({0: COPIED | 5 * cluster} if l2 is None else l2).items():
        words = entry if isinstance(entry, tuple) else (entry,)
        for half, word in enumerate(words):
            put(image, 4 * cluster + 8 * (index * len(words) + half), word)
    image[5 * cluster :] = DATA(cluster)
    set_fields(image, fields or {})
    for offset, data in (at or {}).items():
        image.extend(bytes(max(0, offset + len(data) - len(image))))
        image[offset : offset + len(data)] = data
    return bytes(image)


def DATA(length: int) -> bytes:  # noqa: N802  # a constant, but for its length
    """What data clusters hold: every eight bytes another number, so that a shift shows."""
    return struct.pack(f">{length // 8}Q", *range(0x1000001, 0x1000001 + length // 8))


def set_fields(image: bytearray, fields: Mapping[str, int]) -> None:
    """Set header fields, each by its name."""
    for name, value in fields.items():
        offset, layout = FIELDS[name]
        struct.pack_into(layout, image, offset, value)


def put(image: bytearray, offset: int, word: int) -> None:
    """Set the 64-bit word at `offset`."""
    struct.pack_into(">Q", image, offset, word)


def extension(kind: int, data: bytes = b"", length: int | None = None) -> bytes:
    """A header extension, padded to eight bytes; `length` is what it claims, if not the truth."""
    head = struct.pack(">II", kind, len(data) if length is None else length)
    return head + data + bytes(-len(data) % 8)


def sparse(path: Path, image: bytes, length: int | None = None) -> Path:
    """Write an image, its runs of zero blocks as holes; `length` makes the file longer (bytes)."""
    with path.open("wb") as file:
        for offset in range(0, len(image), 4096):
            block = image[offset : offset + 4096]
            if block.strip(b"\0"):
                file.seek(offset)
                file.write(block)
        file.truncate(max(len(image), length or 0))
    return path
