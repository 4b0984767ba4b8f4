"""The tree of errors, and the one line that each of them prints."""

import errno
from pathlib import Path

import pytest

import imgloop
from imgloop import (
    CorruptError,
    FormatError,
    GateError,
    ImageError,
    OpenError,
    OutOfRangeError,
    ReadError,
    ReadOnlyError,
    UsageError,
)
from imgloop.formats.errors import Where

TREE: list[tuple[type[ImageError], tuple[type[Exception], ...]]] = [
    (ImageError, (Exception,)),
    (OpenError, (ImageError,)),
    (FormatError, (OpenError, ValueError)),
    (GateError, (OpenError, PermissionError)),
    (CorruptError, (ImageError, OSError)),
    (ReadError, (ImageError, OSError)),
    (OutOfRangeError, (ImageError, ValueError)),
    (ReadOnlyError, (ImageError, OSError)),
    (UsageError, (ImageError, ValueError)),
]
EVERY = pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.__name__) for kind, _ in TREE])


@pytest.mark.parametrize(("kind", "parents"), [pytest.param(*row, id=row[0].__name__) for row in TREE])
def test_tree(kind: type[ImageError], parents: tuple[type[Exception], ...]) -> None:
    assert all(issubclass(kind, parent) for parent in parents)
    assert getattr(imgloop, kind.__name__) is kind


def test_what_cannot_be_opened_is_no_read_error() -> None:
    assert not issubclass(FormatError, OSError)
    assert not issubclass(CorruptError, OpenError)
    assert not issubclass(OpenError, OSError)


@pytest.mark.parametrize(
    ("kind", "number"),
    [(CorruptError, errno.EIO), (ReadError, errno.EIO), (ReadOnlyError, errno.EROFS), (GateError, errno.EACCES)],
)
def test_errno(kind: type[ImageError], number: int) -> None:
    error = kind("text", Where("file"))
    assert isinstance(error, OSError)
    assert error.errno == number


@EVERY
def test_message_and_place_are_kept(kind: type[ImageError]) -> None:
    where = Where("disk.qcow2", 0x18, "size", 99)
    error = kind("Image is too big", where)
    assert (error.message, error.where) == ("Image is too big", where)
    assert str(error) == "Image is too big [size at offset 0x18 of 'disk.qcow2' is 99 (0x63)]"
    assert str(kind("Image is too big")) == "Image is too big"


@EVERY
@pytest.mark.parametrize("separator", ["\n", "\r\n", "\x0b", "\x85", "\u2028", "\r"])
def test_always_one_line(kind: type[ImageError], separator: str) -> None:
    name = f"two{separator}lines"
    for error in (kind(f"Could not open '{name}'"), kind("text", Where(name, 0, name, name))):
        assert len(str(error).splitlines()) == 1
        assert "two" in str(error)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (Where(), ""),
        (Where(file="a b"), "of 'a b'"),
        (Where(offset=0), "at offset 0x0"),
        (Where(field="magic"), "magic"),
        (Where(value=0), "is 0 (0x0)"),
        (Where(value="name"), "is 'name'"),
        (
            Where("f", 4096, "L2 entry 7", 1 << 63),
            "L2 entry 7 at offset 0x1000 of 'f' is 9223372036854775808 (0x8000000000000000)",
        ),
        (Where("f", field="backing file", value="../x"), "backing file of 'f' is '../x'"),
    ],
)
def test_where(where: Where, text: str) -> None:
    assert str(where) == text


@pytest.mark.parametrize("kind", [OpenError, FormatError, GateError])
def test_within(kind: type[OpenError]) -> None:
    where = Where("base", 4)
    outer = kind("version is odd", where).within("Could not open 'top'")
    assert type(outer) is kind
    assert outer.message == "Could not open 'top': version is odd"
    assert outer.where == where


def test_caught_as_what_they_are(tmp_path: Path) -> None:
    image = tmp_path / "x"
    image.write_bytes(b"QFI\xfb" + bytes(508))
    with pytest.raises(ValueError, match="Unsupported qcow2 version 0"):
        imgloop.open(image, "qcow2")
    with pytest.raises(OpenError, match="No such file or directory"):
        imgloop.open(tmp_path / "missing")
    with imgloop.open(image, "raw") as opened, pytest.raises(OSError, match="read-only") as caught:
        opened.layers[0].driver.pwrite(b"x", 0)
    assert caught.value.errno == errno.EROFS
