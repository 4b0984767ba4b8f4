"""Findings: what a check has to say of an image, as data.

Every kind of finding is declared once, in `RULES`: its code, which never changes, how grave it is, what it
means for the guest and what would mend it. Where QEMU has a message for it, that is declared too: what
`qemu-img check` prints on stderr is one rendering of findings, JSON is another.

Checks do not make an object of each: an image may have millions of leaked clusters. They count by code, and yield
an `Event` at a time, in QEMU's order, as far as somebody wants to read; a `Finding` is an event with its
owners looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Severity = Literal["corruption", "leak", "warning", "note"]
Counter = Literal["corruptions", "leaks", "check-errors"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of finding.

    `message` is QEMU's text with %-placeholders, or ours; `fields` name the values that go into it, in order.
    `counter` is the total of qemu-img's that an event adds to; None for findings of our own.
    """

    code: str
    severity: Severity
    title: str
    meaning: str  # for the guest
    remedy: str
    message: str
    fields: tuple[str, ...] = ()
    counter: Counter | None = None


class Event(NamedTuple):
    """One occurrence of a rule: the values of its fields, and the entry that it was found at (-1: none).

    `view` is 0 for the active L1 table and n for that of the n-th snapshot (from 1 on).
    """

    code: str
    values: tuple[int | str, ...] = ()
    view: int = -1
    l1_index: int = -1
    l2_index: int = -1

    @property
    def text(self) -> str:
        """The message, as QEMU prints it where it has one; empty where QEMU says nothing."""
        message = RULES[self.code].message
        return message % self.values if message else ""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who claims host bytes: a structure of the image, by its kind and its place.

    `host` and `guest` are ranges (offset, length) in bytes; `guest` is None where no guest data is concerned.
    `view` is "active", or names the snapshot.
    """

    kind: str
    host: tuple[int, int]
    view: str | None = None
    l1_index: int | None = None
    l2_table: int | None = None  # host offset of the table (bytes)
    l2_index: int | None = None
    name: str | None = None  # of a snapshot or a bitmap
    guest: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name.replace("_", "-"): _range(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None
        }

    def __str__(self) -> str:
        place = [self.kind]
        if self.name:
            place.append(f"'{self.name}'")
        if self.l1_index is not None:
            place.append(f"L1[{self.l1_index}]")
        if self.l2_index is not None:
            place.append(f"L2[{self.l2_index}]")
        if self.view is not None:
            place.append("of the active image" if self.view == "active" else f"of snapshot '{self.view}'")
        if self.guest:
            place.append(f"(guest {self.guest[0]:#x})")
        return " ".join(place)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing: see its rule. Ranges are (offset, length) in bytes."""

    rule: Rule
    message: str
    values: dict[str, int | str]
    host: tuple[int, int] | None = None
    guest: tuple[tuple[int, int], ...] = ()
    owners: tuple[Owner, ...] = ()
    file: str | None = None  # where not the checked image itself

    @property
    def code(self) -> str:
        """The rule's code."""
        return self.rule.code

    @property
    def severity(self) -> Severity:
        """The rule's severity."""
        return self.rule.severity

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        data: dict[str, Any] = {
            "code": self.rule.code,
            "severity": self.rule.severity,
            "message": self.message,
            "values": self.values,
        }
        if self.file is not None:
            data["file"] = self.file
        if self.host is not None:
            data["host"] = _range(self.host)
        if self.guest:
            data["guest"] = [_range(one) for one in self.guest]
        if self.owners:
            data["owners"] = [owner.to_json() for owner in self.owners]
        return data | {"meaning": self.rule.meaning, "remedy": self.rule.remedy}


def _range(pair: tuple[int, int]) -> dict[str, int]:
    return {"offset": pair[0], "length": pair[1]}


_REPAIR = "qemu-img check -r all recounts; convert the image to a new one if data matters more than the file"
_LEAK_REPAIR = "qemu-img check -r leaks frees the space"
_REWRITE = "no tool repairs this entry; restore it from a backup, or convert what can still be read to a new image"
_READS_ON = "reads are not affected; the bits mean nothing to this version of the format"


def _qemu(code: str, counter: Counter, title: str, message: str, fields: str, meaning: str, remedy: str) -> Rule:
    """A rule of qemu-img's own."""
    severity: Severity = "leak" if counter == "leaks" else "corruption"
    return Rule(code, severity, title, meaning, remedy, message, tuple(fields.split()), counter)


def _own(code: str, severity: Severity, title: str, message: str, fields: str, meaning: str, remedy: str) -> Rule:
    """A rule that qemu-img does not have."""
    return Rule(code, severity, title, meaning, remedy, message, tuple(fields.split()))


_QEMU_RULES = (
    # --- the snapshot table ---
    _qemu(
        "SNAPSHOT_TABLE_INVALID", "check-errors", "The header names an impossible snapshot table",
        "ERROR %s", "reason",
        "internal snapshots cannot be reached, and writing programs refuse the image",
        "correct nb_snapshots or snapshots_offset in the header",
    ),
    _qemu(
        "SNAPSHOT_TABLE_UNREADABLE", "check-errors", "The snapshot table cannot be parsed",
        "ERROR failed to read the snapshot table: %s", "reason",
        "internal snapshots cannot be reached, and writing programs refuse the image",
        "qemu-img check -r all drops what does not fit",
    ),
    _qemu(
        "SNAPSHOT_ENTRY_INCOMPLETE", "corruptions", "A snapshot's entry lacks extra data that version 3 demands",
        "ERROR snapshot table entry %d is incomplete", "entry",
        "the size of the disk at the time of the snapshot is unknown",
        "qemu-img check -r all completes the entry",
    ),
    # --- claims ---
    _qemu(
        "REGION_PAST_END", "corruptions", "An entry names host bytes past the end of the file",
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
        "offset 0x%x size 0x%x", "offset size",
        "what lay there is lost: it reads as zeros, tables as empty ones",
        "restore the file's missing tail from a backup",
    ),
    _qemu(
        "REFCOUNT_OVERFLOW", "corruptions", "More references to a cluster than a refcount can hold",
        "ERROR: overflow cluster offset=0x%x\n"
        "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy "
        "if the image cannot be opened for writing", "offset",
        "the cluster may be freed, and overwritten, while it is still in use",
        "convert to a new image, or amend refcount_bits",
    ),
    _qemu(
        "L1_UNREADABLE", "check-errors", "An L1 table is at an offset that no file has",
        "ERROR: I/O error in check_refcounts_l1", "",
        "nothing below this table can be reached", _REWRITE,
    ),
    _qemu(
        "L1_ENTRY_RESERVED_BITS", "corruptions", "An L1 entry has reserved bits set",
        "ERROR found L1 entry with reserved bits set: %x", "entry", _READS_ON, _REWRITE,
    ),
    _qemu(
        "L2_TABLE_UNALIGNED", "corruptions", "An L1 entry names an L2 table that is not at a cluster's start",
        "ERROR l2_offset=%x: Table is not cluster aligned; L1 entry corrupted", "offset",
        "all guest data below this L1 entry cannot be read", _REWRITE,
    ),
    _qemu(
        "L2_ENTRY_RESERVED_BITS", "corruptions", "An L2 entry has reserved bits set",
        "ERROR found l2 entry with reserved bits set: %x", "entry", _READS_ON, _REWRITE,
    ),
    _qemu(
        "COMPRESSED_COPIED", "corruptions", "A compressed cluster has the COPIED flag",
        "ERROR: coffset=0x%x: copied flag must never be set for compressed clusters", "offset",
        "reads are not affected; a write may reuse space that other compressed clusters share", _REWRITE,
    ),
    _qemu(
        "COMPRESSED_WITH_DATA_FILE", "corruptions", "A compressed cluster in an image with a data file",
        "ERROR compressed cluster %d with data file, entry=0x%x", "l2_index entry",
        "the cluster cannot be read", _REWRITE,
    ),
    _qemu(
        "COMPRESSED_WITH_SUBCLUSTERS", "corruptions", "A compressed cluster has a subcluster bitmap",
        "ERROR compressed cluster %d with non-zero subcluster allocation bitmap, entry=0x%x", "l2_index entry",
        "reads are not affected; the space of the stream counts as free", _REWRITE,
    ),
    _qemu(
        "SUBCLUSTERS_CONTRADICT", "corruptions", "Subclusters are both allocated and zero",
        "ERROR offset=%x: Allocated cluster has corrupted subcluster allocation bitmap", "offset",
        "the cluster cannot be read", _REWRITE,
    ),
    _qemu(
        "DATA_UNALIGNED", "corruptions", "A data cluster is not at a cluster's start",
        "ERROR offset=%x: Data cluster is not properly aligned; L2 entry corrupted.", "offset",
        "the cluster cannot be read", _REWRITE,
    ),
    _qemu(
        "PREALLOCATED_UNALIGNED", "corruptions", "A preallocated zero cluster is not at a cluster's start",
        "ERROR offset=%x: Preallocated cluster is not properly aligned; L2 entry corrupted.", "offset",
        "the cluster cannot be read, though it should read as zeros",
        "qemu-img check -r all makes it a plain zero cluster",
    ),
    _qemu(
        "SUBCLUSTERS_WITHOUT_CLUSTER", "corruptions", "Subclusters are allocated, but no cluster is",
        "ERROR: Unallocated cluster has non-zero subcluster allocation map", "",
        "the cluster cannot be read", _REWRITE,
    ),
    _qemu(
        "SNAPSHOTS_WITH_DATA_FILE", "corruptions", "Internal snapshots in an image with a data file",
        "ERROR %d snapshots in image with data file", "snapshots",
        "the snapshots' data was overwritten by later writes to the data file", "delete the snapshots",
    ),
    _qemu(
        "SNAPSHOT_L1_UNALIGNED", "corruptions", "A snapshot's L1 table is not at a cluster's start",
        "ERROR snapshot %s (%s) l1_offset=%#x: L1 table is not cluster aligned; snapshot table entry corrupted",
        "id name offset", "the snapshot cannot be read or applied", "delete the snapshot",
    ),
    _qemu(
        "SNAPSHOT_L1_TOO_LARGE", "corruptions", "A snapshot's L1 table is too large",
        "ERROR snapshot %s (%s) l1_size=%#x: L1 table is too large; snapshot table entry corrupted",
        "id name entries", "the snapshot cannot be read or applied", "delete the snapshot",
    ),
    _qemu(
        "BITMAP_TABLE_INVALID", "corruptions", "A bitmap's table has an invalid entry",
        "", "name",
        "the dirty bitmap is lost: the next incremental backup must be a full one", "remove the bitmap",
    ),
    # --- refcount structures ---
    _qemu(
        "REFTABLE_ENTRY_RESERVED_BITS", "corruptions", "A refcount table entry has reserved bits set",
        "ERROR refcount table entry %d has reserved bits set", "index",
        "none while reading; writing is unsafe", _REPAIR,
    ),
    _qemu(
        "REFBLOCK_UNALIGNED", "corruptions", "A refcount block is not at a cluster's start",
        "ERROR refcount block %d is not cluster aligned; refcount table entry corrupted", "index",
        "none while reading; writing is impossible", _REPAIR,
    ),
    _qemu(
        "REFBLOCK_OUTSIDE", "corruptions", "A refcount block lies past the end of the file",
        "ERROR refcount block %d is outside image", "index",
        "none while reading; clusters that it counted look free, and writing is unsafe", _REPAIR,
    ),
    _qemu(
        "REFBLOCK_SHARED", "corruptions", "A refcount block's cluster is used for something else as well",
        "ERROR refcount block %d refcount=%d", "index refcount",
        "one of the two users has been overwritten, or will be", _REPAIR,
    ),
    _qemu(
        "REFCOUNT_UNREADABLE", "check-errors", "The refcount of a cluster cannot be looked up",
        "Can't get refcount for cluster %d: Input/output error", "cluster",
        "none while reading; writing is impossible", _REPAIR,
    ),
    # --- the comparison ---
    _qemu(
        "REFCOUNT_TOO_LOW", "corruptions", "A cluster has more users than its refcount says",
        "ERROR cluster %d refcount=%d reference=%d", "cluster refcount reference",
        "the next write may overwrite it while somebody still uses it", _REPAIR,
    ),
    _qemu(
        "CLUSTER_LEAKED", "leaks", "A cluster has fewer users than its refcount says",
        "Leaked cluster %d refcount=%d reference=%d", "cluster refcount reference",
        "none: the space is wasted", _LEAK_REPAIR,
    ),
    _qemu(
        "L2_COPIED_FLAG", "corruptions", "An L1 entry's COPIED flag contradicts the refcount",
        "ERROR OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=%x refcount=%d", "l1_index entry refcount",
        "a write may change a table that a snapshot shares, or needlessly copy it",
        "qemu-img check -r all, or -r leaks where nothing else is wrong",
    ),
    _qemu(
        "DATA_COPIED_FLAG", "corruptions", "An L2 entry's COPIED flag contradicts the refcount",
        "ERROR OFLAG_COPIED data cluster: l2_entry=%x refcount=%d", "entry refcount",
        "a write may change data that a snapshot shares, or needlessly copy it",
        "qemu-img check -r all, or -r leaks where nothing else is wrong",
    ),
)  # fmt: skip

# What QEMU prints beside its findings: no finding, only words.
REFBLOCK_SIGNAL = Rule(
    "REFBLOCK_SIGNAL", "note", "", "", "",
    "qcow2: Image is corrupt: Refblock offset %#x unaligned (reftable index: %s); "
    "further non-fatal corruption events will be suppressed", ("offset", "index"),
)  # fmt: skip
HINT = Rule("HINT", "note", "", "", "", "%s", ("text",))

_OWN_RULES = (
    _own(
        "UNREADABLE_IMAGE", "corruption", "The image cannot be opened",
        "%s", "reason", "none of it can be read in the ordinary way",
        "correct the field that is named; imgloop dump shows what can be read",
    ),
    _own(
        "FIELD_INVALID", "corruption", "Another field breaks a rule of the format",
        "%s", "reason", "the image cannot be opened, even when what is said first is mended",
        "correct the field",
    ),
    _own(
        "CLUSTER_SHARED", "corruption", "Two guest clusters of one disk are the same host cluster",
        "Host cluster 0x%x holds %d clusters of the active disk", "offset claims",
        "at most one of the two can be what the guest wrote; writing to one changes the other",
        "compare both with a backup; convert copies each, after which they are apart again",
    ),
    _own(
        "DATA_IN_METADATA", "corruption", "A guest cluster is also a part of the image's own structures",
        "Host cluster 0x%x is guest data and metadata at once", "offset",
        "the guest reads tables as data; what it writes may destroy the image",
        "convert to a new image before anything writes to this one",
    ),
    _own(
        "METADATA_OVERLAP", "corruption", "Two structures of the image lie in one cluster",
        "Host cluster 0x%x is claimed by %d structures", "offset claims",
        "one of the two has been overwritten, or will be", _REPAIR,
    ),
    _own(
        "L2_TABLE_SHARED", "corruption", "Two L1 entries of one disk name the same L2 table",
        "L2 table 0x%x is named by %d entries of the active L1 table", "offset entries",
        "two guest ranges show the same data; writing to one changes the other",
        "compare both with a backup; convert copies each, after which they are apart again",
    ),
    _own(
        "L2_TABLES_NOT_FOLLOWED", "warning", "Too many overlapping L2 tables",
        "%d L2 tables that are not at a cluster's start were not looked into", "tables",
        "none beyond that of such tables: their guest data cannot be read", _REWRITE,
    ),
    _own(
        "ZERO_FLAG_IN_V2", "corruption", "A zero flag in a version 2 image",
        "L2 entry %x has the zero flag, which version 2 does not have", "entry",
        "the cluster cannot be read", "qemu-img amend -o compat=1.1, after which it reads as zeros",
    ),
    _own(
        "DATA_FILE_OFFSET", "corruption", "A cluster is not at its own offset in the data file",
        "Guest cluster 0x%x is mapped to 0x%x of the data file", "guest offset",
        "the cluster cannot be read; read as raw, the data file gives other bytes", _REWRITE,
    ),
    _own(
        "DATA_FILE_SHORT", "corruption", "The data file ends before the data does",
        "The data file has %d bytes, but clusters up to %d are mapped", "size needed",
        "what lay past its end reads as zeros", "restore the data file from a backup",
    ),
    _own(
        "METADATA_TRUNCATED", "corruption", "A table reaches past the end of the file",
        "The %s at 0x%x, %d bytes long, ends past the end of the file", "what offset size",
        "the file's tail was cut off: the missing entries read as zeros, and their data is gone",
        "restore the file's missing tail from a backup",
    ),
    _own(
        "DATA_TRUNCATED", "warning", "The last data cluster reaches past the end of the file",
        "A data cluster at 0x%x ends past the end of the file", "offset",
        "its last bytes read as zeros: the file's tail may have been cut off",
        "compare with a backup where there is one",
    ),
    _own(
        "DIRTY", "warning", "The image was not closed",
        "The dirty bit is set: refcounts may be behind", "",
        "none while reading; a program that opens it for writing must recount first",
        "qemu-img check -r all",
    ),
    _own(
        "CORRUPT", "corruption", "The image was marked corrupt",
        "The corrupt bit is set: a program found the image damaged while it wrote to it", "",
        "data written since may be lost; it can be opened only for reading", _REPAIR,
    ),
    _own(
        "BITMAP_IN_USE", "warning", "A bitmap was not saved",
        "Bitmap '%s' is marked in-use: it was not saved when the image was last closed", "name",
        "the bitmap cannot be trusted: the next incremental backup must be a full one",
        "qemu-img bitmap --remove, and start anew with a full backup",
    ),
    _own(
        "BITMAPS_STALE", "warning", "The bitmaps are not to be trusted",
        "The image has a bitmap directory, but the autoclear bit that vouches for it is clear", "",
        "another program wrote to the image: the next incremental backup must be a full one",
        "qemu-img bitmap --remove, and start anew with a full backup",
    ),
    _own(
        "AUTOCLEAR_WITHOUT_EXTENSION", "warning", "The bitmaps bit is set, but there are no bitmaps",
        "Autoclear bit 0 (bitmaps) is set without a bitmap extension", "",
        "none; bitmaps may have been lost", "any program that opens the image for writing clears the bit",
    ),
    _own(
        "REFCOUNT_PAST_END", "note", "Refcounts for clusters past the end of the file",
        "%d clusters past the end of the file have refcounts, the first of them cluster %d", "clusters cluster",
        "none; the file's tail may have been cut off, and the space will not be used again",
        "qemu-img check -r all after any other repair; or convert",
    ),
    _own(
        "BACKING_FORMAT_MISMATCH", "warning", "The backing file looks like another format than declared",
        "Backing file '%s' is declared as %s, but looks like %s", "name declared found",
        "the guest may see a container's bytes in place of its content",
        "qemu-img rebase -u -F with the true format",
    ),
    _own(
        "BACKING_FORMAT_MISSING", "note", "The backing file's format is not recorded",
        "Backing file '%s' has no recorded format and is probed", "name",
        "a guest that writes to a raw backing file can make it look like another format",
        "qemu-img rebase -u -F records it",
    ),
    _own(
        "BACKING_SIZE", "note", "The backing file has another size than the image",
        "The image has %d bytes, its backing file '%s' has %d", "size name backing_size",
        "where the backing file is shorter, the rest reads as zeros; where it is longer, the rest is cut off",
        "nothing, if the image was resized on purpose",
    ),
    _own(
        "COMPRESSED_DAMAGED", "corruption", "A compressed cluster cannot be decoded",
        "The compressed cluster at 0x%x (guest 0x%x) cannot be decoded: %s", "offset guest reason",
        "the cluster cannot be read", "restore it from a backup",
    ),
)  # fmt: skip

RULES: dict[str, Rule] = {rule.code: rule for rule in (*_QEMU_RULES, REFBLOCK_SIGNAL, HINT, *_OWN_RULES)}
# The rules that are findings, in the order in which qemu-img looks, ours behind.
FINDINGS: tuple[Rule, ...] = (*_QEMU_RULES, *_OWN_RULES)
OWN_CODES = frozenset(rule.code for rule in _OWN_RULES)


def total(counts: dict[str, int], counter: Counter) -> int:
    """What the counted events add up to in one of qemu-img's totals."""
    return sum(number for code, number in counts.items() if RULES[code].counter == counter)


def worst(rules: Iterable[Rule]) -> Severity | None:
    """The gravest severity among some rules; None where there are none."""
    order: tuple[Severity, ...] = ("corruption", "leak", "warning", "note")
    found = {rule.severity for rule in rules}
    return next((severity for severity in order if severity in found), None)
