"""The LUKS header of a qcow2 image: what `info` says of a sound one, and QEMU's words for a damaged one."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import imgloop
from imgloop.cli import run
from imgloop.formats.luks import schema
from imgloop.formats.luks.header import info, problems, read_header
from imgloop.formats.qcow2 import schema as qcow2
from imgloop.formats.source import Source
from imgloop.formats.structures import offset_of
from imgloop.image import open_layers
from tests.recorded import FIXTURES, load

POINTER = 0x70 + 8  # the data of the encryption extension in luks.qcow2
HEADER = 0x40000  # where it points to
LENGTH = 0x101000

pytestmark = pytest.mark.datafiles(FIXTURES / "luks.qcow2.gz")
Damage = tuple[int, bytes]


def at(field: str, value: bytes) -> Damage:
    return HEADER + offset_of(schema.Header, field), value


def name(field: str, text: bytes) -> Damage:
    return at(field, text.ljust(32, b"\0"))


def number(field: str, value: int) -> Damage:
    return at(field, struct.pack(">I", value))


def slot(index: int, field: str, value: int) -> Damage:
    base = HEADER + schema.Header.sizeof() + index * schema.KeySlot.sizeof()
    return base + offset_of(schema.KeySlot, field), struct.pack(">I", value)


def pointer(offset: int = HEADER, length: int = LENGTH) -> Damage:
    return POINTER, qcow2.EncryptionPointer.build({"offset": offset, "length": length})


# What QEMU says of each, tried with versions 7.2 and 10.
REFUSED: dict[str, tuple[list[Damage], str]] = {
    "short": ([pointer(length=591)], "Request for data outside of extension header"),
    "unaligned": (
        [pointer(0x10200)],
        "Encryption header offset '66048' is not a multiple of cluster size '65536'",
    ),
    "beyond the file": ([pointer(1 << 40)], "Volume is not in LUKS format"),
    "beyond all files": ([pointer(1 << 63)], "Could not read encryption header: Input/output error"),
    "aes": ([(32, b"\0\0\0\1")], "CRYPTO header extension only expected with LUKS encryption method"),
    "magic": ([at("magic", b"X")], "Volume is not in LUKS format"),
    "version": ([at("version", b"\0\2")], "LUKS version 2 is not supported"),
    "cipher name": ([at("cipher_name", b"a" * 32)], "LUKS header cipher name is not NUL terminated"),
    "cipher mode": ([at("cipher_mode", b"a" * 32)], "LUKS header cipher mode is not NUL terminated"),
    "hash spec": ([at("hash_spec", b"a" * 32)], "LUKS header hash spec is not NUL terminated"),
    "payload": ([number("payload_offset", 7)], "LUKS payload is overlapping with the header"),
    "iterations": ([number("master_key_iterations", 0)], "LUKS key iteration count is zero"),
    "stripes": ([slot(3, "stripes", 5)], "Keyslot 3 is corrupted (stripes 5 != 4000)"),
    "negative stripes": ([slot(3, "stripes", 0xFFFFFFF0)], "Keyslot 3 is corrupted (stripes -16 != 4000)"),
    "state": ([slot(2, "state", 1)], "Keyslot 2 state (active/disable) is corrupted"),
    "slot iterations": ([slot(0, "iterations", 0)], "Keyslot 0 iteration count is zero"),
    "slot in header": ([slot(0, "key_offset", 7)], "Keyslot 0 is overlapping with the LUKS header"),
    "slot in payload": ([slot(7, "key_offset", 4000)], "Keyslot 7 is overlapping with the encrypted payload"),
    "slots": ([slot(5, "key_offset", 8)], "Keyslots 0 and 5 are overlapping in the header"),
    "slots before algorithms": (
        [number("key_bytes", 64), name("cipher_name", b"foo")],
        "Keyslots 0 and 1 are overlapping in the header",
    ),
    "no IV generator": ([name("cipher_mode", b"xts")], "Unexpected cipher mode string format 'xts'"),
    "mode": ([name("cipher_mode", b"abc-plain64")], "Cipher mode 'abc' not supported"),
    "IV generator": ([name("cipher_mode", b"xts-plain32")], "IV generator 'plain32' not supported"),
    "IV hash": ([name("cipher_mode", b"bad-plain64:foo")], "Hash algorithm 'foo' not supported"),
    "no IV hash": ([name("cipher_mode", b"cbc-essiv")], "Missing IV generator hash specification"),
    "IV hash length": ([name("cipher_mode", b"xts-essiv:sha1")], "No AES cipher with key size 20 available"),
    "IV cipher": (
        [name("cipher_name", b"cast5"), name("cipher_mode", b"xts-essiv:sha256")],
        "Cipher cast5-128 not supported with essiv",
    ),
    "cipher": ([name("cipher_name", b"foo")], "Algorithm 'foo' with key size 16 bytes not supported"),
    "key size": ([number("key_bytes", 1 << 30)], "Algorithm 'aes' with key size 536870912 bytes not supported"),
    "negative key size": (
        [number("key_bytes", 1 << 31), name("cipher_mode", b"cbc-plain")],
        "Algorithm 'aes' with key size -2147483648 bytes not supported",
    ),
    "hash": ([name("hash_spec", b"foo")], "Hash algorithm 'foo' not supported"),
}
# Odd, but QEMU takes them.
ACCEPTED: dict[str, list[Damage]] = {
    "just long enough": [pointer(length=592)],
    "sizes wrap at 32 bits": [slot(7, "key_offset", 0xFFFFFF80)],
    "disabled slot without iterations": [slot(1, "iterations", 0)],
    "IV hash that is not needed": [name("cipher_mode", b"xts-plain64:sha1")],
    "essiv": [name("cipher_name", b"twofish"), name("cipher_mode", b"xts-essiv:sha256")],
    "essiv of another key size": [name("cipher_mode", b"ctr-essiv:sha256"), number("key_bytes", 16)],
    "uuid without an end": [at("uuid", b"z" * 40)],
}


@pytest.fixture
def image(fixture_dir: Path) -> Path:
    return fixture_dir / "luks.qcow2"


@pytest.fixture
def damaged(image: Path) -> Callable[[list[Damage]], Path]:
    def damage(patches: list[Damage]) -> Path:
        with image.open("r+b") as file:
            for offset, data in patches:
                file.seek(offset)
                file.write(data)
        return image

    return damage


def message_of(image: Path) -> str:
    with pytest.raises(imgloop.FormatError) as caught:
        next(open_layers(image, purpose="info"))
    return caught.value.message.removeprefix(f"Could not open '{image}': ")


def encrypt_of(image: Path) -> object:
    layer = next(open_layers(image, purpose="info"))
    try:
        return layer.driver.info()["encrypt"]
    finally:
        layer.driver.close()


def test_info_is_what_qemu_recorded(image: Path) -> None:
    assert encrypt_of(image) == load("luks.qcow2").said["info"]["format-specific"]["data"]["encrypt"]


def test_human_form_keeps_qemus_order(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(image)]) == 0
    shown = capsys.readouterr().out
    start = shown.index("    encrypt:")
    first = shown[start : shown.index("[1]:")].splitlines()
    assert first == [
        "    encrypt:",
        "        ivgen alg: plain64",
        "        detached header: false",
        "        hash alg: sha256",
        "        cipher alg: aes-128",
        "        uuid: 4a166f07-c971-4a37-8655-d1b330995e64",
        "        format: luks",
        "        cipher mode: xts",
        "        slots:",
        "            [0]:",
        "                active: true",
        "                iters: 65405",
        "                key offset: 4096",
        "                stripes: 4000",
        "            ",
    ]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_qemus_words(case: str, damaged: Callable[[list[Damage]], Path]) -> None:
    patches, message = REFUSED[case]
    assert message_of(damaged(patches)) == message


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_as_qemu_does(case: str, damaged: Callable[[list[Damage]], Path]) -> None:
    encrypt_of(damaged(ACCEPTED[case]))


def test_essiv_names_its_hash(damaged: Callable[[list[Damage]], Path]) -> None:
    found = encrypt_of(damaged([name("cipher_name", b"twofish"), name("cipher_mode", b"xts-essiv:sha256")]))
    assert isinstance(found, dict)
    assert (found["ivgen-alg"], found["ivgen-hash-alg"], found["cipher-alg"]) == ("essiv", "sha256", "twofish-128")
    assert list(found).index("ivgen-hash-alg") == list(found).index("uuid") + 1


def test_an_error_says_where(damaged: Callable[[list[Damage]], Path]) -> None:
    with pytest.raises(imgloop.FormatError) as caught:
        next(open_layers(damaged([slot(3, "stripes", 5)]), purpose="info"))
    where = caught.value.where
    assert (where.offset, where.field, where.value) == (slot(3, "stripes", 5)[0], "LUKS key slot 3 stripes", 5)


def test_all_problems_come_in_order(damaged: Callable[[list[Damage]], Path]) -> None:
    path = damaged([name("hash_spec", b"foo"), slot(2, "state", 1), at("magic", b"X")])
    source = Source(os.open(path, os.O_RDONLY), str(path))
    try:
        found = [problem.message for problem in problems(source, HEADER, LENGTH)]
        assert info(read_header(source, HEADER, LENGTH))["hash-alg"] == "foo"
    finally:
        source.close()
    assert found == [
        "Volume is not in LUKS format",
        "Keyslot 2 state (active/disable) is corrupted",
        "Hash algorithm 'foo' not supported",
    ]


def test_imported_only_when_it_is_met(image: Path) -> None:
    program = (
        "import sys, imgloop.cli;"
        "imgloop.cli.run(['info', sys.argv[1]]);"
        "sys.exit('imgloop.formats.luks.header' in sys.modules)"
    )
    for path, loaded in ((image, 1), (FIXTURES / "blank.qcow2", 0)):
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, check=False)
        assert done.returncode == loaded


@pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="QEMU-IMG IS MISSING: damaged headers are not compared with it"
)
@pytest.mark.parametrize("case", [*REFUSED, *ACCEPTED])
def test_live_qemu_says_the_same(case: str, damaged: Callable[[list[Damage]], Path]) -> None:
    image = damaged(ACCEPTED.get(case) or REFUSED[case][0])
    command = ["qemu-img", "info", "--output=json", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if case in REFUSED:
        assert done.stderr == f"qemu-img: Could not open '{image}': {REFUSED[case][1]}\n"
    else:
        encrypt = json.loads(done.stdout)["format-specific"]["data"]["encrypt"]
        assert {"detached-header": False, **encrypt} == encrypt_of(image)
