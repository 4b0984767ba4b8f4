"""Counting claims on host clusters, without an array as long as the file.

A file may be sparse and apparently huge, so memory goes by what is claimed. Long runs of clusters are kept
as the two ends of each; scattered clusters are counted in pages of `PAGE` clusters, which exist where they are
needed, in the narrowest integers that hold them. Counts are exact: no claim is lost to overflow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PAGE = 1 << 18  # clusters
SHORT_RUN = 64  # clusters; shorter runs are counted one by one
_WIDER = {1: np.uint16, 2: np.uint32, 4: np.uint64}

Clusters = NDArray[np.int64]  # cluster numbers
Weights = int | NDArray[np.int64]  # how often each is claimed


class Counts:
    """How often each host cluster is claimed."""

    def __init__(self) -> None:
        self._pages: dict[int, NDArray[np.unsignedinteger]] = {}
        self._bounds: dict[int, int] = {}  # no count in the page is above
        self._ends: list[tuple[Clusters, NDArray[np.int64]]] = []  # where coverage changes, and by how much
        self._coverage: tuple[Clusters, NDArray[np.int64]] | None = None

    def add_runs(self, first: Clusters, length: Clusters, weight: Weights = 1) -> None:
        """Claim runs of clusters, each `weight` times."""
        if len(first):
            weights = np.broadcast_to(np.asarray(weight, dtype=np.int64), first.shape)
            self._ends.append((np.concatenate((first, first + length)), np.concatenate((weights, -weights))))
            self._coverage = None

    def add(self, clusters: Clusters, weight: Weights = 1) -> None:
        """Claim clusters in any order, some of them perhaps several times."""
        if len(clusters):
            self.add_distinct(*distinct(clusters, weight))

    def add_distinct(self, clusters: Clusters, weights: NDArray[np.int64]) -> None:
        """Claim clusters that are sorted and distinct."""
        breaks = np.flatnonzero(np.diff(clusters) != 1) + 1
        firsts = np.concatenate(([0], breaks))
        if len(clusters) >= SHORT_RUN * len(firsts) and weights[0] == weights.max() == weights.min():
            self.add_runs(clusters[firsts], np.diff(firsts, append=len(clusters)), int(weights[0]))
            return
        heavy = weights > 255
        if heavy.any():
            self.add_runs(clusters[heavy], np.ones(int(heavy.sum()), dtype=np.int64), weights[heavy])
            clusters, weights = clusters[~heavy], weights[~heavy]
        start = 0
        while start < len(clusters):
            edge = (int(clusters[start]) // PAGE + 1) * PAGE
            end = int(np.searchsorted(clusters, edge))
            self._add_to_page(clusters[start:end], weights[start:end])
            start = end

    def _add_to_page(self, clusters: Clusters, weights: NDArray[np.int64]) -> None:
        number = int(clusters[0] // PAGE)
        page = self._pages.get(number)
        if page is None:
            page = np.zeros(PAGE, dtype=np.uint8)
        most = int(weights.max())
        bound = self._bounds.get(number, 0) + most
        if bound > np.iinfo(page.dtype).max:
            bound = int(page.max()) + most
            if bound > np.iinfo(page.dtype).max:
                page = page.astype(_WIDER[page.itemsize])
        page[clusters - number * PAGE] += weights.astype(page.dtype)
        self._pages[number], self._bounds[number] = page, bound

    @property
    def coverage(self) -> tuple[Clusters, NDArray[np.int64]]:
        """Where coverage by runs changes (sorted), and the number of runs from there on."""
        if self._coverage is None:
            if self._ends:
                places = np.concatenate([place for place, _ in self._ends])
                change = np.concatenate([change for _, change in self._ends])
            else:
                places = change = np.zeros(0, dtype=np.int64)
            where, inverse = np.unique(places, return_inverse=True)
            changes = np.zeros(len(where), dtype=np.int64)
            np.add.at(changes, inverse, change)
            where, changes = where[changes != 0], changes[changes != 0]  # most runs follow each other
            self._ends = [(where, changes)]
            self._coverage = (where, np.cumsum(changes))
        return self._coverage

    def pages(self, end: int) -> list[int]:
        """The pages, below cluster `end`, that hold any claim; sorted."""
        where, level = self.coverage
        covered = level[:-1] > 0
        first = where[:-1][covered] // PAGE
        last = (where[1:][covered] - 1) // PAGE
        found = set(self._pages)
        # neighbouring runs share pages: only the pages between their ends are walked
        for start, stop in set(zip(first.tolist(), last.tolist(), strict=True)):
            found.update(range(start, stop + 1))
        return sorted(page for page in found if page * PAGE < end)

    def flat(self, page: int) -> list[tuple[int, int, int]] | None:
        """A page as a few pieces (first, end, count), relative to it; None where it is not so simple."""
        if page in self._pages:
            return None
        where, level = self.coverage
        low, high = np.searchsorted(where, (page * PAGE, (page + 1) * PAGE))
        if high - low > 64:
            return None
        cuts = [0, *(where[low:high] - page * PAGE).tolist(), PAGE]
        levels = [int(level[low - 1]) if low else 0, *level[low:high].tolist()]
        return [piece for piece in zip(cuts[:-1], cuts[1:], levels, strict=True) if piece[0] < piece[1]]

    def window(self, page: int) -> NDArray[np.int64]:
        """The counts of one page."""
        where, level = self.coverage
        low, high = (int(found) for found in np.searchsorted(where, (page * PAGE, (page + 1) * PAGE)))
        cuts = np.concatenate(([0], where[low:high] - page * PAGE, [PAGE]))
        levels = np.concatenate(([level[low - 1] if low else 0], level[low:high]))
        counts = np.repeat(levels, np.diff(cuts))
        if page in self._pages:
            counts += self._pages[page].astype(np.int64)
        return counts

    def at(self, clusters: Clusters) -> NDArray[np.int64]:
        """The counts of some clusters, in any order."""
        where, level = self.coverage
        found = np.concatenate(([0], level))[np.searchsorted(where, clusters, side="right")]
        pages = clusters // PAGE
        for page in np.unique(pages).tolist():
            if page in self._pages:
                mine = pages == page
                found[mine] += self._pages[page][clusters[mine] - page * PAGE].astype(np.int64)
        return found


def distinct(clusters: Clusters, weight: Weights = 1) -> tuple[Clusters, NDArray[np.int64]]:
    """The clusters sorted and each once, with the sum of its weights."""
    if isinstance(weight, int):
        # numbers of 32 bits sort twice as fast
        narrow = clusters.astype(np.uint32) if clusters.max() < 1 << 32 else clusters
        ordered = np.sort(narrow)
        firsts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        sums = np.diff(firsts, append=len(ordered)) * weight
    else:
        order = np.argsort(clusters, kind="stable")
        ordered = clusters[order]
        firsts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        sums = np.add.reduceat(weight[order], firsts)
    return ordered[firsts].astype(np.int64), sums.astype(np.int64)
