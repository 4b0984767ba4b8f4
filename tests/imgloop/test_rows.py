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
    rows = [(which, *(max(v, 0) if n <= which else v for n, v in enumerate(values))) for which, *values in rows]
    expected = "".join(
        TEMPLATES[which].decode().replace("%", "{}").format(*values[: which + 1]) for which, *values in rows
    )
    columns = [np.array([row[n] for row in rows], dtype=np.int64) for n in (1, 2, 3)]
    assert render(TEMPLATES, np.array([row[0] for row in rows], dtype=np.intp), columns) == expected
