"""What people and images call an image: plain names, `file:`, `json:{…}` and `--image-opts`, as QEMU has them.

All of them become a `Node`: which file, which format, and what is to be different from what the image itself
says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from imgloop.formats.errors import OpenError
from imgloop.sizes import parse_size

# Options of QEMU's nodes that change nothing for one who only reads.
_HARMLESS = re.compile(
    r"read-only|auto-read-only|force-share|discard|detect-zeroes|node-name|cache(\..*)?|aio(-.*)?|locking"
    r"|pass-discard-.*|lazy-refcounts|overlap-check(\..*)?|(l2-|refcount-)?cache-.*|l2-cache-entry-size"
    r"|x-check-cache-dropped|drop-cache|pr-manager"
)
_PROTOCOL = re.compile(r"[^/:]*:")


@dataclass(frozen=True, slots=True)
class Node:
    """One image as it is asked for."""

    text: str  # as it was given
    filename: str  # of the file itself
    format: str | None = None  # None: probe
    options: dict[str, int] = field(default_factory=dict)  # of the format's driver
    backing: Node | None = None  # in place of the one that the image names
    no_backing: bool = False
    data_file: str | None = None  # in place of the one that the image names

    @property
    def shown(self) -> str:
        """The name that is shown: plain where that says it all, else `json:{…}`."""
        if self.options:
            file = {"driver": "file", "filename": self.filename}
            return "json:" + json.dumps({"driver": self.format or "raw", **self.options, "file": file})
        if ":" in self.filename.split("/", 1)[0]:
            return f"./{self.filename}"
        return self.filename


def parse(text: str, format: str | None = None) -> Node:
    """The node that a file name stands for; `format` (from -f) goes before what the name itself says."""
    if text.startswith("json:"):
        node = _from_json(text)
        return replace(node, format=format) if format else node
    return Node(text, _strip_protocol(text), format)


def parse_options(text: str) -> Node:
    """The node that an --image-opts string (`key=value,…`; a comma in a value is doubled) stands for."""
    return _from_options(text, _nested(dict(_key_values(text))))


def _key_values(text: str) -> Iterator[tuple[str, str]]:
    """The pairs of `key=value,…`; a comma in a value is doubled."""
    for part in re.findall(r"(?:[^,]|,,)+", text):
        key, equals, value = part.replace(",,", ",").partition("=")
        if not equals:
            raise OpenError(f"Cannot find device='{part}' nor node-name='{part}'")
        yield key, value


def parse_snapshot(text: str) -> dict[str, str]:
    """`snapshot.id=…,snapshot.name=…` (a comma in a value is doubled) as `id` and `name`."""
    found = {}
    for key, value in _key_values(text):
        if key not in ("snapshot.id", "snapshot.name"):
            raise OpenError(f"Failed in parsing snapshot param '{text}'")
        found[key.removeprefix("snapshot.")] = value
    return found


def full_backing_name(name: str, overlay: Node) -> str:
    """The name of a backing file as QEMU resolves it: a plain relative name counts from the overlay's directory.

    Joined as text, so `a/../b` stays what it is; absolute names, `json:` and protocols are left alone.
    """
    if name.startswith("/") or _PROTOCOL.match(name):
        return name
    return overlay.filename[: overlay.filename.rfind("/") + 1] + name


def _strip_protocol(text: str) -> str:
    found = _PROTOCOL.match(text)
    if not found:
        return text
    protocol = found[0][:-1]
    if protocol == "file":
        return text[len("file:") :]
    if protocol in _OTHER_PROTOCOLS:
        raise OpenError(f"Protocol '{protocol}' is not supported")
    raise OpenError(f"Unknown protocol '{protocol}'")


_OTHER_PROTOCOLS = frozenset(
    [
        "nbd",
        "nbd+tcp",
        "nbd+unix",
        "nbds",
        "http",
        "https",
        "ftp",
        "ftps",
        "ssh",
        "iscsi",
        "rbd",
        "fat",
        "blkdebug",
        "blkverify",
        "quorum",
        "nfs",
        "host_device",
        "host_cdrom",
        "null-co",
        "null-aio",
        "nvme",
        "vxhs",
        "gluster",
        "io_uring",
    ]
)


def _from_json(text: str) -> Node:
    try:
        options = json.loads(text[len("json:") :])
    except (ValueError, RecursionError) as error:
        raise OpenError(f"Could not parse the JSON options: {error}") from error
    if not isinstance(options, dict):
        raise OpenError("Invalid JSON object given")
    return _from_options(text, _nested(options))


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """Options with dotted keys ("file.filename") as nested dictionaries."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        place = result
        *path, last = key.split(".")
        for name in path:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise OpenError(f"Parameter '{key}' contradicts another one")
        if isinstance(value, dict):
            value = _nested(value)
            if isinstance(place.get(last), dict):
                value = place[last] | value
        place[last] = value
    return result


def _from_options(text: str, options: dict[str, Any]) -> Node:
    options = dict(options)
    driver = _word(options.pop("driver", None), "driver")
    if driver is None and "file" not in options:
        raise OpenError("Must specify either driver or file")
    if driver in ("file", "host_device"):
        return Node(text, _file(options | {"driver": driver}), "raw")
    if "file" not in options:
        raise OpenError('A block device must be specified for "file"')
    filename = _file(options.pop("file"))
    no_backing = options.get("backing", "a name") in (None, "")
    if no_backing:
        del options["backing"]
    node = Node(text, filename, driver, no_backing=no_backing)
    node = _with_children(node, options)
    if driver in (None, "raw"):
        sizes: dict[str, int] = {
            name: _size(options.pop(name), name) for name in ("offset", "size") if name in options
        }
        node = replace(node, options=sizes)
    for name in options:
        if not _HARMLESS.fullmatch(name):
            _unsupported(f"Block format '{driver}' does not support the option", name, options[name])
    return node


def _with_children(node: Node, options: dict[str, Any]) -> Node:
    if "backing" in options:
        backing = options.pop("backing")
        if isinstance(backing, dict):
            node = replace(node, backing=_from_options(node.text, backing))
        else:
            message = f"Cannot find device='{backing}' nor node-name='{backing}'"
            raise OpenError(f"Could not open backing file: {message}")
    if "data-file" in options and node.format != "raw":
        node = replace(node, data_file=_file(options.pop("data-file")))
    return node


def _file(options: Any) -> str:
    """The file name in the options of a protocol node."""
    if not isinstance(options, dict):
        raise OpenError(f"Cannot find device='{options}' nor node-name='{options}'")
    options = dict(options)
    driver = _word(options.pop("driver", "file"), "driver")
    if driver not in ("file", "host_device"):
        if driver not in _OTHER_PROTOCOLS:
            raise OpenError(f"Unknown driver '{driver}'")
        raise OpenError(f"Driver '{driver}' is not supported below a format; only 'file' is")
    filename = _word(options.pop("filename", None), "filename")
    if not filename:
        raise OpenError("The 'file' block driver requires a file name")
    for name in options:
        if not _HARMLESS.fullmatch(name):
            _unsupported("Block protocol 'file' doesn't support the option", name, options[name])
    return filename


def _word(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise OpenError(f"Invalid parameter type for '{name}', expected: string")
    return value


def _size(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise OpenError(f"Parameter '{name}' expects a size")
    try:
        return value if isinstance(value, int) and value >= 0 else parse_size(str(value))
    except (ValueError, OverflowError) as error:
        raise OpenError(f"Parameter '{name}' expects a size") from error


def _unsupported(message: str, name: str, value: Any) -> NoReturn:
    while isinstance(value, dict) and value:
        inner = next(iter(value))
        name, value = f"{name}.{inner}", value[inner]
    raise OpenError(f"{message} '{name}'")
