"""Parallel reading: bit for bit what safetensors reads, whatever the chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen3r.checkpoint import CheckpointError, TensorFile
from gen3r_engine.reading import ParallelReader, read_spans

CPU = torch.device("cpu")


def made(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    shapes = {"a": (7, 5), "b": (), "c": (0, 3), "d": (1000,), "e": (3, 4, 5), "f": (1,)}
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def written(path: Path, state: dict[str, Tensor]) -> TensorFile:
    save_file(state, path)
    return TensorFile(
        path, {f"up.{n}": n for n in state}, {f"up.{n}": tuple(t.shape) for n, t in state.items()}
    )


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("chunk", [2, 64, 700, 2**20])
def test_same_as_safetensors(tmp_path: Path, chunk: int, staged: bool) -> None:
    file = written(tmp_path / "x.safetensors", made())
    expected = load_file(file.path)
    with ParallelReader(torch.bfloat16, threads=3, chunk=chunk, staged=staged) as read:
        for _ in range(2):  # buffers are used again
            found = dict(read(file, file.names, CPU))
            assert found.keys() == {f"up.{n}" for n in expected}
            assert all(torch.equal(found[f"up.{n}"], t) for n, t in expected.items())


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", made())
    expected = load_file(file.path)
    with ParallelReader(torch.bfloat16, threads=2, chunk=256, staged=True) as read:
        found = dict(read(file, {"up.a", "up.e"}, CPU))
        assert found.keys() == {"up.a", "up.e"} and torch.equal(found["up.e"], expected["e"])
        assert dict(read(file, set[str](), CPU)) == {}


def test_every_tensor_owns_its_memory(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):  # by chunks, and tensor by tensor
        file = written(tmp_path / "x.safetensors", made(dtype))
        with ParallelReader(torch.bfloat16) as read:
            for _, tensor in read(file, file.names, CPU):
                owned = tensor.to(torch.bfloat16).untyped_storage()
                assert owned.nbytes() == 2 * tensor.numel()


def test_other_dtypes_and_pickles_go_tensor_by_tensor(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", made(torch.float32))
    with ParallelReader(torch.bfloat16) as read:
        found = dict(read(file, file.names, CPU))
        assert torch.equal(found["up.d"], load_file(file.path)["d"])
    torch.save(made(), tmp_path / "x.pth")
    pickled = TensorFile(tmp_path / "x.pth", {"d": "d"}, {"d": (1000,)})
    with ParallelReader(torch.bfloat16) as read:
        ((name, tensor),) = read(pickled, {"d"}, CPU)
        assert name == "d" and torch.equal(tensor, made()["d"])


def test_a_file_that_is_too_short_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", made())
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with ParallelReader(torch.bfloat16) as read, pytest.raises(CheckpointError, match="ends after"):
        dict(read(file, file.names, CPU))


def test_spans_are_the_files(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", made())
    spans = read_spans(file.path)
    assert spans[-1].end == file.path.stat().st_size
    assert [s.begin for s in spans] == sorted(s.begin for s in spans)
    assert {s.name: s.shape for s in spans} == {n: tuple(t.shape) for n, t in made().items()}
