"""What imgloop is prepared to spend on one image, however large the image says that it is.

Limits that belong to a format (table sizes, name lengths) stand with the format; these hold for all of them.
Reading an image keeps, at most:

    table_cache + cluster_cache                                 the two caches below
    + 16 bytes per L1 entry of each layer                       at most 64 MiB a layer
    + about 60 MiB                                              one batch of 2^18 L2 entries, while it is read
    + the bytes that were asked for
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds for one open image; sizes in bytes."""

    chain_depth: int = 200  # layers of a backing chain
    table_cache: int = 48 * MIB  # extents of recently read parts of the guest
    cluster_cache: int = 64 * MIB  # decoded compressed clusters


DEFAULT = Limits()
