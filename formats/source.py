"""Bytes in: a host file, read as QEMU's file protocol layer reads it.

A read past the end of the file gives zeros, never an error: short metadata and data are the business of
whoever asked. What the operating system itself refuses is a `ReadError` with file and offset, and so is a
read beyond `MAX_LENGTH`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from imgloop.formats.errors import ReadError, Where

MAX_OFFSET = (1 << 63) - 1  # off_t
# Where QEMU's block layer ends (its largest alignment below off_t's limit): reading beyond is an I/O error.
MAX_LENGTH = MAX_OFFSET >> 30 << 30


class Source:
    """A host file, or a block device, open for reading.

    `name` is what people call it (as given, or as the image named it) and stands in every message.
    The descriptor belongs to the source and is closed with it.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    def __repr__(self) -> str:
        return f"Source({self.name!r})"

    @property
    def size(self) -> int:
        """Length of the file now (bytes); of a block device, its capacity."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    @property
    def allocated(self) -> int:
        """What the file occupies on its file system (bytes)."""
        return os.fstat(self.fd).st_blocks * 512

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: the same for two names of one file."""
        found = os.fstat(self.fd)
        if stat.S_ISBLK(found.st_mode):
            return (-1, found.st_rdev)
        return (found.st_dev, found.st_ino)

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes at `offset`, zeros past the end of the file."""
        self._check_reach(offset, length)
        try:
            data = os.pread(self.fd, length, offset)
            if len(data) == length:
                return data
        except OSError as error:
            raise self._failed(error, offset, length) from error
        buffer = bytearray(length)
        buffer[: len(data)] = data
        self._fill(memoryview(buffer), len(data), offset)
        return bytes(buffer)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`, zeros past the end of the file."""
        self._check_reach(offset, len(buffer))
        self._fill(buffer, 0, offset)

    def _fill(self, buffer: memoryview, done: int, offset: int) -> None:
        """Read on from `done` until the buffer is full or the file ends; zero the rest."""
        length = len(buffer)
        try:
            while done < length:
                count = os.preadv(self.fd, [buffer[done:]], offset + done)
                if count == 0:
                    buffer[done:] = bytes(length - done)
                    return
                done += count
        except OSError as error:
            raise self._failed(error, offset, length) from error

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges (start, end; bytes) of [start, end) that the file system holds data for, in order.

        Between them are holes, which read as zeros. A file system that cannot tell calls all of it data.
        """
        end = min(end, self.size)
        while start < end:
            try:
                first = os.lseek(self.fd, start, os.SEEK_DATA)
                hole = os.lseek(self.fd, first, os.SEEK_HOLE) if first < end else end
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end of the file
                    return
                first, hole = start, end  # no such call here (EINVAL), or it failed: then it is data
            if first >= end:
                return
            yield first, min(hole, end)
            start = hole

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _check_reach(self, offset: int, length: int) -> None:
        if offset + length > MAX_LENGTH:
            raise self._failed(OSError(errno.EIO, ""), offset, length)

    def _failed(self, error: OSError, offset: int, length: int) -> ReadError:
        reason = os.strerror(error.errno or errno.EIO)
        return ReadError(f"Could not read {length} bytes: {reason}", Where(self.name, offset))
