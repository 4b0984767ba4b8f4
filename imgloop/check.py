"""Checking an image: what qemu-img says of it, what it passes as clean, and who is concerned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from imgloop.formats.driver import Driver
from imgloop.formats.errors import OpenError
from imgloop.formats.findings import Event
from imgloop.formats.qcow2.driver import Qcow2
from imgloop.gate import Gate
from imgloop.image import Layer, open_layers

if TYPE_CHECKING:
    from imgloop.formats.qcow2.check import Check

UNSUPPORTED = "This image format does not support checks"
KEYS = (
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "corruptions",
    "leaks",
    "check-errors",
)


class CheckReport:
    """What a check found. The image's files must stay open while findings are read; `close` closes them.

    `refusal` is why QEMU does not open the image at all (None: it does), `failure` why its check ends early.
    """

    def __init__(self, name: str, layers: list[Layer], refusal: OpenError | None = None) -> None:
        self.filename = name
        self.layers = layers
        self.refusal = refusal
        self._check: Check | None = None
        if layers and isinstance(layers[0].driver, Qcow2):
            self._check = _check(layers[0].driver)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of the chain."""
        for layer in self.layers:
            layer.driver.close()

    @property
    def format(self) -> str | None:
        """The image's format; None where it could not be opened."""
        return self.layers[0].driver.format if self.layers else None

    @property
    def failure(self) -> str | None:
        """Why QEMU's check ends without a verdict; None where it does not."""
        return self._check.failure if self._check else None

    @property
    def exit_code(self) -> int:
        """The exit code of `qemu-img check`."""
        if self.refusal is not None:
            return 1
        if self._check is None:
            return 63
        if self._check.failure is not None or self._check.errors:
            return 1
        if self._check.corruptions:
            return 2
        return 3 if self._check.leaks else 0

    def totals(self) -> dict[str, int]:
        """qemu-img's numbers, under the keys of its JSON (`KEYS`), 0 where it leaves one out."""
        return self._check.totals() if self._check else dict.fromkeys(KEYS, 0)

    def events(self) -> Iterator[Event]:
        """What qemu-img says on stderr, in its order."""
        return self._check.events() if self._check else iter(())

    def to_json(self) -> dict[str, Any]:
        """qemu-img's JSON: totals of 0 are left out, but for check-errors."""
        totals = {key: value for key, value in self.totals().items() if value or key == "check-errors"}
        return {**totals, "filename": self.filename, "format": self.format}


def _check(driver: Qcow2) -> Check:
    from imgloop.formats.qcow2.check import Check

    return Check(driver.source, driver.header, driver.extensions, driver.bitmaps)


def check(
    path: str | os.PathLike[str], format: str | None = None, *, gate: Gate | None = None, image_opts: bool = False
) -> CheckReport:
    """Check an image with all that it needs; parameters as `imgloop.open`. Close the report when done."""
    text = os.fspath(path)
    layers: list[Layer] = []
    try:
        for layer in open_layers(text, format, purpose="check", gate=gate, image_opts=image_opts):
            layers.append(layer)
        _need_keys(layers[0].driver, text)
    except OpenError as error:
        return CheckReport(text, layers, error)
    return CheckReport(layers[0].node.shown, layers)


def _need_keys(driver: Driver, text: str) -> None:
    """QEMU checks encrypted images only with their key."""
    if isinstance(driver, Qcow2) and driver.encryption:
        raise OpenError("Parameter 'encrypt.key-secret' is required for cipher").within(f"Could not open '{text}'")
