"""Counting claims: exact, whatever the order, the weights and the widths."""

from __future__ import annotations

import numpy as np
import pytest

from imgloop.formats.qcow2.counts import PAGE, Counts, distinct
from imgloop.formats.qcow2.refcounts import decode_refcounts
from imgloop.formats.qcow2.stored import decode


def test_distinct_sums_weights() -> None:
    clusters = np.array([5, 3, 5, 1 << 40])
    found, times = distinct(clusters, 2)
    assert (found.tolist(), times.tolist()) == ([3, 5, 1 << 40], [2, 4, 2])
    found, times = distinct(clusters, np.array([1, 10, 100, 1000]))
    assert (found.tolist(), times.tolist()) == ([3, 5, 1 << 40], [10, 101, 1000])


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_a_plain_sum(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = 3 * PAGE
    expected, counts = np.zeros(size, dtype=np.int64), Counts()
    for _ in range(20):
        if random.random() < 0.5:
            clusters = random.integers(0, size, 3000)
            weight = int(random.integers(1, 400))
            np.add.at(expected, clusters, weight)
            counts.add(clusters, weight)
        else:
            first = random.integers(0, size - PAGE, 5)
            length = random.integers(1, PAGE, 5)
            for start, run in zip(first.tolist(), length.tolist(), strict=True):
                expected[start : start + run] += 3
            counts.add_runs(first, length, 3)
    assert counts.pages(size) == [0, 1, 2]
    assert np.array_equal(np.concatenate([counts.window(page) for page in range(3)]), expected)
    some = random.integers(0, size, 1000)
    assert np.array_equal(counts.at(some), expected[some])


def test_a_page_widens_before_it_overflows() -> None:
    counts = Counts()
    for _ in range(70_000):
        counts.add_distinct(np.array([7, 9]), np.array([1, 1]))
    counts.add(np.array([7]), 1 << 40)
    assert counts.at(np.array([7, 8, 9])).tolist() == [70_000 + (1 << 40), 0, 70_000]


def test_a_page_of_few_runs_is_told_in_pieces() -> None:
    counts = Counts()
    counts.add_runs(np.array([10, 20]), np.array([10, 5]), 1)
    assert counts.flat(0) == [(0, 10, 0), (10, 25, 1), (25, PAGE, 0)]
    counts.add(np.array([3]))
    assert counts.flat(0) is None


def test_memory_goes_by_what_is_claimed() -> None:
    counts = Counts()
    counts.add(np.array([0, 1 << 31, 1 << 50]))
    assert counts.pages(1 << 51) == [0, (1 << 31) // PAGE, (1 << 50) // PAGE]


@pytest.mark.parametrize("order", range(7))
def test_refcounts_decode_as_the_schema_says(order: int) -> None:
    random = np.random.default_rng(order)
    for limit in (2, 200, 256):
        data = random.integers(0, limit, 4096, dtype=np.uint8).tobytes()
        assert np.array_equal(decode(memoryview(data), order), decode_refcounts(data, order))
    small = np.zeros(512, dtype=np.uint8)
    small[7::8] = 3
    assert decode(memoryview(small.tobytes()), order).dtype == np.uint8
