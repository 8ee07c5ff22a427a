"""What surrounds TensorRT, with a stand-in for its module: running plans, timing caches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gen3r_export import tensorrt_build, tensorrt_library, tensorrt_run
from gen3r_export.config import ExportConfig
from gen3r_export.tensorrt_build import Shapes, build_plan, parse_network
from gen3r_export.tensorrt_library import RTX, TENSORRT, Library, find_library
from gen3r_export.tensorrt_messages import logger
from gen3r_export.tensorrt_plan import inspect_engine
from gen3r_export.tensorrt_run import TensorRTRunner, open_tensorrt
from tests.export.fake_tensorrt import DataType, fake_library, host_gpu
from tests.export.tiny_onnx import tiny_graph, tiny_onnx

__all__ = ["host_gpu"]
CPU = torch.device("cpu")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = fake_library()
    monkeypatch.setattr(tensorrt_run, "find_library", lambda _: found)
    return found


@pytest.fixture
def runner(library: Library, host_gpu: None) -> TensorRTRunner:
    """Over host memory, which the stand-in copies."""
    library.module.Runtime(logger(library))
    return TensorRTRunner(library, library.module.engine, "copy.plan", CPU)


def test_runs_on_the_current_stream(runner: TensorRTRunner) -> None:
    assert (runner.names_in, runner.names_out) == (("x",), ("y",))
    assert runner.memory == 3 << 30 and runner.inputs[0].shapes() == "[1, 3] to [4, 3]"
    x = torch.arange(12.0).reshape(3, 4).t()  # not contiguous
    (y,) = runner(x)
    assert torch.equal(y, x) and runner.context.streams == [7]


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), r"copy\.plan takes 1 inputs \(x\), got 0"),
        ((torch.zeros(2, 3).half(),), r"input x is torch\.float16; it must be torch\.float32"),
        ((torch.zeros(5, 3),), r"input x is \[5, 3\]; the plan takes \[1, 3\] to \[4, 3\]"),
        ((torch.zeros(2, 3, 1),), r"input x is \[2, 3, 1\]"),
        ((torch.zeros(2, 3, device="meta"),), r"input x is on meta; move it to cpu"),
    ],
)
def test_wrong_inputs(runner: TensorRTRunner, inputs: tuple[torch.Tensor, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        runner(*inputs)


def test_failures_carry_tensorrts_words(runner: TensorRTRunner) -> None:
    engine = runner.engine
    engine.fails = True
    with pytest.raises(ValueError, match=r"Cuda Runtime \(an illegal access\)$"):
        runner(torch.zeros(1, 3))
    engine.fails, engine.unknown_shapes = False, True
    with pytest.raises(ValueError, match=r"does not know the shapes of \['x'\]"):
        runner(torch.zeros(1, 3))
    engine.full = True
    with pytest.raises(ValueError, match=r"no room for its 3\.0 GiB .*\(OutOfMemory\)"):
        TensorRTRunner(runner.library, engine, "copy.plan", CPU)
    engine.element = DataType.FP4
    with pytest.raises(ValueError, match="FP4, which torch has not"):
        TensorRTRunner(runner.library, engine, "copy.plan", CPU)


def test_opening(tmp_path: Path, library: Library, host_gpu: None) -> None:
    plan = tmp_path / "copy.plan"
    plan.write_bytes(b"plan")
    opened = open_tensorrt(plan, "cuda")
    assert opened.device == torch.device("cuda", 0) and opened.name == "copy.plan"
    with pytest.raises(ValueError, match=r"cuda:3 is not there; 1 GPUs are"):
        open_tensorrt(plan, "cuda:3")
    plan.write_bytes(b"pla")
    with pytest.raises(
        ValueError, match=r"does not open in tensorrt 10\.13\.3: .*magicTag mismatch"
    ):
        open_tensorrt(plan)


def test_plan_of_another_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_gpu: None
) -> None:
    found = fake_library(RTX, "1.7.1")
    monkeypatch.setattr(tensorrt_run, "find_library", lambda _: found)
    for number in ("80", "89"):
        (tmp_path / f"a.sm{number}.rtx.plan").write_bytes(b"plan")
    open_tensorrt(tmp_path / "a.sm89.rtx.plan")
    with pytest.raises(ValueError, match=r"is for compute capability 8\.0, this GPU has 8\.9"):
        open_tensorrt(tmp_path / "a.sm80.rtx.plan")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(ValueError, match=r"does not support compute capability 9\.0 .*proper"):
        open_tensorrt(tmp_path / "a.sm89.rtx.plan")


def test_missing_packages_give_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(
        tensorrt_library,
        "importlib",
        SimpleNamespace(import_module=absent, util=SimpleNamespace(find_spec=lambda _: None)),
    )
    tensorrt_library._load.cache_clear()
    try:
        with pytest.raises(ValueError) as found:
            find_library()
        text = str(found.value)
        assert "tensorrt: No module named 'tensorrt'" in text and "\n" not in text
        assert "pip install 'gen3r-engine[tensorrt]'" in text and "[tensorrt-rtx]" in text
        with pytest.raises(ValueError, match=r"found \(tensorrt: No module named 'tensorrt'\)"):
            find_library(TENSORRT)
    finally:
        tensorrt_library._load.cache_clear()
    with pytest.raises(ValueError, match="library 'trt' is unknown; known: tensorrt, tensorrt-rtx"):
        find_library("trt")


@pytest.mark.parametrize(("gpu", "kind"), [(True, TENSORRT), (False, RTX)])
def test_choice_where_both_are_installed(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, kind: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(tensorrt_library, "_load", fake_library)
    assert find_library().kind == kind
    assert find_library(RTX).kind == RTX


def test_versions() -> None:
    flags = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=2))
    bare = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace())
    assert Library(TENSORRT, "10.13", flags).network_flags == 4
    assert Library(TENSORRT, "11.4", flags).network_flags == 4
    assert Library(TENSORRT, "12.0", bare).network_flags == 0
    with pytest.raises(ValueError, match=r"no strongly typed networks; install 10\.0"):
        _ = Library(TENSORRT, "9.3", bare).network_flags
    assert Library(TENSORRT, "10.13", flags).timing_cache


class Settings:
    """IBuilderConfig's timing cache: bytes that begin with b"ok" are one of this GPU."""

    kept = b""

    def create_timing_cache(self, kept: bytes) -> bytes | None:
        return None if kept == b"damaged" else kept

    def set_timing_cache(self, kept: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.kept = kept
        return kept in (b"", b"ok")

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: memoryview(b"ok"))


def test_timing_cache(tmp_path: Path) -> None:
    file = tmp_path / "kept.cache"
    config = ExportConfig(format="tensorrt", timing_cache=file)
    proper, settings = fake_library(), Settings()
    load: Callable[[], Path | None] = lambda: tensorrt_build._load_timings(  # noqa: E731
        proper, settings, config
    )
    assert load() == file and settings.kept == b""
    tensorrt_build._save_timings(settings, file)
    assert file.read_bytes() == b"ok" and list(tmp_path.iterdir()) == [file]
    assert load() == file and settings.kept == b"ok"
    for content in (b"damaged", b"other GPU"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged, or of another GPU .*; delete it"):
            load()
    for path in (tmp_path, tmp_path / "none" / "kept.cache"):
        config = ExportConfig(format="tensorrt", timing_cache=path)
        with pytest.raises(ValueError, match="name one in a folder"):
            load()


def test_the_path_of_tensorrt_proper(tmp_path: Path) -> None:
    """No capability, a memory limit: with RTX's module, which has the same interface."""
    proper = Library(TENSORRT, "11.0.0", find_library(RTX).module)
    file, graph = tiny_onnx(tmp_path / "tiny.onnx", dynamic=True), tiny_graph(dynamic=True)
    shapes = Shapes(graph.name, graph.inputs, graph.dims)
    config = ExportConfig(format="tensorrt", precision="fp16", workspace_gib=0.5)
    plan, seconds = build_plan(parse_network(proper, file), shapes, config, None, print)
    assert plan.nbytes > 10_000 and seconds > 0


@pytest.mark.parametrize("key", ["Format/Datatype", "DataType"])
def test_engine_inspector_of_10_and_11(key: str) -> None:
    kind = {"Format/Datatype": "Channel major FP16 format", "DataType": "Half"}[key]
    layer = {
        "LayerType": "CaskConvolution",
        "Metadata": "[ONNX Layer: a]\u001e[ONNX Layer: b]",
        "Inputs": [{"Name": "x", key: kind}],
        "Outputs": [{"Name": "y", key: kind}],
    }
    reformat = {"LayerType": "Reformat", "Inputs": [], "Outputs": [{key: kind}]}

    def engine(*layers: object) -> Any:
        text = json.dumps({"Layers": layers})
        inspector = SimpleNamespace(get_engine_information=lambda _: text)
        return SimpleNamespace(create_engine_inspector=lambda: inspector)

    module = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON=1))
    library = Library(TENSORRT, "10.13", module)
    found = inspect_engine(library, engine(layer, reformat))
    assert found.products == {"half": 1} and found.tensors == {"half": 2}
    assert (found.groups, found.fused, found.onnx_layers) == (1, 1, 2)
    assert found.problems("fp16") == [] and found.problems("bf16")
    with pytest.raises(ValueError, match="not built at detailed profiling verbosity"):
        inspect_engine(library, engine("conv"))
