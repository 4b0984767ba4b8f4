"""Rows of text for tables of millions of lines, put together by numpy instead of once a line."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

PAD = b"\0"  # fills what a row does not need, and is taken out in the end: no output holds it
CHUNK = 10_000  # four digits, four bytes: one 32-bit word at a time


def render(templates: list[bytes], chosen: NDArray[np.intp], columns: list[NDArray[np.int64]]) -> bytearray:
    """One row of ASCII text for each number in `chosen`: that template, its fields filled from `columns`.

    The n-th `%` of a template takes the row's value of the n-th column, a number not below 0. Templates
    with fewer fields leave the last columns out.
    """
    if not len(chosen):
        return bytearray()
    constant = [bool((column == column[0]).all()) for column in columns]
    texts = [_fold(template, columns, constant) for template in templates]
    columns = [column for column, same in zip(columns, constant, strict=True) if not same]
    digits = [_digits(column) for column in columns]
    # every piece of text and every number starts at a word
    room = [max(-(-len(text[n]) // 4) for text in texts if n < len(text)) for n in range(len(columns) + 1)]
    base = []
    for text in texts:
        row = b"".join(
            (text[n] if n < len(text) else b"").ljust(size * 4, PAD) + PAD * (len(words) * 4)
            for n, (size, words) in enumerate(zip(room, [*digits, []], strict=True))
        )
        base.append(np.frombuffer(row, dtype=np.uint32))
    buffer = bytearray(len(chosen) * len(base[0]) * 4)
    rows = np.frombuffer(buffer, dtype=np.uint32).reshape(len(chosen), -1)
    np.take(np.stack(base), chosen, axis=0, out=rows, mode="clip")
    fields = np.array([len(text) - 1 for text in texts])
    place = 0
    for n, (size, words) in enumerate(zip(room, digits, strict=False)):
        place += size
        without = fields <= n
        absent = without[chosen] if without.any() else None
        for word in words:
            if absent is not None:
                word[absent] = 0
            rows[:, place] = word
            place += 1
    return buffer.translate(None, PAD)


def _fold(template: bytes, columns: list[NDArray[np.int64]], constant: list[bool]) -> list[bytes]:
    """A template's pieces of text between its fields; a column of one value becomes text."""
    first, *rest = template.split(b"%")
    pieces = [first]
    for piece, column, same in zip(rest, columns, constant, strict=False):
        if same:
            pieces[-1] += str(int(column[0])).encode() + piece
        else:
            pieces.append(piece)
    return pieces


def _digits(values: NDArray[np.int64]) -> list[NDArray[np.uint32]]:
    """The decimal digits of each value, four to a word, the highest word first, PAD in front."""
    words: list[NDArray[np.uint32]] = []
    largest = int(values.max(initial=0))
    while True:
        rest = values // CHUNK
        index = values - rest * CHUNK
        if largest < CHUNK or int(rest.min()) <= 0:
            # the leading chunk has no zeros in front; chunks before that are empty, but for the last of a 0
            index[rest == 0] += CHUNK * (1 if words else 2)
        words.append(_chunks()[index])
        values, largest = rest, largest // CHUNK
        if not largest:
            return words[::-1]


@cache
def _chunks() -> NDArray[np.uint32]:
    """Four bytes for each number below CHUNK: with zeros in front; with PAD, 0 as nothing; with PAD, 0 as "0"."""
    full = "".join(f"{number:04}" for number in range(CHUNK))
    bare = "".join(f"{number or '':>4}" for number in range(CHUNK))
    last = "".join(f"{number:>4}" for number in range(CHUNK))
    return np.frombuffer((full + bare + last).encode().replace(b" ", PAD), dtype=np.uint32)
