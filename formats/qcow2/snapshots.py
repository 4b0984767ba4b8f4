"""Internal snapshots: the snapshot table, and how one is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from imgloop.formats.errors import FormatError, OpenError, Where
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.header import MAX_L1_ENTRIES, MAX_SNAPSHOTS, Header, c_string
from imgloop.formats.source import MAX_LENGTH, MAX_OFFSET, Source

MAX_EXTRA_DATA = 1024  # bytes of extra data in an entry
MAX_TABLE = 1024 * MAX_SNAPSHOTS  # bytes of the whole table
NO_ICOUNT = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table; sizes in bytes, the clock in nanoseconds."""

    offset: int  # of the entry in the file
    end: int  # of the entry, without the padding
    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int
    icount: int | None
    extra_data_size: int


def read_snapshots(source: Source, header: Header) -> Iterator[Snapshot]:
    """The entries of the snapshot table in order; FormatError at the first that QEMU refuses.

    Entries past the end of the file read as zeros, as everything there does.
    """
    offset = header.snapshots_offset
    head = schema.SnapshotEntry.sizeof()
    for index in range(header.nb_snapshots):
        offset = offset + 7 & ~7
        fields = schema.record(schema.SnapshotEntry, source.pread(head, offset))
        extra_size, id_size, name_size = fields["extra_data_size"], fields["id_size"], fields["name_size"]
        if extra_size > MAX_EXTRA_DATA:
            where = Where(source.name, offset + head - 4, f"extra_data_size of snapshot {index}", extra_size)
            raise FormatError(f"Too much extra metadata in snapshot table entry {index}", where)
        body = source.pread(extra_size + id_size + name_size, offset + head)
        extra = schema.record(schema.SnapshotExtra, body[:extra_size]) if extra_size else {}
        end = offset + head + len(body)
        if end - header.snapshots_offset > MAX_TABLE:
            where = Where(source.name, offset, f"snapshot table entry {index}")
            raise FormatError("Snapshot table is too big", where)
        yield Snapshot(
            offset=offset,
            end=end,
            id=c_string(body[extra_size : extra_size + id_size]),
            name=c_string(body[extra_size + id_size :]),
            l1_table_offset=fields["l1_table_offset"],
            l1_size=fields["l1_size"],
            date_sec=fields["date_sec"],
            date_nsec=fields["date_nsec"],
            vm_clock_nsec=fields["vm_clock_nsec"],
            vm_state_size=extra["vm_state_size"] if extra_size >= 8 else fields["vm_state_size"],
            disk_size=extra["disk_size"] if extra_size >= 16 else header.virtual_size,
            icount=extra["icount"] if extra_size >= 24 and extra["icount"] != NO_ICOUNT else None,
            extra_data_size=extra_size,
        )
        offset = end


def find_snapshot(snapshots: list[Snapshot], id: str | None, name: str | None) -> Snapshot:
    """The first snapshot of that id and that name (None: any); OpenError where there is none."""
    for snapshot in snapshots:
        if id in (None, snapshot.id) and name in (None, snapshot.name):
            return snapshot
    raise OpenError(f"Failed to load snapshot: Can't find snapshot '{id if name is None else name}'")


def check_l1(source: Source, header: Header, snapshot: Snapshot) -> None:
    """FormatError where QEMU refuses the snapshot's L1 table (qcow2_snapshot_load_tmp)."""
    where = Where(source.name, snapshot.offset, f"snapshot '{snapshot.name}'")
    if snapshot.l1_size > MAX_L1_ENTRIES:
        raise FormatError("Failed to load snapshot: Snapshot L1 table too large", where)
    table_end = snapshot.l1_table_offset + snapshot.l1_size * schema.L1.size
    if snapshot.l1_table_offset % header.cluster_size or table_end > MAX_OFFSET:
        raise FormatError("Failed to load snapshot: Snapshot L1 table offset invalid", where)
    if snapshot.l1_size and table_end > MAX_LENGTH:
        raise FormatError("Failed to load snapshot: Failed to read l1 table for snapshot", where)
    if snapshot.disk_size > MAX_OFFSET:
        raise FormatError("Failed to load snapshot: Could not refresh total sector count: File too large", where)
