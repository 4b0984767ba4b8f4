"""Checking an image by its name, whether QEMU would open it or not."""

from __future__ import annotations

import os

from imgloop import names
from imgloop.formats import PROBE_LENGTH, probe
from imgloop.formats.errors import OpenError
from imgloop.formats.source import Source
from imgloop.gate import Gate
from imgloop.image import open_layers
from imgloop.limits import DEFAULT, Limits
from imgloop.report import CheckReport, Link


def check(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    gate: Gate | None = None,
    image_opts: bool = False,
    limits: Limits = DEFAULT,
) -> CheckReport:
    """Check an image with all that it needs; parameters as `imgloop.open`. Close the report when done.

    An image that QEMU refuses to open gives a report as well, with its `refusal`, and with whatever can still be
    read of it checked.
    """
    text = os.fspath(path)
    chain: list[Link] = []
    try:
        for layer in open_layers(text, format, purpose="check", gate=gate, image_opts=image_opts, limits=limits):
            chain.append((layer.driver, layer.node))
        _need_key(chain, text)
    except OpenError as error:
        report = CheckReport(text, chain, error)
        if not chain:
            source = _source(text, format, gate or Gate(), image_opts)
            if source is not None:
                report.diagnose(source)
        return report
    return CheckReport(chain[0][1].shown, chain)


def _source(text: str, format: str | None, gate: Gate, image_opts: bool) -> Source | None:
    """The file of an image that could not be opened, if it is to be taken for qcow2."""
    try:
        node = names.parse_options(text) if image_opts else names.parse(text, format)
        source = gate.open_top(node.filename)
    except OpenError:
        return None
    if node.format == "qcow2" or (node.format is None and probe(source.pread(PROBE_LENGTH, 0)) == "qcow2"):
        return source
    source.close()
    return None


def _need_key(chain: list[Link], text: str) -> None:
    """QEMU checks encrypted images only with their key, though it has no need of it."""
    if getattr(chain[0][0], "encryption", None):
        raise OpenError("Parameter 'encrypt.key-secret' is required for cipher").within(f"Could not open '{text}'")
