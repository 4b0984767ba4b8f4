"""The qcow2 driver: one layer, opened as QEMU opens it, read-only."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from imgloop.formats.driver import Backing, Driver, OpenFile, Purpose
from imgloop.formats.errors import CorruptError, FormatError, Where
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.bitmaps import Bitmap, bitmap_extension, check_bitmap_tables, read_bitmaps
from imgloop.formats.qcow2.compression import DecodeError, decoder
from imgloop.formats.qcow2.header import (
    bitmap_warning,
    extension_problems,
    last_extension,
    needed_to_open,
    problems,
    promise_problems,
    read_backing_name,
    read_extensions,
    read_header,
    size_problems,
)
from imgloop.formats.qcow2.snapshots import Snapshot, check_l1, find_snapshot, read_snapshots
from imgloop.formats.source import Source

if TYPE_CHECKING:
    from imgloop.formats.extents import Extents
    from imgloop.formats.qcow2.mapping import Mapping

L2_SLICE = 1 << 16  # bytes of an L2 table that QEMU looks at together


class Qcow2(Driver):
    """A qcow2 image, or the view of one of its snapshots.

    `open_data_file` opens the external data file by its name where the image has one; without it
    (`qemu-img info`) the guest's data cannot be read. Raises OpenError (FormatError, with the field) for what
    QEMU refuses, in its order and words.
    """

    format = "qcow2"

    def __init__(
        self, source: Source, *, open_data_file: OpenFile | None = None, purpose: Purpose = "read"
    ) -> None:
        self.source = source
        self.files = (source,)
        self.header = header = read_header(source)
        for problem in problems(source, header, checking=purpose == "check"):
            raise problem
        for problem in extension_problems(source, header):
            raise problem
        self.extensions, _ = read_extensions(source, header)
        self.size = header.virtual_size
        self.cluster_size = header.cluster_size
        self.status_span = min(header.cluster_size, L2_SLICE) * header.l2_entries
        self.pieces = schema.SUBCLUSTERS if header.extended_l2 else 1
        for problem in promise_problems(source, header, self.extensions, reading=purpose != "info"):
            raise problem
        self._check_encryption(purpose)
        if purpose != "info":
            self._open_data_file(open_data_file)
        name = read_backing_name(source, header)
        recorded = last_extension(self.extensions, schema.BACKING_FORMAT)
        self.backing = Backing(name, recorded.text or None if recorded else None) if name else None
        self.snapshots: list[Snapshot] = []
        if purpose != "check":
            with needed_to_open("Failed to read snapshot table"):
                self.snapshots = list(read_snapshots(source, header))
        self.bitmaps = self._load_bitmaps()
        for problem in size_problems(source, header):
            raise problem
        warning = bitmap_warning(header, self.extensions)
        self.warnings = (warning,) if warning else ()
        self._l1 = (header.l1_table_offset, header.l1_size)

    def _bad(self, field: str, message: str) -> FormatError:
        offset = schema.offset_of(schema.Header, field)
        return FormatError(message, Where(self.source.name, offset, field, getattr(self.header, field)))

    def _check_encryption(self, purpose: Purpose) -> None:
        method = self.encryption
        if method and purpose == "read":
            raise self._bad("crypt_method", f"The image is encrypted ({method}), which cannot be read yet")

    @property
    def encryption(self) -> str | None:
        """The encryption method, aes or luks; None for a plain image."""
        return schema.CRYPT_METHODS[self.header.crypt_method] if self.header.crypt_method else None

    @property
    def data_file_name(self) -> str | None:
        """The external data file's name as stored, None without one; it may stand there without being used."""
        found = last_extension(self.extensions, schema.DATA_FILE_NAME)
        return found.text if found else None

    def _open_data_file(self, open_data_file: OpenFile | None) -> None:
        if self.header.has_data_file:
            name = self.data_file_name
            if open_data_file is None or name is None:
                raise self._bad("incompatible_features", "'data-file' is required for this image")
            self.files = (self.source, open_data_file(name))

    def _load_bitmaps(self) -> list[Bitmap]:
        extension = bitmap_extension(self.extensions)
        if extension is None or not self.header.autoclear_features & schema.BITMAPS:
            return []
        with needed_to_open("Failed to read bitmap directory"):
            bitmaps = list(read_bitmaps(self.source, self.header, extension))
        check_bitmap_tables(self.source, self.header, bitmaps)
        return bitmaps

    @cached_property
    def mapping(self) -> Mapping:
        """The L1 table in force and what lies below it."""
        from imgloop.formats.qcow2.mapping import Mapping

        return Mapping(self.source, self.header, *self._l1)

    @cached_property
    def _sparse(self) -> bool:
        from imgloop.formats.qcow2.refcounts import preallocated_metadata

        return preallocated_metadata(self.source, self.header)

    def extents(self, start: int, length: int, *, holes: bool = False) -> Extents:
        """The extents of [start, start + length); see `Driver.extents`.

        With `holes`, the host file is asked only where its metadata was preallocated, as QEMU does.
        """
        table = self.mapping.extents(start, length)
        table["file"] = len(self.files) - 1
        if holes and self._sparse:
            from imgloop.formats.extents import split_holes

            return split_holes(table, self.files[-1])
        return table

    def explain_invalid(self, start: int) -> CorruptError:
        """Why the entry for guest offset `start` (bytes) makes it unreadable, in QEMU's words."""
        return self.mapping.explain_invalid(start)

    @cached_property
    def _decode(self) -> Any:
        return decoder(self.header.compression_type)

    def decode(self, offset: int, stored: int) -> bytes:
        """The compressed cluster whose stream lies at host `offset`, `stored` bytes long."""
        stream = self.source.pread(stored, offset)
        try:
            data: bytes = self._decode(stream, self.header.cluster_size)
        except DecodeError as error:
            where = Where(self.source.name, offset, "compressed cluster")
            raise CorruptError(f"Image is corrupt: {error}", where) from error
        return data

    def snapshot(self, id: str | None = None, name: str | None = None) -> Qcow2:
        """The layer as it was at a snapshot; see `Driver.snapshot`. Its size is that of the disk then."""
        found = find_snapshot(self.snapshots, id, name)
        check_l1(self.source, self.header, found)
        view = Qcow2.__new__(Qcow2)
        view.__dict__.update(self.__dict__)
        view.__dict__.pop("mapping", None)
        view.size = found.disk_size // 512 * 512
        view._l1 = (found.l1_table_offset, found.l1_size)
        return view

    def dirty_bitmaps(self) -> list[tuple[bytes, int]] | None:
        """The bitmaps that were saved properly; version 2 has none."""
        if self.header.version < 3:
            return None
        names = ((bitmap.name.encode("utf-8", "surrogateescape"), bitmap) for bitmap in self.bitmaps)
        return [(name, bitmap.granularity) for name, bitmap in names if not bitmap.in_use]

    def info(self) -> dict[str, Any]:
        """What `qemu-img info` says beyond size and names (qcow2_get_specific_info)."""
        header = self.header
        modern = header.version >= 3
        data: dict[str, Any] = {
            "compat": "1.1" if modern else "0.10",
            "compression-type": schema.COMPRESSION_TYPES[header.compression_type],
        }
        if modern:
            data["lazy-refcounts"] = bool(header.compatible_features & schema.LAZY_REFCOUNTS)
            if self.bitmaps:
                data["bitmaps"] = [
                    {"flags": bitmap.flag_names(), "name": bitmap.name, "granularity": bitmap.granularity}
                    for bitmap in self.bitmaps
                ]
        data["refcount-bits"] = 1 << header.refcount_order
        if self.data_file_name is not None:
            data["data-file"] = self.data_file_name
        if self.encryption:
            data["encrypt"] = self._encryption_info()
        if modern:
            if header.has_data_file:
                data["data-file-raw"] = bool(header.autoclear_features & schema.RAW_DATA)
            data["corrupt"] = bool(header.incompatible_features & schema.CORRUPT)
            data["extended-l2"] = header.extended_l2
        return data

    def _encryption_info(self) -> dict[str, Any]:
        """How the image is encrypted: for LUKS, what its header says."""
        found = last_extension(self.extensions, schema.FULL_DISK_ENCRYPTION)
        if self.encryption != "luks" or found is None:
            return {"format": self.encryption}
        from imgloop.formats.luks.header import info, read_header

        pointer = schema.record(schema.EncryptionPointer, found.data)
        return info(read_header(self.source, pointer["offset"], pointer["length"]))

    @property
    def dirty(self) -> bool:
        """Whether the dirty bit is set: refcounts may be behind."""
        return bool(self.header.incompatible_features & schema.DIRTY)
