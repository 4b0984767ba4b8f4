"""`imgloop dump`: the structures of an image as they lie on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from imgloop.cli.options import image_options, output_option
from imgloop.formats import PROBE_LENGTH, probe
from imgloop.formats.errors import FormatError, ImageError, OpenError, Where, visible
from imgloop.gate import Gate
from imgloop.image import open_bare
from imgloop.sizes import size_text

if TYPE_CHECKING:
    from imgloop.formats.qcow2.dump import Part
    from imgloop.formats.source import Source
    from imgloop.names import Node

SYNOPSIS = "header|extensions|l1|l2 N|refcounts|snapshots|bitmaps"


@dataclass(frozen=True, slots=True)
class Request:
    """What to show of which file: a part (None: all), and for `l2` the index of the L1 entry."""

    file: str
    part: str | None = None
    number: int = 0


def _request(ctx: click.Context, _param: click.Parameter, words: tuple[str, ...]) -> Request:
    """FILE [PART], or FILE l2 N."""
    from imgloop.formats.qcow2.dump import PARTS

    match words:
        case (file,):
            return Request(file)
        case (file, part) if part in PARTS:
            return Request(file, part)
        case (file, "l2", index):
            try:
                return Request(file, "l2", int(index, 0))
            except ValueError:
                raise click.UsageError(f"'{index}' is not the index of an L1 entry", ctx) from None
        case ():
            raise click.UsageError("Expecting one image file name", ctx)
        case (_, "l2", *_):
            raise click.UsageError("'l2' expects the index of one L1 entry", ctx)
        case (_, part, *_) if part not in PARTS:
            raise click.UsageError(f"Unknown part '{part}': expecting {', '.join(PARTS)} or l2", ctx)
    raise click.UsageError(f"Unexpected argument '{words[2]}'", ctx)


@click.command()
@image_options
@output_option
@click.argument("request", metavar=f"FILE [{SYNOPSIS}]", nargs=-1, type=click.UNPROCESSED, callback=_request)
@click.pass_obj
def dump(
    gate: Gate,
    request: Request,
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output: str,
) -> None:
    """Show the structures of a qcow2 image FILE as they lie on disk, with offsets, names and decoded bits.

    Shows the part that is named, or all but the entries of L2 tables; `l2 N` shows the table of L1 entry N.
    Tables show the entries that are not zero. Damaged images are shown as far as they can be read; the exit code
    is 1, and the error the first thing that is wrong. Opens neither backing nor data file.
    """
    source, node = open_bare(request.file, format, gate=gate, image_opts=image_opts)
    try:
        _require_qcow2(source, node)
        problems = _show(source, node.shown, request, output)
    finally:
        source.close()
    if problems:
        raise problems[0]


def _require_qcow2(source: Source, node: Node) -> None:
    """Without -f, the magic decides; the version behind it may be damaged."""
    from imgloop.formats.qcow2.schema import MAGIC

    if node.format not in (None, "qcow2"):
        raise OpenError(
            f"Could not dump '{node.text}': only qcow2 images have structures to show, not {node.format}"
        )
    head = source.pread(PROBE_LENGTH, 0)
    magic = int.from_bytes(head[:4], "big")
    if node.format is None and magic != MAGIC:
        looks = f"Image is not in qcow2 format, it looks like {probe(head, source.name)}"
        raise FormatError(f"Could not dump '{node.text}': {looks}", Where(source.name, 0, "magic", magic))


def _show(source: Source, name: str, request: Request, output: str) -> list[ImageError]:
    """Print the parts; the problems that were found by then."""
    from imgloop.formats.qcow2.dump import PARTS, inspect

    image = inspect(source)
    if request.part == "l2":
        from imgloop.formats.qcow2.dump_tables import l2

        parts = {"l2": l2(image, request.number)}
    else:
        parts = {part: show(image) for part, show in PARTS.items() if request.part in (None, part)}
    about = {"filename": name, "format": "qcow2", "file-size": source.size}
    write = _json if output == "json" else _human
    sys.stdout.writelines(write(about, parts, image.problems))
    return image.problems


# --- JSON -------------------------------------------------------------------------------------------------


def _json(about: Part, parts: dict[str, Part], problems: list[ImageError]) -> Iterator[str]:
    """One object; the rows of tables one to a line, for there may be millions of them."""
    yield "{\n"
    for key, value in about.items():
        yield f'    "{key}": {json.dumps(value)},\n'
    for name, part in parts.items():
        yield f'    "{name}": {{'
        separator = "\n"
        for key, value in part.items():
            yield f'{separator}        "{key}": '
            separator = ",\n"
            yield from _json_rows(value) if isinstance(value, Iterator | list) else (json.dumps(value),)
        yield "\n    },\n"
    listed = json.dumps([_problem(problem) for problem in problems], indent=4).replace("\n", "\n    ")
    yield f'    "problems": {listed}\n}}\n'


def _json_rows(rows: Iterable[Part]) -> Iterator[str]:
    yield "["
    separator = "\n"
    for row in rows:
        yield f"{separator}            {json.dumps(row)}"
        separator = ",\n"
    yield "]" if separator == "\n" else "\n        ]"


def _problem(problem: ImageError) -> Part:
    where = problem.where
    return {"message": problem.message, "field": where.field, "offset": where.offset, "value": where.value}


# --- for people -------------------------------------------------------------------------------------------


def _human(about: Part, parts: dict[str, Part], problems: list[ImageError]) -> Iterator[str]:
    yield f"image: {visible(about['filename'])}\n"
    size = about["file-size"]
    yield f"file size: {size_text(size)} ({size} bytes, {size:#x})\n"
    for name, part in parts.items():
        yield "\n"
        for line in _PRINTERS[name](part):
            yield f"{line}\n"
    if problems:
        yield f"\nproblems: {len(problems)}\n"
    for problem in problems:
        yield f"  {visible(str(problem))}\n"


def _many(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _entries(part: Part) -> str:
    return f"{_many(part['entries'], 'entry', 'entries')} at {part['offset']:#x}"


def _mark(row: Part) -> str:
    """What is wrong with a row, at its end."""
    return f"  ! {visible(row['problem'])}" if "problem" in row else ""


def _hidden(part: Part) -> Iterator[str]:
    if "not-shown" in part:
        yield f"  not shown: {part['not-shown']}"


def _header(part: Part) -> Iterator[str]:
    yield f"header: {part['length']} bytes"
    yield f"  {'OFFSET':<6} {'SIZE':>4}  {'FIELD':<24} {'HEX':<18} {'DECIMAL':>20}  MEANING"
    for row in part["fields"]:
        meaning = visible(row.get("meaning", ""))
        if "bytes" in row:
            meaning += f"{': ' if meaning else ''}{size_text(row['bytes'])} ({row['bytes']} bytes)"
        shown, decimal = (row["hex"], row["value"]) if "hex" in row else (row["value"], "")
        line = f"  {row['offset']:<#6x} {row['size']:>4}  {row['name']:<24} {shown:<18} {decimal:>20}  {meaning}"
        yield line.rstrip() + _mark(row)
    if "unknown-fields" in part:
        unknown = part["unknown-fields"]
        yield f"  {unknown['offset']:<#6x} {unknown['length']:>4}  {'unknown fields':<24} {_bytes(unknown)}"


def _bytes(unknown: Part) -> str:
    """Bytes of unknown meaning in hex, and that there are more than are shown."""
    data: str = unknown["data"]
    shown = len(data) // 2
    return data + (f"... ({unknown['length'] - shown} bytes more)" if shown < unknown["length"] else "")


def _extensions(part: Part) -> Iterator[str]:
    if "not-shown" in part:
        yield "header extensions"
        yield from _hidden(part)
        return
    yield f"header extensions: {len(part['extensions'])} from {part['offset']:#x}, to end by {part['end']:#x}"
    if part["extensions"]:
        yield f"  {'OFFSET':<8} {'TYPE':<10} {'LENGTH':>7}  NAME"
    for row in part["extensions"]:
        yield f"  {row['offset']:<#8x} {row['type']} {row['length']:>7}  {row['name']}{_mark(row)}"
        yield from _extension_content(row)


def _extension_content(row: Part) -> Iterator[str]:
    """What an extension holds, below it."""
    indent = " " * 30
    if "text" in row:
        yield f"{indent}{row['text']!r}"
    for feature in row.get("features", ()):
        yield f"{indent}{feature['type']:<12} bit {feature['bit']:>2}  {visible(feature['name'])}"
    content = row.get("content", {})
    if "data" in content:
        yield f"{indent}{_bytes(content)}"
        return
    for key, value in content.items():
        yield f"{indent}{key:<17} {value:#x} ({value})"
    for key, value in row.get("luks", {}).items():
        if key != "slots":
            yield f"{indent}{key:<17} {visible(str(value))}"
    for number, slot in enumerate(row.get("luks", {}).get("slots", ())):
        state = f"active, {slot['iters']} iterations" if slot["active"] else "not in use"
        yield f"{indent}{f'key slot {number}':<17} {state}, key material at {slot['key-offset']:#x}"


def _l1(part: Part) -> Iterator[str]:
    if "not-shown" in part:
        yield "active L1 table"
        yield from _hidden(part)
        return
    yield f"active L1 table: {_entries(part)}, {part['needed']} needed"
    heading = f"  {'INDEX':>8}  {'AT':<14} {'ENTRY':<18}  {'L2 TABLE':<16} {'FLAGS':<7} GUEST OFFSET"

    def line(row: Part) -> str:
        return (
            f"  {row['index']:>8}  {row['at']:<#14x} {row['entry']}  {row['offset']:<#16x} {_copied(row):<7} "
            f"{row['guest-offset']:#x}{_mark(row)}"
        )

    yield from _table(part["rows"], heading, line)


def _copied(row: Part) -> str:
    return "copied" if row["copied"] else "-"


def _table(rows: Iterable[Part], heading: str, line: Callable[[Part], str]) -> Iterator[str]:
    """The heading, if there is a row, and a line for each."""
    empty = True
    for row in rows:
        if empty:
            yield heading
        empty = False
        yield line(row)
    if empty:
        yield "  all zero"


def _l2(part: Part) -> Iterator[str]:
    if "l1-index" not in part:
        yield "L2 table"
    elif "not-shown" in part:
        yield f"L2 table of L1 entry {part['l1-index']} ({part['l1-entry']})"
    else:
        yield (
            f"L2 table of L1 entry {part['l1-index']} ({part['l1-entry']}): {_entries(part)}, "
            f"guest offset {part['guest-offset']:#x}"
        )
    yield from _hidden(part)
    if "rows" not in part:
        return
    heading = (
        f"  {'INDEX':>8}  {'AT':<14} {'ENTRY':<18}  {'KIND':<11} {'HOST OFFSET':<16} {'FLAGS':<12} "
        f"{'GUEST OFFSET':<16} DETAILS"
    )
    yield from _table(part["rows"], heading, _l2_line)


def _l2_line(row: Part) -> str:
    flags = ",".join(name for name in ("copied", "zero") if row.get(name)) or "-"
    details = row.get("subclusters", "")
    if row["kind"] == "compressed":
        details = f"{row['stored']} bytes in {_many(row['sectors'], 'sector', 'sectors')}"
    line = (
        f"  {row['index']:>8}  {row['at']:<#14x} {row['entry'][:18]}  {row['kind']:<11} {row['offset']:<#16x} "
        f"{flags:<12} {row['guest-offset']:<#16x} {details}"
    )
    return line.rstrip() + _mark(row)


def _refcounts(part: Part) -> Iterator[str]:
    if "not-shown" in part:
        yield "refcount table"
        yield from _hidden(part)
        return
    yield f"refcount table: {_entries(part)}"
    heading = f"  {'INDEX':>8}  {'AT':<14} {'ENTRY':<18}  {'BLOCK':<18} CLUSTERS"

    def line(row: Part) -> str:
        clusters = f"{row['first-cluster']}..{row['last-cluster']}" if "first-cluster" in row else "?"
        return (
            f"  {row['index']:>8}  {row['at']:<#14x} {row['entry']}  {row['offset']:<#18x} {clusters}{_mark(row)}"
        )

    yield from _table(part["rows"], heading, line)
    if "runs" not in part:
        return
    yield ""
    yield (
        f"refcounts: {part['refcount-bits']} bits each, {part['refcounts-per-block']} in a block, "
        f"{_many(part['host-clusters'], 'cluster', 'clusters')} in the file"
    )
    for run in part["runs"]:
        clusters = f"{run['first']}..{run['last']}"
        start, end = (number * part["cluster-size"] for number in (run["first"], run["last"] + 1))
        count = "unknown" if run["refcount"] is None else run["refcount"]
        reason = f"  ! {run['not-shown']}" if "not-shown" in run else ""
        yield f"  {clusters:<23} refcount {count:<10} at {start:#x}..{end - 1:#x}{reason}"


def _snapshots(part: Part) -> Iterator[str]:
    if "not-shown" in part:
        yield "snapshots"
        yield from _hidden(part)
        return
    yield f"snapshots: {_entries(part) if part['entries'] else 'none'}"
    for row in part["rows"]:
        more = f" and {row['more']} more" if row.get("more") else ""
        yield f"  [{row['index']}] at {row['offset']:#x}{more}{_mark(row)}"
        fields = {key: row[key] for key in row if key not in ("index", "offset", "more", "problem")}
        extra = fields.pop("extra-data", {})
        unknown = fields.pop("unknown-extra-data", None)
        for key, value in (fields | {f"extra {name}": value for name, value in extra.items()}).items():
            shown = repr(value) if isinstance(value, str) else f"{value:#x} ({value})"
            date = f"  {datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC" if key == "date-sec" else ""
            yield f"      {key:<22} {shown}{date}"
        if unknown:
            yield f"      {'extra unknown':<22} {_bytes(unknown)}"


def _bitmaps(part: Part) -> Iterator[str]:
    if "offset" not in part:
        yield "bitmaps" if "not-shown" in part else "bitmaps: none"
        yield from _hidden(part)
        return
    yield f"bitmaps: {_entries(part)}, {part['length']} bytes"
    if "warning" in part:
        yield f"  {part['warning']}"
    yield from _hidden(part)
    for row in part.get("rows", ()):
        yield f"  [{row['index']}] at {row['offset']:#x}{_mark(row)}"
        if "name" not in row:
            continue
        flags = ", ".join(row["flag-names"]) or "none"
        yield f"      {'name':<22} {row['name']!r}"
        yield f"      {'flags':<22} {row['flags']:#x} ({flags})"
        yield f"      {'type':<22} {row['type']}"
        bits = row["granularity-bits"]
        yield f"      {'granularity-bits':<22} {bits}" + (f" ({size_text(1 << bits)})" if bits < 64 else "")
        yield f"      {'extra-data-size':<22} {row['extra-data-size']}"
        yield f"      {'table':<22} {_many(row['table-size'], 'entry', 'entries')} at {row['table-offset']:#x}"
        if "table" in row:
            counts = ", ".join(f"{count} {name}" for name, count in row["table"].items())
            yield f"      {'':<22} {counts}"


_PRINTERS: dict[str, Callable[[Part], Iterator[str]]] = {
    "header": _header,
    "extensions": _extensions,
    "l1": _l1,
    "l2": _l2,
    "refcounts": _refcounts,
    "snapshots": _snapshots,
    "bitmaps": _bitmaps,
}
