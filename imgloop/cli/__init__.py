"""The command line: one file per verb, each imported only when it is called."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

import click

from imgloop import __version__
from imgloop.formats.errors import ImageError, visible
from imgloop.gate import Gate, Trust

# verb: what `imgloop --help` says of it; the command `<verb>` is in imgloop.cli.<verb>
VERBS = {
    "check": "Check the structures of an image, and who claims what.",
    "explain": "Explain one place of an image: who claims it, where it leads.",
    "compare": "Compare what two images hold for a guest.",
    "convert": "Write an image, or several in a row, to a raw file.",
    "dd": "Copy a part of an image to a raw file, with dd's operands.",
    "dump": "Show the structures of an image as they lie on disk.",
    "info": "Show what an image is.",
    "map": "Show which parts of an image hold data, and where.",
    "measure": "Tell how much space an image would take in another format.",
    "read": "Read a part of an image.",
    "snapshot": "List the internal snapshots of an image.",
}


class Terminated(BaseException):
    """SIGTERM or SIGHUP came: what is under way is cleaned up as for an interrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, _frame: object) -> NoReturn:
    raise Terminated(number)


class Verbs(click.Group):
    """The verbs, imported on demand: start-up costs only what the verb itself needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, sorted."""
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb; None where there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(import_module(f"imgloop.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs in the help text, without importing any of them."""
        with formatter.section("Verbs"):
            formatter.write_dl(sorted(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that was called; QEMU's words where there is none."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"Command not found: {args[0]}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--allow", metavar="PATH", multiple=True, help="Let images refer to this file, or to files below it."
)
@click.option("--trust", is_flag=True, help="Let images refer to any file.")
@click.option("--untrusted", is_flag=True, help="Open no file that an image refers to.")
@click.version_option(__version__, "-V", "--version", prog_name="imgloop")
@click.pass_context
def imgloop(ctx: click.Context, allow: tuple[str, ...], trust: bool, untrusted: bool) -> None:
    """Inspect, map and read disk images: qcow2 and raw, as qemu-img does.

    Files that an image refers to (its backing file, its data file) are opened only in the image's own
    directory and below; --allow, --trust and --untrusted change that.
    """
    if trust and untrusted:
        raise click.UsageError("--trust and --untrusted are mutually exclusive", ctx)
    mode = Trust.FULL if trust else Trust.NONE if untrusted else Trust.DIRECTORY
    ctx.obj = Gate(trust=mode, allow=allow)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Every error is one line on stderr, and none a traceback."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for as long as the process lives
    if sys.stdout is None:
        say("stdout is closed")
        return 1
    for stream in (sys.stdout, sys.stderr):
        # names come from strangers: they leave as the bytes that they were, and never end in an encoding error
        if isinstance(stream, TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    return run(args)


def run(args: Sequence[str] | None = None) -> int:
    """`main` without touching the process's signals and streams."""
    try:
        code = imgloop.main(args=args, prog_name="imgloop", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        say(error.format_message())
        command = error.ctx.command_path if error.ctx else "imgloop"
        click.echo(f"Try '{command} --help' for more info", err=True)
        return 1
    except click.ClickException as error:
        say(error.format_message())
        return 1
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        return 130
    except Terminated as end:
        say("terminated")
        return 128 + end.number
    except ImageError as error:
        say(str(error))
        return 1
    except BrokenPipeError:
        return _abandon_stdout(141)
    except MemoryError:
        say("out of memory")
        return 1
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename else f"output: {error.strerror}")
        return _abandon_stdout(1)
    except SystemExit as end:
        return int(end.code or 0)
    return code if isinstance(code, int) else 0  # a verb may return its exit code


def say(message: str) -> None:
    """One line of error on stderr."""
    click.echo(f"imgloop: error: {visible(message)}", err=True)


def _abandon_stdout(code: int) -> int:
    """Keep the interpreter from flushing what cannot be written when it ends."""
    with suppress(OSError, ValueError):  # not a real file, or closed: then there is nothing to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
