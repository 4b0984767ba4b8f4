"""Options that several verbs share, spelled as qemu-img spells them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from imgloop.sizes import MAX_SIZE, parse_size

Function = TypeVar("Function", bound=Callable[..., Any])


def image_options(function: Function) -> Function:
    """-f, --image-opts and -U: how the image is opened."""
    for option in (
        click.option("-U", "--force-share", is_flag=True, help="Accepted as by qemu-img; no locks are taken."),
        click.option("--image-opts", is_flag=True, help="FILE is a list of options: key=value,…"),
        click.option("-f", "--format", metavar="FMT", help="The image's format; without it, probe."),
    ):
        function = option(function)
    return function


class Output(click.Choice[str]):
    """human or json."""

    def __init__(self) -> None:
        super().__init__(["human", "json"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The choice, or QEMU's words."""
        if value not in self.choices:
            raise click.UsageError(f"--output expects 'human' or 'json' not '{value}'", ctx)
        return str(value)


output_option = click.option("--output", type=Output(), default="human", help="human (default) or json")


class Size(click.ParamType[int]):
    """A size or an offset in bytes: k, M, G, T, P, E, or s for sectors of 512 bytes."""

    def __init__(self, what: str) -> None:
        self.name = "N"
        self.what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, or QEMU's words for what is not a size."""
        text = str(value)
        try:
            return parse_size(text)
        except OverflowError:
            pass
        except ValueError:
            if not text.startswith("-"):
                raise click.ClickException(f"Invalid {self.what} specified: '{text}'.") from None
        raise click.ClickException(f"Invalid {self.what} specified. Must be between 0 and {MAX_SIZE}.")


def warn(messages: tuple[str, ...]) -> None:
    """Warnings on stderr; they do not change the exit code."""
    for message in messages:
        click.echo(f"imgloop: warning: {message}", err=True)


def print_json(value: Any) -> None:
    """JSON on stdout; of names, what is not UTF-8 becomes U+FFFD, as in QEMU's."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    click.echo(json.dumps(json.loads(text), indent=4))


def one_file(ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> str:
    """The callback of the FILE argument: exactly one, in QEMU's words."""
    if len(value) != 1:
        raise click.UsageError("Expecting one image file name", ctx)
    return value[0]


file_argument = click.argument("file", metavar="FILE", nargs=-1, type=click.UNPROCESSED, callback=one_file)
