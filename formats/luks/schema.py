"""The on-disk structures of LUKS1 (specification: LUKS On-Disk Format, version 1.2.3).

    bytes
    0 - 207      header: which cipher, and the digest that a master key is recognised by
    208 - 591    eight key slots of 48 bytes, each the master key under one passphrase

All integers are big endian. Offsets count 512-byte sectors from the header's start.
"""

from __future__ import annotations

from construct import Bytes, Int16ub, Int32ub, Struct

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
SECTOR = 512  # bytes

Header = Struct(
    "magic" / Bytes(6),
    "version" / Int16ub,
    "cipher_name" / Bytes(32),  # names are NUL terminated
    "cipher_mode" / Bytes(32),  # mode-ivgen[:ivhash]
    "hash_spec" / Bytes(32),
    "payload_offset" / Int32ub,  # sectors
    "key_bytes" / Int32ub,  # of the master key
    "master_key_digest" / Bytes(20),
    "master_key_salt" / Bytes(32),
    "master_key_iterations" / Int32ub,
    "uuid" / Bytes(40),
)

KeySlot = Struct(
    "state" / Int32ub,
    "iterations" / Int32ub,
    "salt" / Bytes(32),
    "key_offset" / Int32ub,  # sectors
    "stripes" / Int32ub,
)
KEY_SLOTS = 8
SLOT_ENABLED, SLOT_DISABLED = 0x00AC71F3, 0x0000DEAD
STRIPES = 4000  # the only number that is in use
SIZE = Header.sizeof() + KEY_SLOTS * KeySlot.sizeof()  # bytes: 592
KEY_MATERIAL_ALIGNMENT = 8  # sectors; also where key material may begin

CIPHER_KEY_BYTES = {
    "aes": (16, 24, 32),
    "cast5": (16,),
    "serpent": (16, 24, 32),
    "twofish": (16, 24, 32),
}
CIPHER_MODES = ("ecb", "cbc", "xts", "ctr")
IV_GENERATORS = ("plain", "plain64", "essiv")
HASH_BYTES = {
    "md5": 16,
    "sha1": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "ripemd160": 20,
    "sm3": 32,  # known to QEMU from version 9.2 on
}
