"""What `qemu-img info` says of an image, as data: the keys and values of its JSON."""

from __future__ import annotations

from typing import Any

from imgloop import names
from imgloop.formats.driver import SECTOR, Driver
from imgloop.formats.qcow2.driver import Qcow2
from imgloop.formats.qcow2.snapshots import Snapshot
from imgloop.formats.source import Source
from imgloop.names import Node

SECOND = 10**9  # nanoseconds


def layer_info(driver: Driver, node: Node) -> dict[str, Any]:
    """One layer, opened as `node`: QEMU's `ImageInfo`, with the keys that it leaves out left out."""
    info: dict[str, Any] = {
        "children": [{"name": "file", "info": file_info(driver.source)}],
        "virtual-size": driver.size,
        "filename": node.shown,
        "format": driver.format,
        "actual-size": driver.source.allocated,
        "dirty-flag": False,
    }
    if isinstance(driver, Qcow2):
        info["cluster-size"] = driver.cluster_size
        info["dirty-flag"] = driver.dirty
        info["format-specific"] = {"type": driver.format, "data": driver.info()}
        if driver.encryption:
            info["encrypted"] = True
        if driver.snapshots and not driver.header.has_data_file:
            info["snapshots"] = [snapshot_info(snapshot) for snapshot in driver.snapshots]
    if driver.backing:
        info["backing-filename"] = driver.backing.name
        if driver.backing.format:
            info["backing-filename-format"] = driver.backing.format
        info["full-backing-filename"] = names.full_backing_name(driver.backing.name, node)
    return info


def file_info(source: Source) -> dict[str, Any]:
    """The file below a format: QEMU's `file` node."""
    return {
        "children": [],
        "virtual-size": -(-source.size // SECTOR) * SECTOR,
        "filename": source.name,
        "format": "file",
        "actual-size": source.allocated,
        "format-specific": {"type": "file", "data": {}},
        "dirty-flag": False,
    }


def snapshot_info(snapshot: Snapshot) -> dict[str, Any]:
    """One internal snapshot: QEMU's `SnapshotInfo`; sizes in bytes."""
    info: dict[str, Any] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // SECOND,
        "vm-clock-nsec": snapshot.vm_clock_nsec % SECOND,
    }
    if snapshot.icount is not None:
        info["icount"] = snapshot.icount
    return info
