"""Rows of text made by numpy are those that Python's own formatting makes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from imgloop.cli.rows import render

TEMPLATES = [b"<%>\n", b"[% %]\n", b"(%, %, %)\n"]
number = st.one_of(st.integers(0, 3), st.integers(0, 20_000), st.integers(0, (1 << 63) - 1), st.just(-1))


@given(st.lists(st.tuples(st.integers(0, 2), number, number, number), max_size=40))
def test_render(rows: list[tuple[int, int, int, int]]) -> None:
    # only a field that a row shows has to be a number not below 0
    which = [row[0] for row in rows]
    values = [[max(v, 0) if n <= row[0] else v for n, v in enumerate(row[1:])] for row in rows]
    expected = b"".join(
        TEMPLATES[one].replace(b"%", b"{}").decode().format(*row).encode()
        for one, row in zip(which, values, strict=True)
    )
    columns = [np.array([row[n] for row in values], dtype=np.int64) for n in range(3)]
    assert render(TEMPLATES, np.array(which, dtype=np.intp), columns) == expected
