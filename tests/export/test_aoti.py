"""AOTInductor packages on the CPU: compiled, run without the model's code, and refused in words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen3r_export.aoti import check, export_aoti, open_aoti
from gen3r_export.aoti_package import KEY, SUFFIX, AotiRunner, Machine, Note, read_note
from gen3r_export.compare import largest_error
from gen3r_export.config import ExportConfig
from gen3r_export.graph import DimRange, Exported, Graph, TensorSpec

CONFIG = ExportConfig(format="aoti")
LENGTHS = {"batch": 2, "k": 3}


class Twice(nn.Module):
    """x [batch, 4, 2 * k + 1] and pairs [2 * batch, 3]: two outputs, one of them integer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.inner(pairs).unflatten(0, (2, -1)).unbind()
        y = x * first[:, :, None] + second[:, :, None]
        return y, (y > 0).sum(dim=(1, 2))


def tiny() -> Graph:
    torch.manual_seed(0)
    inputs = (
        TensorSpec("x", ("batch", 4, "2*k+1"), "float32"),
        TensorSpec("pairs", ("2*batch", 3), "float32"),
    )
    outputs = (
        TensorSpec("y", ("batch", 4, "2*k+1"), "float32"),
        TensorSpec("count", ("batch",), "int64"),
    )

    def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        x, pairs = (torch.randn(s.sizes(lengths), generator=generator) for s in inputs)
        # The axis of 4 is the dense one, as in a channels-last map.
        return x.transpose(1, 2).contiguous().transpose(1, 2), pairs

    module = Twice().eval()
    dims = {"batch": DimRange(1, 2, 4), "k": DimRange(1, 3, 5)}
    return Graph(
        "tiny", "tiny", "whole", module, inputs, outputs, dims, example, wide=lambda: module
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aoti")


@pytest.fixture(scope="module")
def exported(package: Path) -> Exported:
    return export_aoti(tiny(), package, CONFIG, lambda line: None)


@pytest.fixture
def path(package: Path, exported: Exported) -> Path:
    return package / exported.files[0]


@pytest.fixture
def runner(path: Path) -> AotiRunner:
    return open_aoti(path)


def refused(call: Callable[[], Any]) -> str:
    """The one line that a call refuses with."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_an_export_tells(exported: Exported) -> None:
    assert exported.files == ("tiny.pt2",)
    assert exported.checked == {"run": "passed"}
    assert set(exported.errors) == {"same", "float32", "module"}
    assert max(exported.errors.values()) < 1e-6
    assert set(exported.seconds) == {"export", "build", "check", "package", "module"}


@pytest.mark.parametrize("lengths", [{"batch": 1, "k": 1}, LENGTHS, {"batch": 4, "k": 5}], ids=str)
def test_every_length_of_its_axes(runner: AotiRunner, lengths: dict[str, int]) -> None:
    graph = tiny()
    given = graph.example(lengths)
    assert runner.names_in == ("x", "pairs") and runner.names_out == ("y", "count")
    assert largest_error(runner(*given), graph.module(*given)) < 1e-6


def test_inputs_in_any_memory_order(runner: AotiRunner) -> None:
    x, pairs = tiny().example(LENGTHS)
    expected = runner(x, pairs)
    others = (x.contiguous(), torch.cat([x, x], dim=2)[:, :, : x.shape[2]], x.clone())
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(runner(other, pairs), expected, strict=True))


def test_refused_inputs(runner: AotiRunner) -> None:
    x, pairs = tiny().example(LENGTHS)
    assert "2 inputs (x, pairs), got 1" in refused(lambda: runner(x))
    assert "must be float32" in refused(lambda: runner(x.double(), pairs))
    assert "expected [2*batch, 3]" in refused(lambda: runner(x, pairs[:3]))
    assert "expected [batch, 4, 2*k+1]" in refused(lambda: runner(x[:, :, :6], pairs))
    long = tiny().example({"batch": 2, "k": 6})
    assert "k from 1 to 5, got 6" in refused(lambda: runner(*long))
    meta = [t.to("meta") for t in (x, pairs)]
    assert "open on cpu and input 'x' is on meta" in refused(lambda: runner(*meta))


WITHOUT_MODEL = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gen3r", "gen3r_kernels", "gen3r_engine"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from gen3r_export.aoti import open_aoti
given, expected = torch.load(sys.argv[2])
found = open_aoti(sys.argv[1])(*given)
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
print("as in PyTorch")
"""


def test_runs_without_the_model(path: Path, tmp_path: Path) -> None:
    graph = tiny()
    given = graph.example(LENGTHS)
    with torch.no_grad():
        torch.save((given, graph.module(*given)), tmp_path / "values.pt")
    command = [sys.executable, "-c", WITHOUT_MODEL, str(path), str(tmp_path / "values.pt")]
    folder = Path(__file__).resolve().parents[2] / "export"
    done = subprocess.run(
        command, env={"PYTHONPATH": str(folder), "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "as in PyTorch", done.stderr


def test_broken_packages(path: Path, tmp_path: Path) -> None:
    short, changed, other = (tmp_path / name for name in ("short.pt2", "changed.pt2", "other.pt2"))
    content = path.read_bytes()
    short.write_bytes(content[: len(content) // 2])
    assert "cut short" in refused(lambda: open_aoti(short))
    middle = len(content) // 2
    changed.write_bytes(content[:middle] + b"?" * 64 + content[middle + 64 :])
    assert "was changed" in refused(lambda: open_aoti(changed))
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("model/data/x_metadata.json", "{}")
    assert "not a package of gen3r_export" in refused(lambda: open_aoti(other))
    assert "does not exist" in refused(lambda: open_aoti(tmp_path / "none.pt2"))


def with_note(path: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a package whose note says something else."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(SUFFIX) and KEY in (kept := json.loads(content)):
                note = json.loads(kept[KEY])
                change(note)
                content = json.dumps({**kept, KEY: json.dumps(note)}).encode()
            new.writestr(item, content)
    return to


def test_packages_of_other_places(path: Path, tmp_path: Path) -> None:
    def altered(**machine: Any) -> str:
        def change(note: dict[str, Any]) -> None:
            note["machine"].update(machine)

        return refused(lambda: open_aoti(with_note(path, tmp_path / "altered.pt2", change)))

    assert "made with torch 1.0, here is" in altered(torch="1.0")
    assert "made for device cuda, not cpu" in altered(device="cuda")
    assert "CPU with x86_64 AVX9" in altered(cpu="x86_64 AVX9")
    newer = with_note(path, tmp_path / "newer.pt2", lambda note: note.update(schema=99))
    assert "another version of gen3r_export" in refused(lambda: open_aoti(newer))
    assert "'mps' is not here" in refused(lambda: open_aoti(path, "mps"))


def test_which_machines_run_a_package() -> None:
    gpu = Machine("cuda", "2.13", "13.0", "NVIDIA H100", "90")
    assert gpu.refusal(gpu) is None
    assert gpu.refusal(replace(gpu, gpu="NVIDIA H200")) is None
    assert "capability 90 (NVIDIA H100)" in str(gpu.refusal(replace(gpu, capability="89")))
    assert "CUDA 13.0" in str(gpu.refusal(replace(gpu, cuda="12.8")))
    cpu = Machine("cpu", "2.13", cpu="x86_64 AVX2")
    assert cpu.refusal(replace(cpu, cpu="x86_64 AVX512")) is None
    assert "CPU with x86_64 AVX2" in str(cpu.refusal(replace(cpu, cpu="x86_64 DEFAULT")))
    assert "CPU with x86_64 AVX2" in str(cpu.refusal(replace(cpu, cpu="aarch64 DEFAULT")))


def test_the_note_keeps_everything(path: Path) -> None:
    note = read_note(path)
    assert Note.of(note.text()) == note
    graph = tiny()
    assert (note.inputs, note.outputs, note.dims) == (graph.inputs, graph.outputs, graph.dims)
    assert note.orders == ((0, 2, 1), (0, 1))


def test_a_wrong_result_is_not_kept(runner: AotiRunner) -> None:
    graph = tiny()
    with torch.no_grad():
        graph.module.inner.weight += 0.1
    assert "it is wrong" in refused(lambda: check(graph, runner, "fp32"))
    with torch.no_grad():
        graph.module.inner.weight.fill_(float("inf"))
    assert "it is wrong" in refused(lambda: check(graph, runner, "bf16")), "whatever the bound"


def test_a_graph_that_cannot_be_traced(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor, pairs: Tensor) -> tuple[Tensor]:
            return (x if x.sum() > 0 else -x,)

    graph = replace(tiny(), module=Branching())
    text = refused(lambda: export_aoti(graph, tmp_path, CONFIG, lambda line: None))
    assert text.startswith("tiny cannot be traced at")
    assert not list(tmp_path.iterdir())


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no compiler to hide")

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("C++ compile error:\ng++: not found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    text = refused(lambda: export_aoti(tiny(), tmp_path, CONFIG, lambda line: None))
    assert "cannot be compiled into a package: C++ compile error: g++: not found" in text
