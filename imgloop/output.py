"""Guest bytes out to files: complete or not at all, and with holes where the guest has zeros."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from imgloop.formats.errors import ImageError, OpenError, Where
from imgloop.formats.source import Source
from imgloop.image import Image

BUFFER = 1 << 20  # bytes read and written at a time
FICLONERANGE = 0x4020940D  # ioctl: share a range of another file
PUNCH_HOLE = 0x03  # fallocate: punch a hole, keep the size
OFFLOAD = 1 << 26  # bytes copied at a time within the kernel
Progress = Callable[[int], None]  # is told how many bytes more are done


@contextmanager
def existing_file(path: str) -> Iterator[int]:
    """A descriptor to write into a file or device that exists, in place; its errors named as `whole_file`'s."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        reason = f"Could not open '{path}': {os.strerror(error.errno or 0)}"
        raise OpenError(f"Could not open '{path}': {reason}") from error
    try:
        yield fd
    except OSError as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"Could not write '{path}': {os.strerror(error.errno or 0)}", Where(path)) from error
    finally:
        os.close(fd)


@contextmanager
def whole_file(path: str, *, keep: Iterable[Source] = ()) -> Iterator[int]:
    """A descriptor to write a new file through, which appears under its name only when all went well.

    An existing file is replaced then and keeps its mode; a device or a pipe is written directly. None of the
    files of `keep` is ever replaced: one is an ImageError.
    """
    target, temporary = Path(path), None
    try:
        existing = target.stat() if target.exists() else None
        if existing and (existing.st_dev, existing.st_ino) in {source.identity for source in keep}:
            raise ImageError(f"Could not create '{path}': the image that is read needs this file", Where(path))
        if existing and not stat.S_ISREG(existing.st_mode):
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        else:
            if existing and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            target = target.resolve()
            temporary = target.parent / f".imgloop-{secrets.token_hex(8)}"
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            if existing:
                os.fchmod(fd, stat.S_IMODE(existing.st_mode))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ImageError(f"Could not create '{path}': {reason}", Where(path)) from error
    try:
        yield fd
        os.close(fd)
        fd = -1
        if temporary:
            temporary.replace(target)
            temporary = None
    except OSError as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"Could not write '{path}': {os.strerror(error.errno or 0)}", Where(path)) from error
    finally:
        if fd >= 0:
            os.close(fd)
        if temporary:
            temporary.unlink(missing_ok=True)


def copy_range(
    image: Image, start: int, length: int, fd: int, *, progress: Progress = lambda _: None, pad: int = 1
) -> None:
    """Write guest range [start, start + length) (bytes) to `fd`, and zeros up to a multiple of `pad` bytes.

    In an empty regular file zeros become holes; elsewhere (a pipe, a device) every byte is written in order.
    """
    target = os.fstat(fd)
    sparse = stat.S_ISREG(target.st_mode) and not target.st_size and not _appends(fd)
    padded = -(-length // pad) * pad
    position = start
    for piece in _pieces(image, start, length):
        if sparse:
            os.lseek(fd, piece.first - start, os.SEEK_SET)
        else:
            _write_zeros(fd, piece.first - position)
        progress(piece.first - position)
        _copy_piece(image, piece, fd, sparse=sparse, progress=progress)
        position = piece.end
    if sparse:
        os.ftruncate(fd, padded)
    else:
        _write_zeros(fd, start + padded - position)
    progress(start + length - position)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Guest range [first, end), and the host file that holds just these bytes at `offset`, if one does."""

    first: int
    end: int
    source: Source | None
    offset: int


def _pieces(image: Image, start: int, length: int) -> Iterator[_Piece]:
    """What the image does not call zero: each extent of plain data, and runs of all other extents."""
    import numpy as np

    from imgloop.formats.extents import Kind

    for table in image.iter_extents(start, length, holes=True):
        kinds = table["kind"]
        changes = (kinds[1:] != kinds[:-1]) | (kinds[1:] == Kind.DATA)
        firsts = table[np.concatenate(([True], changes))]
        ends = [*firsts["start"][1:].tolist(), int(table["start"][-1] + table["length"][-1])]
        rows = zip(*(firsts[name].tolist() for name in ("start", "kind", "file", "offset")), ends, strict=True)
        for first, kind, file, offset, end in rows:
            if kind == Kind.DATA:
                yield _Piece(first, end, image.files[file], offset)
            elif kind not in (Kind.UNALLOCATED, Kind.ZERO, Kind.HOLE):
                yield _Piece(first, end, None, 0)


def _copy_piece(image: Image, piece: _Piece, fd: int, *, sparse: bool, progress: Progress) -> None:
    """Write one piece at the place where `fd` stands: within the kernel where it can, else through a buffer."""
    position = piece.first
    if piece.source is not None and sparse:
        for count in _offload(piece.source, piece.offset, piece.end - position, fd):
            position += count
            progress(count)
    buffer = memoryview(bytearray(min(BUFFER, piece.end - position)))
    while position < piece.end:
        part = buffer[: piece.end - position]
        image.readinto(part, position)
        _write_all(fd, part)
        progress(len(part))
        position += len(part)


def _offload(source: Source, offset: int, length: int, fd: int) -> Iterator[int]:
    """Copy within the kernel, which may share blocks instead; the bytes done each time. May end early."""
    while length > 0:
        try:
            count = os.copy_file_range(source.fd, fd, min(length, OFFLOAD), offset)
        except OSError:  # not between these two, or not here: the buffer finds out whether reading fails
            return
        if count == 0:  # the end of the source
            return
        yield count
        offset += count
        length -= count


def share(source: Source, offset: int, length: int, fd: int, at: int) -> bool | None:
    """Let `fd` share `length` bytes at `offset` of the source, from its own offset `at` on, copying nothing.

    False where just these cannot be shared (they do not lie on blocks of the file system), None where nothing
    can be.
    """
    request = struct.pack("qQQQ", source.fd, offset, length, at)
    try:
        fcntl.ioctl(fd, FICLONERANGE, request)
    except OSError as error:
        return False if error.errno == errno.EINVAL else None
    return True


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` (bytes)."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make `length` bytes at `offset` zeros: a hole where the file can have one, zeros written otherwise."""
    if _fallocate is not None and not _fallocate(fd, PUNCH_HOLE, offset, length):
        return
    zeros = memoryview(bytes(min(length, BUFFER)))
    for done in range(0, length, BUFFER):
        write_at(fd, zeros[: length - done], offset + done)


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    """The C library's fallocate, for Python's own only reserves space; None where there is none."""
    try:
        function = ctypes.CDLL(None).fallocate
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return cast("Callable[[int, int, int, int], int]", function)


_fallocate = _find_fallocate()


def _appends(fd: int) -> bool:
    """Whether writes go to the file's end wherever one seeks (a shell's `>>`), or it is already under way."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND) or os.lseek(fd, 0, os.SEEK_CUR) != 0


def _write_all(fd: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])


def _write_zeros(fd: int, length: int) -> None:
    zeros = memoryview(bytes(min(length, BUFFER)))
    while length > 0:
        length -= os.write(fd, zeros[:length])
