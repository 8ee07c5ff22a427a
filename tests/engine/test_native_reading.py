"""Headers of safetensors files, good and broken: C++ and Python take and refuse the same ones."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path

import pytest

from gen3r.checkpoint import CheckpointError
from gen3r_engine import safetensors_header
from gen3r_engine.native import native, why_missing
from gen3r_engine.safetensors_header import Span, parse_header, read_spans

CSRC = Path(__file__).resolve().parents[2] / "engine" / "csrc"
BUILT = pytest.mark.skipif(native() is None, reason=f"the extension is {why_missing()}")
GOOD = {
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    "é😀": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
    "__metadata__": {"format": "pt"},
}


def one(**changes: object) -> bytes:
    """The header of one tensor of 8 bytes."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return json.dumps({"a": {k: v for k, v in tensor.items() if v is not None}}).encode()


A = '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
BROKEN = {
    "empty": (b"", "begin with"),
    "space first": (b" {}", "begin with"),
    "cut": (one()[:-1], ""),
    "something behind": (one() + b"{}", ""),
    "no object": (b"{1}", ""),
    "number for a tensor": (b'{"a":1}', "'a'"),
    "unknown dtype": (one(dtype="F33"), "'a': dtype 'F33' is unknown"),
    "dtype and offsets differ": (one(shape=[3]), "do not span the 12 bytes"),
    "offsets backwards": (one(data_offsets=[8, 0]), "do not span"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "must be two numbers"),
    "gap": (one(data_offsets=[1, 9]), "begin at 1, those before it end at 0"),
    "negative": (one(shape=[-2]), "whole number"),
    "fraction": (one(shape=[2.0]), ""),
    "exponent": (one().replace(b"[2]", b"[2e0]"), ""),
    "boolean": (one(shape=[True, 2]), ""),
    "leading zero": (one().replace(b"[2]", b"[02]"), ""),
    "over 64 bits": (one(shape=[2**64]), ""),
    "huge number": (one().replace(b"[2]", b"[" + b"9" * 10_000 + b"]"), ""),
    "shape overflows": (one(shape=[2**32, 2**32]), r"over 2\^64 bits"),
    "half a byte": (one(dtype="F4", shape=[3], data_offsets=[0, 1]), "whole bytes"),
    "missing": (one(dtype=None), "needs dtype, shape and data_offsets"),
    "unknown key": (one(extra=1), ""),
    "key of a tensor twice": (one().replace(b'"dtype"', b'"shape":[2],"dtype"'), "twice"),
    "tensor twice": (f"{{{A},{A}}}".encode(), "'a'.*twice"),
    "overlap": (
        f'{{{A},"b":{{"dtype":"U8","shape":[6],"data_offsets":[2,8]}}}}'.encode(),
        "'b': its data begin at 2",
    ),
    "metadata of numbers": (b'{"__metadata__":{"k":1}}', ""),
    "metadata twice": (b'{"__metadata__":{"k":"1","k":"2"}}', "twice"),
    "deep": (b"{" * 100_000, ""),
    "deep list": (one().replace(b"[2]", b"[" * 100_000), ""),
    "NaN": (one().replace(b"[2]", b"[NaN]"), ""),
    "half a surrogate pair": (b'{"\\ud800":1}', ""),
    "broken UTF-8": (b'{"\xc0\x80":1}', "UTF-8"),
    "control character": (b'{"\n":1}', ""),
    "bytes behind the data": (one(), "4 bytes behind the last tensor"),
}


def native_header(header: bytes, length: int) -> list[Span]:
    module = native()
    assert module is not None
    return [Span(*row) for row in module.parse_header(header, length, "x.safetensors")]


PARSERS = [
    pytest.param(lambda h, n: parse_header(h, n, "x.safetensors"), id="python"),
    pytest.param(native_header, id="native", marks=BUILT),
]


@pytest.mark.parametrize("parse", PARSERS)
def test_a_good_header(parse: object) -> None:
    assert callable(parse)
    for text in (json.dumps(GOOD), json.dumps(GOOD, ensure_ascii=False), json.dumps(GOOD) + "  \n"):
        header = text.encode()
        start = 8 + len(header)
        assert parse(header, start + 12) == [
            Span("é😀", "BF16", (1, 2), start, start + 4),
            Span("b", "F32", (2,), start + 4, start + 12),
        ]
    assert parse(b"{}", 10) == []


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused(parse: object, name: str) -> None:
    assert callable(parse)
    header, part = BROKEN[name]
    extra = 12 if name == "bytes behind the data" else 9 if name == "gap" else 8
    with pytest.raises(ValueError, match=f"^x.safetensors: .*{part}"):
        parse(header, 8 + len(header) + extra)


@BUILT
def test_both_take_and_refuse_the_same_headers() -> None:
    dice = random.Random(5)
    tokens = [b'"', b"{", b"}", b",", b":", b"[", b"]", b"0", b"-1", b"1.5", b"\\u00e9", b"\\ud83d"]
    tokens += [b"18446744073709551615", b"18446744073709551616", b" ", b"\xff", b'"a":', b"null"]
    seeds = [json.dumps(GOOD).encode(), one(), f"{{{A}}}".encode(), b"{}"]
    taken = 0
    for _ in range(3000):
        header = bytearray(dice.choice(seeds))
        for _ in range(dice.randrange(3)):
            at = dice.randrange(len(header) + 1)
            cut = dice.choice([0, 0, 1, 1, 3])
            header[at : at + cut] = dice.choice([*tokens, b"", bytes([dice.randrange(256)])])
        length = 8 + len(header) + dice.choice([0, 4, 8, 12])
        results: list[list[Span] | None] = []
        for parse in (native_header, lambda h, n: parse_header(h, n, "x.safetensors")):
            try:
                results.append(parse(bytes(header), length))
            except ValueError:
                results.append(None)
        assert results[0] == results[1], bytes(header)
        taken += results[0] is not None
    assert 100 < taken < 2900


@pytest.mark.parametrize("path", ["python", pytest.param("native", marks=BUILT)])
def test_files_with_huge_or_short_lengths(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "python":
        monkeypatch.setattr(safetensors_header, "native", lambda: None)
    file, header = tmp_path / "ü.safetensors", one()
    for length, content, part in (
        (None, b"", "ends after 0 bytes"),
        (None, b"1234567", "ends after 7 bytes"),
        (len(header) + 1, header, "inside its header"),
        (2**64 - 1, header, "at most 100000000"),
        (100_000_001, header, "at most 100000000"),
        (0, header, "begin with"),
    ):
        prefix = b"" if length is None else length.to_bytes(8, "little")
        file.write_bytes(prefix + content)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}.*{part}.*download"):
            read_spans(file)
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"12345678")
    assert read_spans(file) == [Span("a", "F32", (2,), 8 + len(header), 16 + len(header))]


@pytest.mark.slow
def test_the_readers_stand_a_short_fuzzing() -> None:
    """`make fuzz` with few cases and no sanitizer."""
    if native() is None:
        pytest.skip(f"no compiler is taken for granted: the extension is {why_missing()}")
    done = subprocess.run(
        ["make", "-C", str(CSRC), "fuzz", "CASES=20000", "SEED=3"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20000 cases" in done.stdout
