"""TensorRT-RTX builds and inspects plans without a GPU: every precision, every capability.

The wheels are part of the dev extra: where they are missing these tests fail.
"""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from gen3r_export import tensorrt_messages
from gen3r_export.config import ExportConfig
from gen3r_export.graph import Graph
from gen3r_export.onnx_runner import OnnxRunner
from gen3r_export.tensorrt import (
    build_tensorrt,
    check_tensorrt,
    open_tensorrt,
    preferred_library,
    sample_inputs,
    trtexec_command,
)
from gen3r_export.tensorrt_build import Shapes, build_plan, parse_network, target_capabilities
from gen3r_export.tensorrt_inspect import inspect_network
from gen3r_export.tensorrt_library import RTX, RTX_CAPABILITIES, TENSORRT, Library, find_library
from gen3r_export.tensorrt_plan import inspect_plan
from tests.export.fake_tensorrt import host_gpu
from tests.export.tiny_onnx import tiny_graph, tiny_onnx

__all__ = ["host_gpu"]
PRODUCT = {"fp32": "float", "fp16": "half", "bf16": "bf16", "fp8": "fp8_e4m3"}


@pytest.fixture(scope="module")
def rtx() -> Library:
    return find_library(RTX)


def rtx_config(precision: str = "fp16", *numbers: str, **others: object) -> ExportConfig:
    chosen = numbers or (("89", "120") if precision == "fp8" else RTX_CAPABILITIES)
    return ExportConfig(format="tensorrt", precision=precision, capabilities=chosen, **others)  # type: ignore[arg-type]


def quiet(line: str) -> None:
    """Tells nobody."""


def test_wheels_are_found(rtx: Library) -> None:
    assert rtx.rtx and rtx.version.startswith("1.") and rtx.network_flags == 1
    assert not rtx.timing_cache and find_library(RTX) is rtx


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
def test_every_precision_builds_for_every_capability(tmp_path: Path, precision: str) -> None:
    told: list[str] = []
    file = tiny_onnx(tmp_path / "tiny.onnx", precision)
    config = rtx_config(precision, run=False)
    exported = build_tensorrt(file, tiny_graph(precision), tmp_path, config, told.append)
    assert exported.files == tuple(f"tiny.sm{n}.rtx.plan" for n in config.capabilities)
    assert exported.checked == {"layers": "passed", "run": "not run: not asked for"}
    assert set(exported.seconds) == {"parse", "build"} and not exported.errors
    for name, plan in exported.facts["plans"].items():
        assert plan["command"].startswith("tensorrt_rtx --onnx=tiny.onnx --noTF32")
        assert plan["bytes"] == (tmp_path / name).stat().st_size > 10_000
        inspection = plan["inspection"]
        assert inspection["products"] == {PRODUCT[precision]: 3}
        # The activation is fused, and in fp8 the Q/DQ pairs are.
        assert inspection["fused"] >= 1 and inspection["onnx_layers"] == (
            17 if precision == "fp8" else 5
        )
    assert json.loads(json.dumps(exported.facts)) == exported.facts
    network = exported.facts["network"]
    assert network["casts"] == {} and network["layers"]["convolution"] == 2
    assert network["quantised"] == (3 if precision == "fp8" else 0)
    assert sum("tensorrt_rtx --onnx=" in line for line in told) == len(exported.files)


def test_dynamic_axes_get_a_profile(tmp_path: Path) -> None:
    file = tiny_onnx(tmp_path / "tiny.onnx", dynamic=True)
    graph = tiny_graph(dynamic=True)
    shapes = Shapes(graph.name, graph.inputs, graph.dims).profile()
    assert shapes == {"x": ((1, 16, 4, 8, 8), (2, 16, 8, 8, 8), (4, 16, 12, 8, 8))}
    exported = build_tensorrt(file, graph, tmp_path, rtx_config("fp16", "89"), quiet)
    assert exported.checked == {"layers": "passed", "run": "not run: no GPU here"}
    command = trtexec_command(file, graph, rtx_config("fp16", "89", workspace_gib=2))
    for part in (
        "--minShapes=x:1x16x4x8x8 --optShapes=x:2x16x8x8x8 --maxShapes=x:4x16x12x8x8",
        "--memPoolSize=workspace:2048M",
        "--computeCapabilities=89 --saveEngine=tiny.sm89.rtx.plan --skipInference",
    ):
        assert part in command
    assert "timingCache" not in command and "stronglyTyped" not in command


def test_command_of_tensorrt_proper(tmp_path: Path, rtx: Library) -> None:
    proper = Library(TENSORRT, "11.0.0", rtx.module)
    config = ExportConfig(format="tensorrt", timing_cache=Path("kept.cache"), refit=True)
    command = trtexec_command(tmp_path / "a b.onnx", tiny_graph(), config, proper)
    assert command.startswith(f"trtexec '--onnx={tmp_path}/a b.onnx' --stronglyTyped --noTF32")
    assert command.endswith(
        "--timingCacheFile=kept.cache --refit --saveEngine=tiny.plan --skipInference"
    )


def test_casts_and_types_that_nobody_asked_for_are_found(tmp_path: Path, rtx: Library) -> None:
    trt = rtx.module
    file = tiny_onnx(tmp_path / "tiny.onnx")
    network = parse_network(rtx, file)
    assert inspect_network(network.network, file).problems("fp16") == []
    layer = network.network.get_layer(0)
    cast = network.network.add_cast(layer.get_output(0), trt.DataType.FLOAT)
    cast.name = "planted"
    assert inspect_network(network.network, file).problems("fp16") == [
        "cast that the ONNX file does not have: planted (half->float)"
    ]
    told: list[str] = []
    wide = tiny_onnx(tmp_path / "wide.onnx", wide_convolution=True)
    exported = build_tensorrt(wide, tiny_graph(), tmp_path, rtx_config("fp16", "89"), told.append)
    assert exported.checked["layers"] == "second computes in float, not in half"
    # TensorRT-RTX 1.7 rounds such a convolution's weights and computes it in half after all.
    (plan,) = exported.facts["plans"].values()
    assert plan["inspection"]["products"] == {"half": 3}
    assert exported.facts["network"]["casts"] == {"half->float": 1, "float->half": 1}
    assert any("second computes in float" in line for line in told)
    # A part that keeps products in float32 says how many.
    inspection = inspect_network(parse_network(rtx, wide).network, wide)
    assert inspection.problems("fp16", 1) == [] and len(inspection.problems("fp16", 2)) == 1
    assert inspection.problems("fp8", 1) == ["no product has quantised operands"]


def test_wrong_files(tmp_path: Path, rtx: Library) -> None:
    config = rtx_config("fp16", "89")
    with pytest.raises(ValueError, match=r"missing\.onnx does not exist; export it again"):
        build_tensorrt(tmp_path / "missing.onnx", tiny_graph(), tmp_path, config, quiet)
    file = tiny_onnx(tmp_path / "tiny.onnx")
    (tmp_path / "half.onnx").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half\.onnx is cut short"):
        build_tensorrt(tmp_path / "half.onnx", tiny_graph(), tmp_path, config, quiet)
    model = onnx.load(file)
    model.graph.node[0].op_type = "Convolve"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"cannot parse it: Convolve 'first': .*plugin") as found:
        parse_network(rtx, tmp_path / "other.onnx")
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"input x of the ONNX file is HALF .*of the graph FLOAT"):
        build_tensorrt(file, tiny_graph("fp32"), tmp_path, config, quiet)
    with pytest.raises(ValueError, match=r"\[1, 16, 4, 8, 8\], of the graph HALF \[-1, 16, -1"):
        build_tensorrt(file, tiny_graph(dynamic=True), tmp_path, config, quiet)
    with pytest.raises(ValueError, match=r"tiny\.onnx holds no text program"):
        inspect_plan(file)


@pytest.mark.parametrize(
    ("precision", "number", "text"),
    [
        ("fp16", "90", r"does not support compute capability 9\.0 .*TensorRT proper on that GPU"),
        ("fp16", "61", r"does not support compute capability 6\.1 \(known: 7\.5, 8\.0"),
        ("fp8", "86", r"compute capability 8\.6 has no 8-bit floats; use precision fp16"),
    ],
)
def test_capabilities_that_do_not_go(rtx: Library, precision: str, number: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        target_capabilities(rtx, rtx_config(precision, number), quiet)


def test_capabilities_without_a_gpu(rtx: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told: list[str] = []
    plain = ExportConfig(format="tensorrt", precision="fp16")
    assert target_capabilities(rtx, plain, told.append) == RTX_CAPABILITIES and not told
    fp8 = ExportConfig(format="tensorrt", precision="fp8")
    assert target_capabilities(rtx, fp8, told.append) == ("89", "120")
    assert told == ["fp8: not for 8.0, 8.6, which have no 8-bit floats"]
    assert preferred_library(plain).rtx
    proper = Library(TENSORRT, "10.13", rtx.module)
    with pytest.raises(ValueError, match="builds for the GPU at hand and there is none"):
        target_capabilities(proper, plain, quiet)
    with pytest.raises(ValueError, match="runs the plan, and there is no GPU here"):
        check_tensorrt(Path("x.onnx"), (), {}, plain, quiet)


def test_capabilities_with_a_gpu(rtx: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    plain = ExportConfig(format="tensorrt", precision="fp16")
    with pytest.raises(ValueError, match="use TensorRT proper"):
        target_capabilities(rtx, plain, quiet)
    proper = Library(TENSORRT, "10.13", rtx.module)
    assert target_capabilities(proper, plain, quiet) == (None,)
    assert target_capabilities(proper, rtx_config("fp16", "90"), quiet) == (None,)
    with pytest.raises(ValueError, match=r"builds for the GPU at hand only, not for .*'89'"):
        target_capabilities(proper, rtx_config("fp16", "89"), quiet)


def test_refusals_carry_the_reason(tmp_path: Path) -> None:
    """Without a driver RTX cannot build plans whose weights can be replaced."""
    file = tiny_onnx(tmp_path / "tiny.onnx")
    config = rtx_config("fp16", "89", refit=True)
    with pytest.raises(ValueError, match=r"tiny for 8\.9: tensorrt-rtx cannot build it: .*CUDA"):
        build_tensorrt(file, tiny_graph(), tmp_path, config, quiet)
    assert not list(tmp_path.glob("*.plan"))


def test_timing_cache_of_rtx_is_said_to_be_unused(tmp_path: Path) -> None:
    told: list[str] = []
    config = rtx_config("fp16", "89", timing_cache=tmp_path / "kept.cache")
    file = tiny_onnx(tmp_path / "tiny.onnx")
    build_tensorrt(file, tiny_graph(), tmp_path, config, told.append)
    assert any("is not used: TensorRT-RTX times nothing" in line for line in told)
    assert not (tmp_path / "kept.cache").exists()


def test_progress_and_interrupt(
    tmp_path: Path, rtx: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_onnx(tmp_path / "tiny.onnx")
    graph = tiny_graph()
    shapes = Shapes(graph.name, graph.inputs, graph.dims)
    parsed = parse_network(rtx, file)
    monkeypatch.setattr(tensorrt_messages, "TELL_EVERY", 0.0)
    told: list[str] = []
    build_plan(parsed, shapes, rtx_config("fp16", "89"), "89", told.append)
    assert told and all(line.startswith("tiny for 8.9: ") for line in told)

    def full(line: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        build_plan(parsed, shapes, rtx_config("fp16", "89"), "89", full)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_plan(
            *(parsed, shapes, rtx_config("fp16", "89"), "89"),
            lambda _: signal.raise_signal(signal.SIGINT),
        )
    assert signal.getsignal(signal.SIGINT) is before
    # Nothing of the stopped builds is left in the network.
    plan, _ = build_plan(parsed, shapes, rtx_config("fp16", "89"), "89", quiet)
    assert plan.nbytes > 10_000


def test_self_test_builds_runs_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_gpu: None
) -> None:
    """With onnxruntime in the place of the GPU."""
    from gen3r_export import tensorrt
    from gen3r_export.onnx_runner import open_onnx

    file, graph = tiny_onnx(tmp_path / "tiny.onnx", "fp32"), tiny_graph("fp32")
    opened: list[Path] = []

    def stand_in(plan: Path) -> OnnxRunner:
        opened.append(plan)
        return open_onnx(file)

    monkeypatch.setattr(tensorrt, "find_library", lambda *_: find_library(RTX))
    monkeypatch.setattr(tensorrt, "open_tensorrt", stand_in)
    config = ExportConfig(format="tensorrt", precision="fp32")
    found = check_tensorrt(file, graph.inputs, graph.dims, config, quiet)
    assert found.errors == {"y": 0.0} and found.problems == () and found.bytes > 10_000
    assert found.library.startswith("tensorrt-rtx 1.") and set(found.seconds) == {"build", "run"}
    assert opened[0].name == "tiny.sm89.rtx.plan" and not opened[0].exists()
    expected = (torch.full((1, 16, 4, 8, 8), 1e9),)
    found = check_tensorrt(file, graph.inputs, graph.dims, config, quiet, expected=expected)
    assert found.errors["y"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="tiny gives 1 outputs, 2 are expected"):
        check_tensorrt(file, graph.inputs, graph.dims, config, quiet, expected=expected * 2)
    # A build runs the plan of the GPU that is here and compares it with the module.
    done = build_tensorrt(file, graph, tmp_path, replace(config, run=True), quiet)
    assert done.files == ("tiny.sm89.rtx.plan",) and done.facts["ran"] == done.files[0]
    assert done.errors == {"same": 0.0, "float32": 0.0, "module": 0.0}
    with monkeypatch.context() as patched:
        patched.setattr("gen3r_export.onnx_check.measure", lambda *_: {"float32": 1.0, "module": 0})
        told: list[str] = []
        _, errors, text = tensorrt._run(graph, tmp_path, done.files, config, told.append)
    assert errors["float32"] == 1 and "on this GPU: wrong, it differs from float32" in text
    assert told == [f"tiny: {text}"]
    other = replace(config, capabilities=("80",))
    done = build_tensorrt(file, graph, tmp_path, other, quiet)
    assert done.checked["run"] == "not run: no plan for this GPU's capability 8.9"


def test_opening_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = tmp_path / "tiny.sm89.rtx.plan"
    with pytest.raises(ValueError, match="does not exist"):
        open_tensorrt(plan)
    plan.write_bytes(b"plan")
    with pytest.raises(ValueError, match="runs on an NVIDIA GPU only, and there is none"):
        open_tensorrt(plan)
    with pytest.raises(ValueError, match="device 'cpu' was asked; use the ONNX file"):
        open_tensorrt(plan, "cpu")


def test_sample_inputs_are_valid_and_seeded() -> None:
    graph: Graph = tiny_graph("bf16", dynamic=True)
    (x,) = sample_inputs(graph.inputs, {"batch": 3, "frames": 2})
    assert x.shape == (3, 16, 8, 8, 8) and x.dtype == torch.bfloat16
    (again,) = sample_inputs(graph.inputs, {"batch": 3, "frames": 2})
    assert torch.equal(x, again)
