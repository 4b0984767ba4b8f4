"""Bit structures of table entries, read a whole table at once.

An entry of a table (an L2 entry, say) is declared once, as a construct `BitStruct`. construct parses one of
them in about ten microseconds, which is too slow for a table of millions; `Columns` compiles the same
declaration into a shift and a mask for each field. A `Field` then takes the value out of one integer or out
of a numpy array of them alike, so that nobody writes a bit position down a second time.

>>> entry = Columns(BitStruct("copied" / Flag, "reserved" / BitsInteger(7), "offset" / Scaled(24, 512)))
>>> entry["offset"].of(0x80000003)
1536
>>> entry.table(bytes.fromhex("80000003 00000001"))["copied"].tolist()
[1, 0]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from construct import Adapter, BitsInteger, BitStruct, Flag

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BitStruct", "BitsInteger", "Columns", "Field", "Flag", "Scaled", "Table"]

WORD_BITS = 64


class Scaled(Adapter):  # type: ignore[misc]  # construct is untyped
    """An unsigned integer of `bits` bits, stored in units of `factor` (a power of two)."""

    def __init__(self, bits: int, factor: int) -> None:
        super().__init__(BitsInteger(bits))
        self.factor = factor

    def _decode(self, obj: int, context: Any, path: str) -> int:
        return obj * self.factor

    def _encode(self, obj: int, context: Any, path: str) -> int:
        return obj // self.factor


@dataclass(frozen=True, slots=True)
class Field:
    """Where one field lies in an entry: `word` of 64 bits (or fewer), shifts and a mask.

    The value is `(word >> shift & mask) << scale`.
    """

    word: int
    shift: int
    mask: int
    scale: int

    @property
    def bits(self) -> int:
        """The field's bits in place: what `word & bits` keeps of an entry's word."""
        return self.mask << self.shift

    @overload
    def of(self, word: int) -> int: ...
    @overload
    def of(self, word: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def of(self, word: Any) -> Any:
        """The field's value in the entry's word (an integer, or an array of them)."""
        if self.scale <= self.shift:
            # one shift and one mask: the scaled field stays where it is
            return (word >> (self.shift - self.scale)) & (self.mask << self.scale)
        return ((word >> self.shift) & self.mask) << self.scale


class Columns:
    """A `BitStruct` compiled to shifts and masks: a mapping from the field's name to its `Field`.

    Fields may not cross a word. Entries wider than 64 bits are split into words of 64 bits,
    the first bytes first.
    """

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self.size = schema.sizeof()  # bytes of an entry
        self.word_size = min(self.size, WORD_BITS // 8)
        self.words = self.size // self.word_size
        self._fields = dict(_fields(schema, self.word_size * 8))

    def __getitem__(self, name: str) -> Field:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def table(self, data: bytes | bytearray | memoryview) -> Table:
        """The entries in `data` (bytes; a multiple of the entry's size) as a `Table`."""
        import numpy as np

        words = np.frombuffer(data, dtype=f">u{self.word_size}").astype(np.uint64)
        return Table(self, words.reshape(-1, self.words))


class Table:
    """A table of entries: `table[name]` is the column of that field, as uint64, one value an entry."""

    __slots__ = ("columns", "entries")

    def __init__(self, columns: Columns, entries: NDArray[np.uint64]) -> None:
        self.columns = columns
        self.entries = entries  # shape (entries, words)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> NDArray[np.uint64]:
        field = self.columns[name]
        return field.of(self.entries[:, field.word])


def _fields(schema: Any, word_bits: int) -> Iterator[tuple[str, Field]]:
    """Each named field of a BitStruct, the most significant bit first, as construct reads it."""
    position = 0
    for named in schema.subcon.subcons:
        field = named.subcon
        scale = 0
        if isinstance(field, Scaled):
            scale = field.factor.bit_length() - 1
            field = field.subcon
        width = 1 if field is Flag else field.length
        word, first = divmod(position, word_bits)
        shift = word_bits - first - width
        if shift < 0:
            raise ValueError(f"field {named.name} crosses a word of {word_bits} bits")
        yield named.name, Field(word, shift, (1 << width) - 1, scale)
        position += width
