"""An image as people mean it: a chain of layers, opened through one gate, read by following extents."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, Self

from imgloop import names
from imgloop.cache import Cache
from imgloop.formats import open_driver
from imgloop.formats.driver import SECTOR, Driver, Purpose
from imgloop.formats.errors import (
    FormatError,
    ImageError,
    OpenError,
    OutOfRangeError,
    ReadError,
    UsageError,
    Where,
)
from imgloop.formats.kinds import Kind
from imgloop.formats.source import Source
from imgloop.gate import Gate
from imgloop.limits import DEFAULT, Limits
from imgloop.names import Node

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from imgloop.formats.extents import Extents
    from imgloop.report import CheckReport

_DATA, _COMPRESSED, _ENCRYPTED, _INVALID = map(
    int, (Kind.DATA, Kind.COMPRESSED, Kind.ENCRYPTED, Kind.INVALID)
)  # plain integers: every read compares them
MAX_THREADS = 8
WINDOW_UNITS = 2048  # clusters or subclusters whose extents are kept together


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the chain: its driver, and the node that it was opened as.

    `named_by` is the image that asked for it; None where a person did.
    """

    driver: Driver
    node: Node
    named_by: str | None


def open(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    snapshot: str | None = None,
    gate: Gate | None = None,
    image_opts: bool = False,
    limits: Limits = DEFAULT,
) -> Image:
    """Open an image for reading, with its whole backing chain.

    `path` is a file name, or QEMU's `file:…` or `json:{…}`; with `image_opts` a `key=value,…` string. `format`
    is the driver's name ("qcow2", "raw"); None probes. `snapshot` is the id, else the name, of an internal
    snapshot, or `snapshot.id=…,snapshot.name=…`; the image then has the size that the disk had. `gate` says
    which of the files that the image names may be opened; without one, regular files in
    its own directory and below. Raises OpenError, in QEMU's words, and GateError.
    """
    layers: list[Layer] = []
    try:
        for layer in open_layers(path, format, gate=gate, image_opts=image_opts, limits=limits):
            layers.append(layer)
        if snapshot is not None:
            layers[0] = _at_snapshot(layers[0], snapshot)
    except BaseException:
        for layer in layers:
            layer.driver.close()
        raise
    return Image(layers, limits)


def open_layers(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    purpose: Purpose = "read",
    gate: Gate | None = None,
    image_opts: bool = False,
    limits: Limits = DEFAULT,
) -> Iterator[Layer]:
    """Open the layers of a chain one by one, from the top down; the caller closes them.

    Parameters and errors as `open`. Each layer is opened for `purpose`: for "info", data files stay shut.
    A chain that comes back to a file that it has been to (by device and inode) is an OpenError, and so is one
    with more than `limits.chain_depth` layers.
    """
    text = os.fsdecode(path)
    gate = gate or Gate()
    try:
        top = _parse(text, format, image_opts)
        layer = _open_layer(top, None, gate, purpose, top)
    except OpenError as error:
        raise error.within(f"Could not open '{text}'") from error
    prefix = f"Could not open '{text}'"
    seen = {layer.driver.source.identity}
    while True:
        yield layer
        try:
            # `info` opens each by itself, all others the chain as one
            if purpose != "info":
                prefix = f"{prefix}: Could not open backing file"
            below, named_by = _backing_of(layer)
            if below is None:
                return
            if purpose == "info":
                prefix = f"Could not open '{below.text}'"
            if len(seen) >= limits.chain_depth:
                prefix = f"Could not open '{text}'"  # not once for each layer
                raise OpenError(f"The backing chain has more than {limits.chain_depth} layers")
            layer = _open_layer(below, named_by, gate, purpose, top)
            if layer.driver.source.identity in seen:
                layer.driver.close()
                where = Where(named_by, field="backing file", value=below.filename)
                raise OpenError(f"Backing file '{below.filename}' creates an infinite loop.", where)
        except OpenError as error:
            raise error.within(prefix) from error
        seen.add(layer.driver.source.identity)


def open_bare(
    path: str | os.PathLike[str], format: str | None = None, *, gate: Gate | None = None, image_opts: bool = False
) -> tuple[Source, Node]:
    """Open nothing but the file of the image itself, unread, for who looks at its bytes; the caller closes it.

    Parameters and errors as `open`. The node says under which name and format it was asked for.
    """
    text = os.fspath(path)
    try:
        node = _parse(text, format, image_opts)
        return (gate or Gate()).open_top(node.filename), node
    except OpenError as error:
        raise error.within(f"Could not open '{text}'") from error


def _parse(text: str, format: str | None, image_opts: bool) -> Node:
    """The node that a person asks for."""
    if image_opts and format:
        raise UsageError("--image-opts and --format are mutually exclusive")
    return names.parse_options(text) if image_opts else names.parse(text, format)


def _at_snapshot(layer: Layer, wanted: str) -> Layer:
    """The layer as it was at a snapshot; an id goes before a name, as for `qemu-img convert -l`."""
    try:
        if wanted.startswith("snapshot."):
            return replace(layer, driver=layer.driver.snapshot(**names.parse_snapshot(wanted)))
        try:
            return replace(layer, driver=layer.driver.snapshot(id=wanted))
        except FormatError:
            raise
        except OpenError:
            return replace(layer, driver=layer.driver.snapshot(name=wanted))
    except OpenError as error:
        raise error.within(f"Could not open '{layer.node.text}'") from error


def _backing_of(layer: Layer) -> tuple[Node | None, str | None]:
    """The node of the next layer (None at the bottom), and the image that names it."""
    node, named = layer.node, layer.driver.backing
    if node.no_backing:
        return None, None
    if node.backing is not None:
        return node.backing, layer.named_by
    if named is None:
        return None, None
    return names.parse(names.full_backing_name(named.name, node), named.format), node.filename


def _open_layer(node: Node, named_by: str | None, gate: Gate, purpose: Purpose, top: Node) -> Layer:
    def open_file(name: str, role: str, by: str | None) -> Source:
        return gate.open_top(name) if by is None else gate.open_named(name, top=top.filename, by=by, role=role)

    def open_data_file(name: str) -> Source:
        # a stored name is a plain file name, and counts from the current directory
        own = node.data_file is not None
        file = open_file(node.data_file or name, "data file", named_by if own else node.filename)
        opened.append(file)
        return file

    source = open_file(node.filename, "backing file", named_by)
    opened = [source]
    try:
        driver = open_driver(
            source, node.format, open_data_file=open_data_file, purpose=purpose, options=node.options
        )
    except BaseException as error:
        for file in opened:
            file.close()
        if isinstance(error, ReadError):
            raise OpenError(error.message, error.where) from error
        raise
    if node.backing is not None and driver.format == "raw":
        driver.close()
        raise OpenError("Driver doesn't support backing files")
    if node.data_file is not None and len(driver.files) == 1 and purpose != "info":
        driver.close()
        raise OpenError("'data-file' can only be set for images with an external data file")
    return Layer(driver, node, named_by)


@dataclass(frozen=True, slots=True)
class _Window:
    """The extents of one part of the guest, in columns that Python reads without numpy's overhead."""

    starts: memoryview
    ends: memoryview
    offsets: memoryview
    stored: memoryview
    kinds: bytes
    files: memoryview
    depths: memoryview


class Image:
    """An open image: what the guest sees, whatever the format and however deep the chain.

    All offsets and lengths are in bytes of the guest. Not for use from several threads while it is closed;
    reads from several threads are fine.
    """

    def __init__(self, layers: list[Layer], limits: Limits = DEFAULT) -> None:
        self.layers = tuple(layers)
        self._closed = False
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self.limits = limits
        self.size = layers[0].driver.size
        self.format = layers[0].driver.format
        self.name = layers[0].node.text
        self.files: tuple[Source, ...] = tuple(file for layer in layers for file in layer.driver.files)
        self._first_file = [0]
        for layer in layers[:-1]:
            self._first_file.append(self._first_file[-1] + len(layer.driver.files))
        self._window_bits = (min(map(_unit, layers)) * WINDOW_UNITS).bit_length() - 1
        self._windows: Cache[int, _Window] = Cache(limits.table_cache)
        self._clusters: Cache[tuple[int, int, int], bytes] = Cache(limits.cluster_cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Image {self.name!r} {self.format} {self.size} bytes>"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What QEMU would warn of when it opens these layers."""
        return tuple(warning for layer in self.layers for warning in layer.driver.warnings)

    def close(self) -> None:
        """Close every file of the chain."""
        self._closed = True
        if self._pool and self._pool[0] == os.getpid():
            self._pool[1].shutdown()
        self._windows.clear()
        self._clusters.clear()
        for layer in self.layers:
            layer.driver.close()

    # --- where the bytes are ---

    def iter_extents(self, start: int = 0, length: int | None = None, *, holes: bool = False) -> Iterator[Extents]:
        """The extents of [start, start + length) in tables of bounded size; to the end of the image by default.

        `depth` is the layer that answered, `file` counts `self.files`. UNALLOCATED is what no layer holds:
        zeros. With `holes` the file system is asked for holes in host files as well, as `map` does. Damaged
        parts are INVALID extents, not errors; see `explain`.
        """
        end = self.size if length is None else start + length
        self._check_range(max(0, end - start), start)
        while start < end:
            table = self._compose(0, start, end, holes)
            yield table
            start = int(table["start"][-1] + table["length"][-1])

    def extents(self, start: int = 0, length: int | None = None, *, holes: bool = False) -> Extents:
        """All that `iter_extents` gives, as one table, neighbours joined."""
        import numpy as np

        from imgloop.formats.extents import EXTENT, coalesce

        tables = list(self.iter_extents(start, length, holes=holes))
        return coalesce(np.concatenate(tables)) if tables else np.empty(0, dtype=EXTENT)

    def _compose(self, depth: int, start: int, end: int, holes: bool) -> Extents:
        """The extents of [start, end) as seen from layer `depth` down; may end early."""
        from imgloop.formats.extents import Kind, clip, end_of, overlay

        table = self.layers[depth].driver.extents(start, end - start, holes=holes)
        table["depth"] = depth
        table["file"] += self._first_file[depth]
        if depth + 1 == len(self.layers):
            return table
        deferred = table[table["kind"] == Kind.UNALLOCATED]
        if not len(deferred):
            return table
        # a layer that is shorter than the one above leaves zeros behind its end
        first = int(deferred["start"][0])
        last = min(end_of(deferred), self.layers[depth + 1].driver.size)
        if first >= last:
            return table
        lower = self._compose(depth + 1, first, last, holes)
        reach = end_of(lower)
        return overlay(clip(table, start, reach) if reach < last else table, lower)

    def explain(self, start: int, depth: int = 0) -> ImageError:
        """Why guest offset `start` is in an INVALID or ENCRYPTED extent of layer `depth`."""
        return self.layers[depth].driver.explain_invalid(start)

    # --- the bytes ---

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes at guest `offset`.

        Raises OutOfRangeError past the end of the image, CorruptError where an entry on the way is damaged,
        ReadError where the operating system fails.
        """
        if 0 <= offset <= self.size - length <= self.size:
            window = self._windows.get(offset >> self._window_bits)
            if window is not None:
                at = bisect_right(window.starts, offset) - 1
                if window.kinds[at] == _DATA and offset + length <= window.ends[at]:
                    file = self.files[window.files[at]]
                    return file.pread(length, window.offsets[at] + offset - window.starts[at])
        self._check_range(length, offset)  # before so much is allocated
        buffer = bytearray(length)
        self.readinto(buffer, offset)
        return bytes(buffer)

    def readinto(self, buffer: bytearray | memoryview, offset: int, *, once: bool = False) -> None:
        """Fill `buffer` with the bytes at guest `offset`; errors as `pread`.

        With `once` the calling thread does it all, and what it decodes is not kept: for who reads a whole image
        in threads of their own.
        """
        view = memoryview(buffer).cast("B")
        self._check_range(len(view), offset)
        done, length = 0, len(view)
        streams = []  # what has to be decoded, which threads can share
        while done < length:
            position = offset + done
            number = position >> self._window_bits
            window = self._windows.get(number) or self._load_window(number)
            at = bisect_right(window.starts, position) - 1
            while done < length and at < len(window.kinds):
                take = min(length - done, window.ends[at] - offset - done)
                task = (view[done : done + take], window, at, offset + done, once)
                if window.kinds[at] == _COMPRESSED and not once:
                    streams.append(task)
                else:
                    self._fill(*task)
                done += take
                at += 1
        if len(streams) > 1:
            list(self._threads.map(lambda task: self._fill(*task), streams))
        elif streams:
            self._fill(*streams[0])

    def _fill(self, part: memoryview, window: _Window, at: int, position: int, once: bool) -> None:
        """Fill `part` with guest bytes from `position` on, all within extent `at` of the window."""
        kind = window.kinds[at]
        if kind == _DATA:
            file = self.files[window.files[at]]
            file.readinto(part, window.offsets[at] + position - window.starts[at])
        elif kind == _COMPRESSED:
            driver = self.layers[window.depths[at]].driver
            cluster = self._cluster(window.depths[at], window.offsets[at], window.stored[at], keep=not once)
            skip = position % (driver.cluster_size or SECTOR)
            part[:] = memoryview(cluster)[skip : skip + len(part)]
        elif kind in (_INVALID, _ENCRYPTED):
            raise self.explain(position, window.depths[at])
        else:
            part[:] = bytes(len(part))

    def _cluster(self, depth: int, offset: int, stored: int, *, keep: bool) -> bytes:
        """The decoded cluster whose stream is at `offset` of layer `depth`."""
        key = (depth, offset, stored)  # damaged entries may give one stream several lengths
        cluster = self._clusters.get(key)
        if cluster is None:
            cluster = self.layers[depth].driver.decode(offset, stored)
            if keep:
                self._clusters.put(key, cluster, len(cluster))
        return cluster

    @property
    def _threads(self) -> ThreadPoolExecutor:
        """Threads that decode: the libraries let go of the interpreter while they do."""
        from concurrent.futures import ThreadPoolExecutor

        if self._pool is None or self._pool[0] != os.getpid():  # a fork leaves the threads behind
            workers = min(os.cpu_count() or 1, MAX_THREADS)
            self._pool = os.getpid(), ThreadPoolExecutor(workers, "imgloop-decode")
        return self._pool[1]

    def _load_window(self, number: int) -> _Window:
        start = number << self._window_bits
        table = self.extents(start, min(1 << self._window_bits, self.size - start))
        window = _Window(
            starts=table["start"].copy().data,
            ends=(table["start"] + table["length"]).data,
            offsets=table["offset"].copy().data,
            stored=table["stored"].copy().data,
            kinds=table["kind"].tobytes(),
            files=table["file"].copy().data,
            depths=table["depth"].copy().data,
        )
        self._windows.put(number, window, 1024 + 33 * len(table))
        return window

    def _check_range(self, length: int, offset: int) -> None:
        if self._closed:
            raise UsageError("The image is closed", Where(self.name))
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRangeError(
                f"Range of {length} bytes at {offset} is outside of the image, which has {self.size} bytes",
                Where(self.name),
            )

    def as_file(self) -> ImageFile:
        """The guest's bytes as a binary file object, positioned at 0; closing it leaves the image open."""
        return ImageFile(self)

    # --- what it is ---

    def check(self) -> CheckReport:
        """What a check finds; the report can be read while the image is open. See `imgloop.check`."""
        from imgloop.report import CheckReport

        return CheckReport(self.layers[0].node.shown, [(layer.driver, layer.node) for layer in self.layers])

    def info(self) -> dict[str, Any]:
        """What `qemu-img info --output json` says of the top layer."""
        from imgloop.info import layer_info

        return layer_info(self.layers[0].driver, self.layers[0].node)


def _unit(layer: Layer) -> int:
    """The smallest piece (bytes) in which a layer maps, but for its end."""
    return max(SECTOR, (layer.driver.cluster_size or 1 << 16) // layer.driver.pieces)


class ImageFile(io.RawIOBase):
    """The guest's bytes as a read-only, seekable file: for all that takes a file."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._position = 0

    def readable(self) -> bool:
        """True; ValueError once it is closed, as all calls."""
        self._check_open()
        return True

    def seekable(self) -> bool:
        """True."""
        self._check_open()
        return True

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def write(self, data: Any) -> NoReturn:
        """Refuse: the file is read-only."""
        self._check_open()
        raise io.UnsupportedOperation("write")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move as `io.RawIOBase.seek` does; the new position (bytes). Past the end there is nothing to read."""
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.image.size}
        if whence not in bases:
            raise ValueError(f"invalid whence {whence}")
        position = bases[whence] + offset
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        """The position (bytes)."""
        self._check_open()
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the image reaches; the number of bytes, 0 at its end."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.image.size - self._position))
        if count:
            self.image.readinto(view[:count], self._position)
        self._position += count
        return count
