"""`imgloop explain`: one place of an image, from both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

import imgloop
from imgloop.cli.options import Size, file_argument, image_options, output_option, print_json, warn
from imgloop.formats.errors import UsageError
from imgloop.gate import Gate


@click.command()
@image_options
@output_option
@click.option("--host", type=Size("host offset"), help="An offset in the image file: who claims it?")
@click.option("--guest", type=Size("guest offset"), help="An offset that the guest sees: where does it lead?")
@click.option("-l", "--snapshot", metavar="SNAPSHOT", help="With --guest: as of a snapshot, by id or name.")
@file_argument
@click.pass_obj
def explain(
    gate: Gate,
    file: str,
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output: str,
    host: int | None,
    guest: int | None,
    snapshot: str | None,
) -> None:
    """Explain one place of FILE.

    With --host, everything that claims that cluster of the file: tables, entries, snapshots, bitmaps. With
    --guest, the entries from the guest's offset down to the byte in a file, through the backing chain. Offsets
    are in bytes: 4096, 4k, 1M, 8s (sectors).
    """
    if (host is None) == (guest is None):
        raise UsageError("Either --host or --guest must be given")
    if host is not None and snapshot is not None:
        raise UsageError("--host looks at all snapshots: -l goes with --guest")
    if host is not None:
        found = _host(gate, file, format, image_opts, host)
        text = host_lines(found)
    else:
        assert guest is not None
        found = _guest(gate, file, format, image_opts, guest, snapshot)
        text = guest_lines(found)
    if output == "json":
        print_json(found)
    else:
        click.echo("\n".join(text))


def _host(gate: Gate, file: str, format: str | None, image_opts: bool, offset: int) -> dict[str, Any]:
    from imgloop.explain import explain_host

    with imgloop.check(file, format, gate=gate, image_opts=image_opts) as report:
        if report.inspected is None and report.refusal is not None:
            raise report.refusal
        if report.refusal is not None:
            warn((report.refusal.message,))
        return explain_host(report, offset)


def _guest(
    gate: Gate, file: str, format: str | None, image_opts: bool, offset: int, snapshot: str | None
) -> dict[str, Any]:
    from imgloop.explain import explain_guest

    with imgloop.open(file, format, snapshot=snapshot, gate=gate, image_opts=image_opts) as image:
        return explain_guest(image, offset)


def host_lines(found: dict[str, Any]) -> Iterator[str]:
    """Who claims a host cluster, for people."""
    number, size = found["cluster"], found["cluster-size"]
    yield f"host offset {found['host']:#x} is in cluster {number} ({number * size:#x}+{size:#x})"
    if not found["in-file"]:
        yield "it is past the end of the file"
    yield f"refcount {found['refcount']}, claims {found['claims']}"
    for owner in found["owners"]:
        place = [owner["kind"]]
        if "name" in owner:
            place.append(f"'{owner['name']}'")
        if "l1-index" in owner:
            place.append(f"L1[{owner['l1-index']}]")
        if "l2-index" in owner:
            place.append(f"L2[{owner['l2-index']}] of the table at {owner['l2-table']:#x}")
        if "view" in owner:
            place.append("in the active image" if owner["view"] == "active" else f"in snapshot '{owner['view']}'")
        if "guest" in owner:
            place.append(f"guest {owner['guest']['offset']:#x}+{owner['guest']['length']:#x}")
        host = f"{owner['host']['offset']:#x}+{owner['host']['length']:#x}"
        yield f"    {', '.join(place)}: {host}" + ("" if owner["holds"] else " (elsewhere in the cluster)")
    if not found["owners"]:
        yield "    nobody claims it"


def guest_lines(found: dict[str, Any]) -> Iterator[str]:
    """Where a guest offset leads, for people."""
    yield f"guest offset {found['guest']:#x}: {found['answer']}"
    for layer in found["layers"]:
        yield f"layer {layer['depth']}: {layer['filename']} ({layer['format']})"
        yield from _path_lines(layer.get("path", {}))
        answer = f"    {layer['answer']}"
        if "host" in layer:
            answer += f" at {layer['host']:#x} of {layer['file']}"
        if "stored" in layer:
            answer += f", {layer['stored']} bytes that decode to a cluster; byte {layer['within']} of it"
        if "reason" in layer:
            answer += f": {layer['reason']}"
        yield answer


def _path_lines(path: dict[str, Any]) -> Iterator[str]:
    if not path:
        return
    if "l1" not in path:
        yield f"    L1[{path['l1-index']}] is past the end of the L1 table"
        return
    l1 = path["l1"]
    yield f"    L1[{path['l1-index']}] at {l1['offset']:#x}: {l1['entry']:#018x}, L2 table at {l1['table']:#x}"
    if "l2" in path:
        l2 = path["l2"]
        fields = {name: value for name, value in l2.items() if name not in ("offset", "entry")}
        flags = [name for name, value in fields.items() if value is True]
        numbers = [f"{name.replace('_', ' ')} {value:#x}" for name, value in fields.items() if type(value) is int]
        rest = ", ".join(flags + numbers)
        yield f"    L2[{path['l2-index']}] at {l2['offset']:#x}: {l2['entry']:#018x}, {rest}"
