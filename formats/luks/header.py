"""The LUKS1 header: parsed without judgement, then judged in QEMU's order, and told as `qemu-img info` tells it.

The header need not be at the start of the file: in a qcow2 image an extension says where it is, and how many
bytes belong to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from imgloop.formats.errors import FormatError, ReadError, Where
from imgloop.formats.luks import schema
from imgloop.formats.source import Source
from imgloop.formats.structures import c_string, offset_of, record

UINT32 = (1 << 32) - 1
_ESSIV_NAMES = {"aes": "AES", "serpent": "Serpent", "twofish": "Twofish"}


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One key slot: the master key under a passphrase, if it is enabled. Offsets in sectors."""

    state: int
    iterations: int
    salt: bytes
    key_offset: int
    stripes: int

    @property
    def active(self) -> bool:
        """Whether a passphrase is set here."""
        return self.state == schema.SLOT_ENABLED

    def length(self, key_bytes: int) -> int:
        """Sectors of the key material, for a master key of so many bytes; in 32 bits, as QEMU counts."""
        sectors = -(-(key_bytes * self.stripes & UINT32) // schema.SECTOR)
        return -(-sectors // schema.KEY_MATERIAL_ALIGNMENT) * schema.KEY_MATERIAL_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Header:
    """The header's fields as stored, and where it starts in the file (bytes)."""

    offset: int
    magic: bytes
    version: int
    cipher_name: bytes
    cipher_mode: bytes
    hash_spec: bytes
    payload_offset: int
    key_bytes: int
    master_key_digest: bytes
    master_key_salt: bytes
    master_key_iterations: int
    uuid: bytes
    slots: tuple[KeySlot, ...]

    @property
    def mode(self) -> str:
        """The cipher's mode of operation: what stands before the first dash of `cipher_mode`."""
        return c_string(self.cipher_mode).partition("-")[0]

    @property
    def iv_generator(self) -> str:
        """How initialisation vectors are made; empty where `cipher_mode` does not say."""
        return c_string(self.cipher_mode).partition("-")[2].partition(":")[0]

    @property
    def iv_hash(self) -> str | None:
        """The hash that the IV generator works with, None where none is named."""
        _, colon, name = c_string(self.cipher_mode).partition("-")[2].partition(":")
        return name if colon else None

    @property
    def cipher_key_bytes(self) -> int:
        """Bytes of one key of the cipher: XTS takes two."""
        return self.key_bytes // 2 if self.mode == "xts" else self.key_bytes


def read_header(source: Source, offset: int, length: int) -> Header:
    """The header at `offset` of the file, of whose bytes `length` belong to it; its fields are not checked.

    Raises FormatError where it does not fit, or cannot be read.
    """
    where = Where(source.name, offset, "LUKS header")
    if length < schema.SIZE:
        raise FormatError("Request for data outside of extension header", where)
    try:
        data = source.pread(schema.SIZE, offset)
    except ReadError as error:
        reason = error.message.rpartition(": ")[2]
        raise FormatError(f"Could not read encryption header: {reason}", where) from error
    size = schema.KeySlot.sizeof()
    starts = range(schema.Header.sizeof(), schema.SIZE, size)
    slots = tuple(KeySlot(**record(schema.KeySlot, data[at : at + size])) for at in starts)
    return Header(offset=offset, slots=slots, **record(schema.Header, data))


def problems(source: Source, offset: int, length: int) -> Iterator[FormatError]:
    """What QEMU refuses in the header at `offset` (of `length` bytes), in its order; the first is what it says."""
    try:
        header = read_header(source, offset, length)
    except FormatError as error:
        yield error
        return
    yield from _field_problems(source, header)
    for number in range(schema.KEY_SLOTS):
        yield from _slot_problems(source, header, number)
    yield from _algorithm_problems(source, header)


def _bad(source: Source, header: Header, field: str, message: str) -> FormatError:
    value = getattr(header, field)
    place = header.offset + offset_of(schema.Header, field)
    shown = c_string(value) if isinstance(value, bytes) else value
    return FormatError(message, Where(source.name, place, f"LUKS {field}", shown))


def _field_problems(source: Source, header: Header) -> Iterator[FormatError]:
    """The header's own fields."""
    if header.magic != schema.MAGIC:
        yield _bad(source, header, "magic", "Volume is not in LUKS format")
    if header.version != schema.VERSION:
        yield _bad(source, header, "version", f"LUKS version {header.version} is not supported")
    for field, name in (
        ("cipher_name", "cipher name"),
        ("cipher_mode", "cipher mode"),
        ("hash_spec", "hash spec"),
    ):
        if b"\0" not in getattr(header, field):
            yield _bad(source, header, field, f"LUKS header {name} is not NUL terminated")
    if header.payload_offset < schema.KEY_MATERIAL_ALIGNMENT:
        yield _bad(source, header, "payload_offset", "LUKS payload is overlapping with the header")
    if header.master_key_iterations == 0:
        yield _bad(source, header, "master_key_iterations", "LUKS key iteration count is zero")


def _slot_problems(source: Source, header: Header, number: int) -> Iterator[FormatError]:
    """One key slot, and whether a later one lies across it."""
    slot = header.slots[number]
    base = header.offset + schema.Header.sizeof() + number * schema.KeySlot.sizeof()

    def bad(field: str, message: str) -> FormatError:
        place = base + offset_of(schema.KeySlot, field)
        return FormatError(
            message, Where(source.name, place, f"LUKS key slot {number} {field}", getattr(slot, field))
        )

    if slot.stripes != schema.STRIPES:
        message = f"Keyslot {number} is corrupted (stripes {_signed(slot.stripes)} != {schema.STRIPES})"
        yield bad("stripes", message)
    if slot.state not in (schema.SLOT_ENABLED, schema.SLOT_DISABLED):
        yield bad("state", f"Keyslot {number} state (active/disable) is corrupted")
    if slot.active and slot.iterations == 0:
        yield bad("iterations", f"Keyslot {number} iteration count is zero")
    if slot.key_offset < schema.KEY_MATERIAL_ALIGNMENT:
        yield bad("key_offset", f"Keyslot {number} is overlapping with the LUKS header")
    end = slot.key_offset + slot.length(header.key_bytes)
    if end & UINT32 > header.payload_offset:
        yield bad("key_offset", f"Keyslot {number} is overlapping with the encrypted payload")
    for other, later in list(enumerate(header.slots))[number + 1 :]:
        if slot.key_offset < later.key_offset + later.length(header.key_bytes) and later.key_offset < end:
            yield bad("key_offset", f"Keyslots {number} and {other} are overlapping in the header")


def _algorithm_problems(source: Source, header: Header) -> Iterator[FormatError]:
    """Algorithms that QEMU does not know, or that do not go together."""

    def bad(field: str, message: str) -> FormatError:
        return _bad(source, header, field, message)

    if "-" not in c_string(header.cipher_mode):
        yield bad("cipher_mode", f"Unexpected cipher mode string format '{c_string(header.cipher_mode)}'")
        return
    if header.iv_hash is not None and header.iv_hash not in schema.HASH_BYTES:
        yield bad("cipher_mode", f"Hash algorithm '{header.iv_hash}' not supported")
    if header.mode not in schema.CIPHER_MODES:
        yield bad("cipher_mode", f"Cipher mode '{header.mode}' not supported")
    name = c_string(header.cipher_name)
    if header.cipher_key_bytes not in schema.CIPHER_KEY_BYTES.get(name, ()):
        size = _signed(header.cipher_key_bytes)
        yield bad("cipher_name", f"Algorithm '{name}' with key size {size} bytes not supported")
    hash_name = c_string(header.hash_spec)
    if hash_name not in schema.HASH_BYTES:
        yield bad("hash_spec", f"Hash algorithm '{hash_name}' not supported")
    if header.iv_generator not in schema.IV_GENERATORS:
        yield bad("cipher_mode", f"IV generator '{header.iv_generator}' not supported")
    if header.iv_generator == "essiv":
        message = _essiv_message(header, name)
        if message:
            yield bad("cipher_mode", message)


def _essiv_message(header: Header, cipher: str) -> str | None:
    """What is wrong with ESSIV here: the digest of its hash is the key of a cipher of the same family."""
    if header.iv_hash is None:
        return "Missing IV generator hash specification"
    digest = schema.HASH_BYTES.get(header.iv_hash)
    if digest is None or digest == header.cipher_key_bytes or digest in schema.CIPHER_KEY_BYTES.get(cipher, ()):
        return None
    if cipher in _ESSIV_NAMES:
        return f"No {_ESSIV_NAMES[cipher]} cipher with key size {digest} available"
    return f"Cipher {cipher}-{header.cipher_key_bytes * 8} not supported with essiv"


def _signed(value: int) -> int:
    """A 32-bit number as QEMU prints it: with a sign."""
    return value - (1 << 32) if value >> 31 else value


def info(header: Header) -> dict[str, Any]:
    """What `qemu-img info` says of a sound header, in its order; offsets in bytes from the header."""
    found: dict[str, Any] = {
        "ivgen-alg": header.iv_generator,
        "detached-header": False,
        "hash-alg": c_string(header.hash_spec),
        "cipher-alg": f"{c_string(header.cipher_name)}-{header.cipher_key_bytes * 8}",
        "uuid": c_string(header.uuid),
    }
    if header.iv_generator == "essiv":
        found["ivgen-hash-alg"] = header.iv_hash
    found |= {
        "format": "luks",
        "cipher-mode": header.mode,
        "slots": [_slot_info(slot) for slot in header.slots],
        "payload-offset": header.payload_offset * schema.SECTOR,
        "master-key-iters": header.master_key_iterations,
    }
    return found


def _slot_info(slot: KeySlot) -> dict[str, Any]:
    offset = slot.key_offset * schema.SECTOR
    if not slot.active:
        return {"active": False, "key-offset": offset}
    return {"active": True, "iters": slot.iterations, "key-offset": offset, "stripes": slot.stripes}
