"""Pickle streams written opcode by opcode: `C` pushes a name, `U` a text, and so on."""

from __future__ import annotations

import io
import struct
import zipfile

FLOAT = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """LONG1."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    """A tuple."""
    return b"(" + b"".join(map(number, values)) + b"t"


def call(name: bytes, *args: bytes) -> bytes:
    """GLOBAL, a tuple of arguments, REDUCE."""
    return name + b"(" + b"".join(args) + b"tR"


def protocol(body: bytes, version: int = 2) -> bytes:
    return b"\x80" + bytes([version]) + body + b"."


def identity(key: str = "0", count: int = 4, kind: bytes = FLOAT) -> bytes:
    """A persistent id."""
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(size: bytes, stride: bytes, offset: int = 0, storage: bytes | None = None) -> bytes:
    storage = identity() if storage is None else storage
    return call(REBUILD, storage, number(offset), size, stride, b"\x89", b"}")


def state_dict(value: bytes) -> bytes:
    return protocol(b"}" + text("w") + value + b"s")


def zipped(pickled: bytes, entries: dict[str, bytes] | None = None, compress: int = 0) -> bytes:
    """A zip as torch writes it, around `pickled` and one storage of four floats."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        archive.writestr("w/data.pkl", pickled)
        for name, data in (entries or {"data/0": struct.pack("<4f", 1, 2, 3, 4)}).items():
            archive.writestr(f"w/{name}", data)
        archive.writestr("w/version", b"3\n")
    return buffer.getvalue()


def colliding_pairs(count: int) -> list[bytes]:
    """Pairs of numbers below 2**60 whose hashes, as pairs, are all one: the steps of CPython's hash of tuples turned round."""
    one, two, five = 11400714785074694791, 14029467366897019727, 2870177450012600261
    word, pairs, first = 1 << 64, [], 0

    def turned(value: int) -> int:
        return (value << 31 | value >> 33) % word * one % word

    undo_one, undo_two = pow(one, -1, word), pow(two, -1, word)
    before = 12345 * undo_one % word  # what the last lane is to make
    wanted = (before >> 31 | before << 33) % word
    while len(pairs) < count:
        first += 1
        second = (wanted - turned((five + first * two) % word)) * undo_two % word
        if second < 1 << 60:
            pairs.append(number(first) + number(second) + b"\x86")
    return pairs
