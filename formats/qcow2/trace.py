"""From one guest offset down to the host: the entries on the way, as they are stored."""

from __future__ import annotations

from typing import Any

from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.mapping import Mapping


def trace(mapping: Mapping, offset: int) -> dict[str, Any]:
    """The L1 entry and the L2 entry that lead to guest `offset` (bytes): where they are, and their fields.

    `l2` is missing where the L1 entry names no table that can be read; nothing is judged.
    """
    header, source = mapping.header, mapping.source
    l1_index, l2_index = divmod(offset // header.cluster_size, header.l2_entries)
    found: dict[str, Any] = {"l1-index": l1_index, "l2-index": l2_index}
    if l1_index >= mapping.l1_size:
        return found
    at = mapping.l1_table_offset + l1_index * schema.L1.size
    word = int.from_bytes(source.pread(schema.L1.size, at), "big")
    table = schema.L1["offset"].of(word)
    found["l1"] = {
        "offset": at,
        "entry": word,
        "table": table,
        "copied": bool(schema.L1["copied"].of(word)),
    }
    if table and table % header.cluster_size == 0:
        found["l2"] = _l2_entry(mapping, table + l2_index * mapping.columns.size)
    return found


def _l2_entry(mapping: Mapping, at: int) -> dict[str, Any]:
    data = mapping.source.pread(mapping.columns.size, at)
    word = int.from_bytes(data[:8], "big")
    entry: dict[str, Any] = {"offset": at, "entry": word, "copied": bool(schema.L2["copied"].of(word))}
    if schema.L2["compressed"].of(word):
        columns = schema.compressed(mapping.header.cluster_bits)
        start = columns["host_offset"].of(word)
        stored = (columns["sectors"].of(word) + 1) * 512 - start % 512
        entry |= {"compressed": True, "stream": start, "stored": stored}
    else:
        entry |= {"cluster": schema.L2["offset"].of(word)}
        if mapping.header.extended_l2:
            bitmap = int.from_bytes(data[8:], "big")
            columns = schema.EXTENDED_L2_COLUMNS
            entry |= {name: columns[name].of(bitmap) for name in ("zero_bitmap", "allocated_bitmap")}
        else:
            entry |= {"zero": bool(schema.L2["zero"].of(word))}
    return entry
