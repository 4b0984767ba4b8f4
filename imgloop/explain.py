"""Explaining one place of an image: who claims a host offset, and where a guest offset leads."""

from __future__ import annotations

from typing import Any

from imgloop.formats.driver import Driver
from imgloop.formats.errors import OutOfRangeError, UsageError, Where
from imgloop.image import Image
from imgloop.report import CheckReport


def explain_host(report: CheckReport, offset: int) -> dict[str, Any]:
    """Everything that claims the host cluster with `offset` (bytes), as plain data.

    `refcount` is what the image says, `claims` how many claims there are, `owners` who makes them: `holds` says
    of each whether the byte itself is in what it claims. Raises UsageError for formats without claims.
    """
    check = report.inspected
    if check is None:
        raise UsageError("Only qcow2 images say who claims which host cluster", Where(report.filename))
    from imgloop.formats.qcow2.owners import Owners

    numbers = _clusters(offset // check.header.cluster_size)
    cluster = int(numbers[0])
    owners = Owners(check).of(numbers)[cluster]
    return {
        "filename": report.filename,
        "host": offset,
        "cluster": cluster,
        "cluster-size": check.header.cluster_size,
        "in-file": offset < check.source.size,
        "refcount": int(check.stored.at(numbers)[0]),
        "claims": int(check.total.at(numbers)[0]),
        "owners": [
            owner.to_json() | {"holds": owner.host[0] <= offset < owner.host[0] + owner.host[1]}
            for owner in owners
        ],
    }


def _clusters(number: int) -> Any:
    import numpy as np

    return np.array([number], dtype=np.int64)


def explain_guest(image: Image, offset: int) -> dict[str, Any]:
    """The path from guest `offset` (bytes) to a byte of a file, as plain data.

    `layers` are the layers that were asked, from the top down, each with the entries on the way and with what
    it answered; the last one is where the path ends. Raises OutOfRangeError past the end of the image.
    """
    if not 0 <= offset < image.size:
        raise OutOfRangeError(
            f"Guest offset {offset} is outside of the image, which has {image.size} bytes", Where(image.name)
        )
    layers: list[dict[str, Any]] = []
    for depth, layer in enumerate(image.layers):
        driver = layer.driver
        found: dict[str, Any] = {"depth": depth, "filename": layer.node.shown, "format": driver.format}
        layers.append(found)
        if offset >= driver.size:
            found["answer"] = "zero"
            found["reason"] = "past the end of this layer"
            break
        found |= _answer(driver, offset)
        if found["answer"] != "unallocated":
            break
    return {"filename": image.name, "guest": offset, "answer": _final(layers[-1]), "layers": layers}


def _final(last: dict[str, Any]) -> str:
    return "zero" if last["answer"] == "unallocated" else str(last["answer"])


def _answer(driver: Driver, offset: int) -> dict[str, Any]:
    """What one layer says of a guest offset."""
    from imgloop.formats.extents import Kind
    from imgloop.formats.qcow2.driver import Qcow2

    found: dict[str, Any] = {}
    if isinstance(driver, Qcow2):
        from imgloop.formats.qcow2.trace import trace

        found["path"] = trace(driver.mapping, offset)
    extent = driver.extents(offset, 1)[0]
    kind = Kind(int(extent["kind"]))
    found["answer"] = kind.name.lower()
    if kind is Kind.INVALID:
        found["reason"] = driver.explain_invalid(offset).message
    elif extent["offset"] >= 0:
        found["file"] = driver.files[int(extent["file"])].name
        found["host"] = int(extent["offset"])
        if kind is Kind.COMPRESSED:
            found["stored"] = int(extent["stored"])
            found["within"] = offset % (driver.cluster_size or 1)  # of the decoded cluster
    return found
