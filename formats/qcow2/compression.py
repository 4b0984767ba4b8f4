"""Compressed clusters: raw deflate or zstd streams, decoded as QEMU decodes them.

A stream stands for exactly one cluster. One that gives more is cut off there; one that gives less, or that is
damaged before the cluster is full, is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class DecodeError(Exception):
    """A compressed stream is damaged, or too short for its cluster."""


def inflate_with(library: Any) -> Callable[[bytes, int], bytes]:
    """A decoder of raw deflate streams by `library`, which is zlib or has its interface."""

    def inflate(stream: bytes, size: int) -> bytes:
        # QEMU writes with a window of 4 KiB, yet reads with all of the cluster in view; decoding with
        # window bits of -12 would refuse streams of other writers that QEMU accepts.
        try:
            data: bytes = library.decompressobj(wbits=-15).decompress(stream, size)
        except library.error as error:
            raise DecodeError(f"deflate stream damaged: {error}") from error
        if len(data) < size:
            raise DecodeError(f"deflate stream gives {len(data)} bytes where a cluster has {size}")
        return data

    return inflate


def zstd_decoder() -> Callable[[bytes, int], bytes]:
    """A decoder of zstd frames, one or several, that fill a cluster together."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    def decode(stream: bytes, size: int) -> bytes:
        data = b""
        while len(data) < size:
            decoder = zstd.ZstdDecompressor()
            try:
                data += decoder.decompress(stream, size - len(data))
                if len(data) == size and not decoder.eof:
                    # only the end of the frame may be missing, nothing more
                    data += decoder.decompress(b"", 1)
            except zstd.ZstdError as error:
                raise DecodeError(f"zstd frame damaged: {error}") from error
            if not decoder.eof:
                raise DecodeError(f"zstd frame not complete after {len(data)} of {size} bytes")
            stream = decoder.unused_data
        return data

    return decode


def decoder(compression_type: int) -> Callable[[bytes, int], bytes]:
    """The decoder for a header's compression type: takes the stream and the cluster size (bytes)."""
    if compression_type:
        return zstd_decoder()
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        return inflate_with(zlib)
    return inflate_with(isal_zlib)
