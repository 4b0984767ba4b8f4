"""Sizes as people write them and as QEMU prints them."""

from __future__ import annotations

import re
from math import frexp

_UNITS = {"": 1, "b": 1, "s": 512} | {unit: 1 << 10 * (n + 1) for n, unit in enumerate("kmgtpe")}
_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+(?:\.[0-9]+)?)(?:([bs])|([kmgtpe])(?:i?b)?)?", re.IGNORECASE)
MAX_SIZE = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Bytes: a number with k, M, G, T, P or E (1024 and on), or s for sectors of 512; "1.5G" and "0x200" too.

    Raises ValueError for anything else, and OverflowError beyond 2^63-1.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"invalid size '{text}'")
    number, unit = found[1], _UNITS[(found[2] or found[3] or "").lower()]
    if number.lower().startswith("0x"):
        size = int(number, 16) * unit
    elif "." in number and not found[3]:
        raise ValueError(f"'{text}' is not a whole number of bytes")
    elif "." in number:
        whole, fraction = number.split(".")
        size = int(whole) * unit + int(fraction) * unit // 10 ** len(fraction)
    else:
        size = int(number) * unit
    if size > MAX_SIZE:
        raise OverflowError(f"size '{text}' is beyond {MAX_SIZE}")
    return size


def size_text(size: int) -> str:
    """Bytes for people, in three significant digits, as QEMU prints them: "1.5 KiB"."""
    # the unit changes at 1000 of the smaller one, not at 1024
    step = (frexp(size * 1024 / 1000)[1] - 1) // 10
    if step <= 0:
        return f"{size:.3g} B"
    return f"{size / (1 << 10 * step):.3g} {'KMGTPE'[step - 1]}iB"
