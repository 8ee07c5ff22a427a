"""Which tensors a safetensors file holds and where, from a header that nobody vouches for.

A file is 8 bytes of header length, a JSON header and the tensors' bytes. Checked is everything that
a reader relies on: the length (at most 100 MB, inside the file), one JSON object of tensors with
just dtype, shape and data_offsets, no key twice, whole numbers below 2^64, known dtypes, sizes that
are shape times dtype, and data without gaps or overlaps up to the file's end. The same rules in C++
(csrc/safetensors.cpp) and here; the first is taken where it is built.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gen3r.checkpoint import CheckpointError
from gen3r_engine.native import native

LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library
BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16},
    **{"I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64},
}
_KEYS = ("dtype", "shape", "data_offsets")
_LIMIT = 2**64


class Span(NamedTuple):
    """One tensor in a file: [begin, end) in bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_spans(path: Path) -> list[Span]:
    """The tensors of a safetensors file in the order of their bytes.

    Raises
    ------
    CheckpointError : a header that breaks a rule (module docstring), with the file and the key, or
        a file that ends inside its header. OSError : it can not be read.
    """
    with path.open("rb", buffering=0) as file:
        module = native()
        try:
            if module is None:
                return _read_spans(file.fileno(), path)
            return [Span(*row) for row in module.read_spans(file.fileno(), shown(path))]
        except CheckpointError:
            raise
        except (ValueError, EOFError) as error:
            raise CheckpointError(f"{error}; download it again") from None


def parse_header(header: bytes, length: int, name: str) -> list[Span]:
    """The tensors of a header, in Python; `length` is the file's, `name` stands in messages.

    Data that lie beyond the file's end are the reader's to find. ValueError as `read_spans`.
    """
    text = _decoded(header, name)
    try:
        pairs = json.loads(
            text,
            object_pairs_hook=_Pairs,
            parse_int=_whole_number,
            parse_constant=_whole_number,
        )
    except RecursionError:
        raise ValueError(f"{name}: the header is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(pairs, _Pairs):
        raise ValueError(f"{name}: the header is no JSON object")
    spans = []
    for key, value in _once(pairs, name, ""):
        if key == "__metadata__":
            _check_metadata(value, name)
        else:
            spans.append(_tensor(key, value, name))
    spans.sort(key=lambda span: (span.begin, span.end))
    return _placed(spans, 8 + len(header), length, name)


class _Pairs(list[tuple[str, Any]]):
    """An object's keys and values as they stand there, so that a key that comes twice is seen."""


def _read_spans(descriptor: int, path: Path) -> list[Span]:
    length = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    size = int.from_bytes(prefix, "little")
    if len(prefix) == 8 and size > LONGEST_HEADER:
        raise ValueError(f"{path}: a header of {size} bytes; at most {LONGEST_HEADER}")
    if len(prefix) < 8 or size > length - 8:
        raise EOFError(f"{path} ends after {length} bytes, inside its header")
    return parse_header(os.pread(descriptor, size, 8), length, str(path))


def _decoded(header: bytes, name: str) -> str:
    if not header.startswith(b"{"):
        raise ValueError(f"{name}: the header does not begin with '{{'")
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: the header is no valid UTF-8: {error}") from None


def _whole_number(text: str) -> int:
    # Texts longer than a number below 2^64 may be; `int` itself takes long on huge ones.
    if not text.isdecimal() or len(text) > 20 or int(text) >= _LIMIT:
        raise ValueError(f"{text[:100]} is no whole number from 0 to 2^64 - 1")
    return int(text)


def _fail(name: str, key: str, what: str) -> NoReturn:
    where = "" if not key else f"'{key}': " if len(key) <= 100 else f"'{key[:100]}...': "
    raise ValueError(f"{name}: {where}{what}")


def _once(pairs: _Pairs, name: str, key: str) -> _Pairs:
    """The pairs, when no key comes twice and every key is text that can be written as UTF-8."""
    seen = set()
    for inner, _ in pairs:
        _check_text(inner, name, key)
        if inner in seen:
            _fail(name, key or inner, f"the key '{inner[:100]}' stands there twice")
        seen.add(inner)
    return pairs


def _check_text(value: Any, name: str, key: str) -> None:
    if not isinstance(value, str):
        _fail(name, key, "a text expected")
    if any("\ud800" <= character <= "\udfff" for character in value):
        _fail(name, key, "half a surrogate pair")


def _check_metadata(value: Any, name: str) -> None:
    if not isinstance(value, _Pairs):
        _fail(name, "__metadata__", "an object expected")
    for _, text in _once(value, name, "__metadata__"):
        _check_text(text, name, "__metadata__")


def _numbers(value: Any, name: str, key: str) -> list[int]:
    # A bool is an int to Python; an object is a list here.
    if type(value) is not list or any(type(entry) is not int for entry in value):
        _fail(name, key, "a list of whole numbers expected")
    return value


def _tensor(key: str, value: Any, name: str) -> Span:
    if not isinstance(value, _Pairs):
        _fail(name, key, "an object expected")
    found = dict(_once(value, name, key))
    for unknown in found.keys() - set(_KEYS):
        _fail(name, key, f"its key '{unknown[:100]}' is unknown")
    if len(found) < len(_KEYS):
        _fail(name, key, "it needs dtype, shape and data_offsets")
    dtype = found["dtype"]
    _check_text(dtype, name, key)
    if dtype not in BITS:
        _fail(name, key, f"dtype '{dtype[:100]}' is unknown")
    shape = _numbers(found["shape"], name, key)
    offsets = _numbers(found["data_offsets"], name, key)
    if len(offsets) != 2:
        _fail(name, key, "data_offsets must be two numbers")
    bits = 1
    for side in (*shape, BITS[dtype]):
        bits *= side
        if bits >= _LIMIT:
            _fail(name, key, "its shape times its dtype is over 2^64 bits")
    if bits % 8:
        _fail(name, key, "its entries do not fill whole bytes")
    if offsets[1] - offsets[0] != bits // 8:
        _fail(name, key, f"data_offsets do not span the {bits // 8} bytes of its shape and dtype")
    return Span(key, dtype, tuple(shape), offsets[0], offsets[1])


def _placed(spans: list[Span], start: int, length: int, name: str) -> list[Span]:
    """Spans from the file's start; they must lie one behind the other up to its end."""
    end = 0
    for span in spans:
        if span.begin != end:
            what = f"its data begin at {span.begin}, those before it end at {end}"
            _fail(name, span.name, what)
        end = span.end
        if start + end >= _LIMIT:
            _fail(name, span.name, "data_offsets are over 2^64")
    if start + end < length:
        _fail(name, "", f"{length - start - end} bytes behind the last tensor")
    return [span._replace(begin=start + span.begin, end=start + span.end) for span in spans]


def shown(path: Path) -> str:
    """A path as text that can be written as UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
