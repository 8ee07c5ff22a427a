"""The engine on plans: what is matched, refused and told, and that results stay the same.

The files here are opened as the graphs' own modules, so that every part, form and shape is run
without exporting; tests/export/test_nano_onnx.py runs real ONNX files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gen3r_export.export as driver
import gen3r_export.runtime as runtime
from gen3r.nano import NANO, build_nano
from gen3r.scene import Scene, SceneRequest
from gen3r_engine import Engine, EngineConfig
from gen3r_engine.caches import CacheFolder
from gen3r_engine.cli.errors import UsageError, plan_errors
from gen3r_engine.events import SceneError
from gen3r_engine.plan_matching import Host, chunk_sizes
from gen3r_engine.planned import Chunks
from gen3r_engine.plans import EnginePlans
from gen3r_export.config import ExportConfig
from gen3r_export.export import load_model, run_export
from gen3r_export.graph import DTYPES, DimRange, Exported, Graph
from gen3r_export.manifest import Entry, Gpu, Manifest, read_manifest
from tests.engine.test_engine import FLOOR, pipeline
from tests.engine.test_engine import engine as engine_without_plans

CLIP, CHUNK = "clip", "chunk"
PARTS = {
    *("text_encoder", "image_encoder", "vae_encoder", "vae_decoder", "adapter_decoder"),
    *("camera_head", "depth_head", "point_head", "denoiser"),
}


class ModuleRunner:
    """A graph's own module as an open file, as strict with its inputs as files are."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.calls = graph, 0
        self.names_in = tuple(spec.name for spec in graph.inputs)
        self.names_out = tuple(spec.name for spec in graph.outputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = {name: x.shape for name, x in zip(self.names_in, inputs, strict=True)}
        runtime.axis_lengths(self.graph.inputs, self.graph.dims, shapes)
        for spec, x in zip(self.graph.inputs, inputs, strict=True):
            assert x.dtype == DTYPES[spec.dtype], spec.name
        self.calls += 1
        with torch.no_grad():
            return tuple(x.clone() for x in self.graph.module(*inputs))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Folders of all parts: clips of 5 frames, and chunks for 5 to 13 frames of 1 or 2 scenes."""
    runners: dict[str, ModuleRunner] = {}  # by the sha256 of the file
    folders = {name: tmp_path_factory.mktemp(name) for name in (CLIP, CHUNK)}
    configs = {
        CLIP: {"form": "clip", "frames": (5, 5)},
        CHUNK: {"form": "chunk", "frames": (5, 13), "batch": (1, 2)},
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, settings in configs.items():

            def work(graph: Graph, folder: Path, label: str = name, **named: Any) -> Exported:
                (folder / f"{graph.name}.onnx").write_text(f"{label} {graph.name}")
                runners[f"{label} {graph.name}"] = ModuleRunner(graph)
                return Exported((f"{graph.name}.onnx",))

            patched.setattr("gen3r_export.onnx.export_onnx", work)
            config = ExportConfig(out=folders[name], height=56, width=56, **settings)  # type: ignore[arg-type]
            run_export(lambda c=config: load_model(None, c), config, lambda line: None)  # type: ignore[misc]

    def open_plan(entry: Entry, folder: Path, device: str, *, verify: bool) -> ModuleRunner:
        runtime.check_files(entry, folder, verify=verify)
        return runners[(folder / entry.folder / entry.main_file).read_text()]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runtime, "open_plan", open_plan)
        yield {**folders, "runners": runners}


def request(frames: int = 5, **settings: Any) -> SceneRequest:
    photo = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    given: dict[str, Any] = {"prompt": "a red room", "cameras": "zoom_in", "seed": 1}
    size = {"num_frames": frames, "height": 56, "width": 56}
    return SceneRequest([photo], **(given | size | settings))


@cache
def load(folder: Path, **settings: Any) -> Engine:
    return Engine.load(None, EngineConfig(device="cpu", plans=folder, **settings))


def plain(*requests: SceneRequest, steps: int = 2, **settings: Any) -> list[Scene]:
    return pipeline()(requests=list(requests), num_inference_steps=steps, **settings)


def check_same(scene: Scene, expected: Scene, *more: str) -> None:
    """Equal up to rounding, which may move a pixel over the bounds of the mask."""
    assert (scene.rgb.int() - expected.rgb.int()).abs().max() <= 1
    assert (scene.mask != expected.mask).float().mean() < 1e-3
    for name in ("depth", "depth_confidence", "extrinsics", "intrinsics", "points", *more):
        ours, theirs = getattr(scene, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert (ours - theirs).abs().max() <= FLOOR * theirs.abs().max(), name


def forwards(engine: Engine) -> set[str]:
    """Names of the components of which any module runs from now on."""
    seen: set[str] = set()
    for name in ("text_encoder", "clip_image_encoder", "wan_vae", "geo_adapter", "transformer"):
        for module in getattr(engine.pipeline, name).modules():
            assert isinstance(module, nn.Module)
            module.register_forward_hook(lambda *a, name=name: seen.add(name))
    return seen


# ---------------------------------------------------------------------------------------- results


def test_a_scene_from_plans_of_clips(shipped: dict[str, Any]) -> None:
    engine = load(shipped[CLIP])
    seen = forwards(engine)
    (scene,) = engine.generate(request(), steps=2, point_maps=True)
    (expected,) = plain(request(), point_maps=True)
    check_same(scene, expected, "point_map", "point_confidence")
    assert scene.info["plans"] == {"used": dict.fromkeys(PARTS, "onnx fp32"), "without": {}}
    # The plans here are modules of another pipeline: of the engine's own none has run.
    assert not seen
    assert any(line == "plan vae_decoder (onnx fp32): used" for line in engine.notes)


def test_batches_and_chunks(shipped: dict[str, Any]) -> None:
    engine = load(shipped[CHUNK], max_batch=2)
    seen = forwards(engine)
    both = [request(13, seed=1), request(13, seed=2, prompt="")]
    scenes = engine.generate(both, steps=2)
    for scene, expected in zip(scenes, plain(*both), strict=True):
        check_same(scene, expected)
    assert not seen
    used = scenes[0].info["plans"]["used"]
    assert set(used) == PARTS, "point maps were not asked, and their plan fits"
    assert used["vae_decoder"].startswith("onnx fp32, in ")


def test_solvers_and_a_single_step(shipped: dict[str, Any]) -> None:
    engine = load(shipped[CLIP])
    for steps, solver in ((1, "euler"), (3, "unipc")):
        (scene,) = engine.generate(request(), steps=steps, solver=solver)
        check_same(scene, *plain(request(), steps=steps, solver=solver))


def test_parts_without_a_plan_run_in_process(shipped: dict[str, Any], tmp_path: Path) -> None:
    folder = some(shipped[CLIP], tmp_path, "vae_encoder", "depth_head", "adapter_decoder")
    engine = load(folder)
    seen = forwards(engine)
    (scene,) = engine.generate(request(), steps=2)
    check_same(scene, plain(request())[0])
    assert set(scene.info["plans"]["used"]) == {"vae_encoder", "depth_head", "adapter_decoder"}
    assert seen == {"text_encoder", "clip_image_encoder", "wan_vae", "transformer"}


def test_warming_up_runs_the_plans_of_the_step(shipped: dict[str, Any], tmp_path: Path) -> None:
    folder = some(shipped[CLIP], tmp_path, "denoiser_prepare", "denoiser_step")
    engine = load(folder)
    engine.warmth.enabled, engine.warmth.folder = True, CacheFolder(tmp_path / "cache")
    assert engine.plans is not None
    told: list[str] = []
    engine.plans.tell = told.append
    step = shipped["runners"][f"{CLIP} denoiser_step"]
    calls = step.calls
    engine.warm_up(5, 56)
    assert step.calls == calls + 2
    assert not told, "the made-up scene of the other stages is none that was asked for"
    (scene,) = engine.generate(request(), steps=1)
    assert scene.info["compile_cache"] == "none"
    assert not (tmp_path / "cache").exists(), "no code was compiled for this shape"


def some(folder: Path, out: Path, *names: str, **changes: Any) -> Path:
    """Another folder of some entries, with the same files."""
    manifest = read_manifest(folder)
    entries = [replace(e, **changes) for e in manifest.entries if not names or e.name in names]
    for entry in entries:
        if not (out / entry.folder).exists():
            (out / entry.folder).symlink_to(folder / entry.folder)
    (out / "plans.json").write_text(Manifest("some", tuple(entries)).to_json())
    return out


# ------------------------------------------------------------------------------ shapes of requests


def test_a_shape_that_no_plan_takes_is_told_and_runs(shipped: dict[str, Any]) -> None:
    engine, told = load(shipped[CLIP]), list[str]()
    assert engine.plans is not None
    engine.plans.tell = told.append
    stream = engine.stream(request(9), steps=1)
    size = "9 frames of 56 x 56, 1 at once: "
    assert f"{size}vae_decoder runs without its plan: it is for 5 frames of 56 x 56, 1 at once" in (
        told
    ), "before anything runs"
    (scene,) = stream
    without = {"vae_encoder", "vae_decoder", "adapter_decoder", "denoiser", "camera_head",
               "depth_head", "point_head"}  # fmt: skip
    assert set(scene.info["plans"]["without"]) == without
    assert set(scene.info["plans"]["used"]) == {"text_encoder", "image_encoder"}
    assert len(told) == len(without)
    engine.generate(request(9), steps=1)
    assert len(told) == len(without), "once for a shape"
    assert engine.notes[-1] == told[-1]


def test_denoiser_plans_are_for_guidance_and_their_batch(shipped: dict[str, Any]) -> None:
    plans = EnginePlans(shipped[CLIP], host(shipped))
    for batch, guided, reason in (
        (1, False, "it is for guidance above 1"),
        (2, True, "it is for 5 frames of 56 x 56, 1 at once"),
    ):
        assert plans.choose(5, 56, 56, batch, guided).without == {"denoiser": reason}
    (scene,) = load(shipped[CLIP]).generate(request(), steps=1, guidance=1.0)
    check_same(scene, *plain(request(), steps=1, guidance_scale=1.0))


def test_chunk_sizes(shipped: dict[str, Any]) -> None:
    entries = {entry.name: entry for entry in read_manifest(shipped[CHUNK]).entries}
    entry = entries["vae_decoder_next"]
    for least, most, count, expected in (
        (1, 3, 12, (3, 3, 3, 3)),
        (1, 3, 10, (3, 3, 2, 2)),
        (1, 5, 4, (4,)),
        (3, 4, 5, ()),
    ):
        dims = {**entry.dims, "frames": DimRange(least, most, most)}
        latents = replace(entry.inputs[0], shape=("batch", 16, "frames", 7, 7))
        changed = replace(entry, dims=dims, inputs=(latents, *entry.inputs[1:]))
        assert chunk_sizes(changed, "latents", count, 1) == expected
    fixed = replace(entry.inputs[0], shape=("batch", 16, 2, 7, 7))
    even = replace(entry, inputs=(fixed, *entry.inputs[1:]))
    assert chunk_sizes(even, "latents", 4, 1) == (2, 2)
    assert chunk_sizes(even, "latents", 5, 1) == (), "a chunk of one does not fit"


def test_chunks_need_both_graphs(shipped: dict[str, Any], tmp_path: Path) -> None:
    plans = EnginePlans(some(shipped[CHUNK], tmp_path, "vae_decoder_first"), host(shipped))
    without = plans.choose(5, 56, 56, 1, True).without
    assert without == {"vae_decoder": "vae_decoder_next is missing in the folder"}
    single = plans.choose(1, 56, 56, 1, True).vae_decoder
    assert isinstance(single, Chunks) and single.following is None, "one frame needs the first"


# ------------------------------------------------------------------------------------- refusals


def host(shipped: dict[str, Any], **settings: Any) -> Host:
    hashes = {e.component: e.weights for e in read_manifest(shipped[CLIP]).entries}
    given = {"hashes": hashes, "config": NANO, "device": torch.device("cpu")}
    return Host(**({**given, "dtype": torch.float32} | settings))


H100 = {"device": torch.device("cuda"), "gpu": "NVIDIA H100", "capability": "90"}


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({}, {}, None),
        ({"weights": "0123456789"}, {}, "holds other weights (01234567, this model's wan_vae is"),
        ({"device": "cuda"}, {}, "is for cuda, the engine runs on cpu; export it for cpu"),
        ({"device": "cpu"}, H100, "is for cpu, the engine runs on cuda"),
        ({"gpu": Gpu("89")}, H100, "built for sm_89, this GPU is sm_90 (NVIDIA H100); export on"),
        ({"gpu": Gpu("90", "NVIDIA H200")}, H100, "built for NVIDIA H200, this GPU is NVIDIA H100"),
        ({"gpu": Gpu("90", "NVIDIA H100")}, H100, None),
        ({"gpu": Gpu("90")}, H100, None),
        ({"format": "aoti", "versions": {"torch": "2.1.0"}}, {}, "built with torch 2.1.0, here is"),
        ({"format": "aoti", "versions": {"torch": torch.__version__}}, {}, None),
        ({"format": "onnx", "versions": {"torch": "2.1.0"}}, {}, None),
        ({"format": "tensorrt", "versions": {"tensorrt": "10.1"}}, {}, "no TensorRT found"),
        ({"part": "adapter_encoder"}, {}, "the engine encodes no token maps"),
        ({"part": "nose"}, {}, "part 'nose' is unknown to this version"),
        ({"part": "denoiser"}, {"preset": "fp8"}, "preset fp8 was asked, which the plan does not"),
        ({"part": "denoiser", "precision": "fp8"}, {"preset": "fp8"}, None),
        (
            {"part": "vae_encoder"},
            {"encoder_precision": "tf32"},
            "encoder precision tf32 was asked",
        ),
    ],
)
def test_what_fits_a_host(
    shipped: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    settings: dict[str, Any],
    reason: str | None,
) -> None:
    def absent(kind: str) -> Any:
        raise ValueError(
            "no TensorRT found (tensorrt: No module named 'tensorrt'); pip install ..."
        )

    monkeypatch.setattr("gen3r_export.tensorrt_library.find_library", absent)
    (entry,) = (e for e in read_manifest(shipped[CLIP]).entries if e.name == "vae_decoder")
    found = host(shipped, **settings).refuses(replace(entry, **changes))
    assert (found is None) if reason is None else (reason in str(found)), found


def test_another_version_of_tensorrt(
    shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        version = "10.13"

    monkeypatch.setattr("gen3r_export.tensorrt_library.find_library", lambda kind: Library)
    entry = read_manifest(shipped[CLIP]).entries[0]
    plan = replace(entry, format="tensorrt", versions={"tensorrt": "10.1", "torch": "1"})
    reason = host(shipped).refuses(plan)
    assert reason == "it was built with tensorrt 10.1, here is 10.13; export it with 10.13"


def damaged_folder(folder: Path, out: Path, damage: Callable[[Path], object]) -> Path:
    """One entry, its file copied and damaged."""
    (entry,) = (e for e in read_manifest(folder).entries if e.name == "vae_decoder")
    (out / entry.folder).mkdir()
    path = out / entry.folder / entry.main_file
    path.write_bytes((folder / entry.folder / entry.main_file).read_bytes())
    damage(path)
    (out / "plans.json").write_text(Manifest("one", (entry,)).to_json())
    return out


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it was cut short or changed"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "its sha256 is not that of"),
        (lambda path: path.unlink(), "is missing; copy the folder again"),
    ],
)
def test_damaged_files_are_refused_at_load(
    shipped: dict[str, Any], tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    plans = EnginePlans(damaged_folder(shipped[CLIP], tmp_path, damage), host(shipped))
    (line,) = plans.report
    assert line.startswith("vae_decoder (onnx fp32): refused: ") and reason in line
    assert len(plans) == 0
    assert plans.choose(5, 56, 56, 1, True).facts() == {"used": {}, "without": {}}


def test_the_best_of_several(shipped: dict[str, Any], tmp_path: Path) -> None:
    """The fastest format, then the model's own dtype, then the most exact one."""
    folder = some(shipped[CLIP], tmp_path, "camera_head")
    (entry,) = read_manifest(folder).entries
    made = [
        replace(entry, precision="fp16"),
        replace(entry, precision="bf16"),
        replace(entry, format="aoti", precision="fp16", versions={"torch": torch.__version__}),
        replace(entry, format="aoti", precision="fp32", weights="other"),
    ]
    (tmp_path / "plans.json").write_text(Manifest("several", tuple(made)).to_json())
    plans = EnginePlans(tmp_path, host(shipped))
    used = [line for line in plans.report if line.endswith(": used")]
    assert used == ["camera_head (aoti fp16): used"]
    assert plans.report[0].startswith("camera_head (aoti fp32): refused: it holds other weights")
    beside = "refused: not needed beside camera_head (aoti fp16)"
    assert plans.report[2:] == [f"camera_head (onnx {p}): {beside}" for p in ("bf16", "fp16")]
    onnx = (made[0], made[1])
    (tmp_path / "plans.json").write_text(Manifest("several", onnx).to_json())
    half = EnginePlans(tmp_path, host(shipped, dtype=torch.bfloat16))
    assert half.report[0] == "camera_head (onnx bf16): used", "the model's own"


def test_a_folder_without_plans_is_told_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no plans.json; give a folder that gen3r"):
        Engine.load("no/such/checkpoint", EngineConfig(device="cpu", plans=tmp_path))


def test_a_pipeline_in_memory(shipped: dict[str, Any], tmp_path: Path) -> None:
    """Matched by its values: the same as loaded, others refused."""
    folder = some(shipped[CLIP], tmp_path, "camera_head", "vae_decoder")
    model = build_nano()
    with torch.no_grad():
        model.wan_vae.model.conv2.bias += 0.1
    engine = Engine.of(model, EngineConfig(device="cpu", plans=folder))
    report = engine.plans.report if engine.plans else []
    assert report[1] == "camera_head (onnx fp32): used"
    assert report[0].startswith("vae_decoder (onnx fp32): refused: it holds other weights")


def test_a_plan_that_fails_fails_the_scene(shipped: dict[str, Any], tmp_path: Path) -> None:
    """It is not run without the plan instead."""
    engine = load(some(shipped[CLIP], tmp_path, "camera_head"))
    assert engine.plans is not None
    chosen = engine.plans.choose(5, 56, 56, 1, True)
    assert chosen.camera_head is not None

    def broken(*inputs: Tensor) -> tuple[Tensor, ...]:
        raise ValueError("camera_head.onnx fails in onnxruntime")

    object.__setattr__(chosen.camera_head, "runner", broken)
    with pytest.raises(
        SceneError, match=r"decode geometry.*camera_head.onnx fails in onnxruntime"
    ) as caught:
        engine.generate(request(), steps=1)
    with pytest.raises(UsageError, match="export it again, or leave it out"), plan_errors():
        raise caught.value
    other = SceneError((0,), "denoise", ValueError("something else"))
    with pytest.raises(SceneError), plan_errors():
        raise other


def test_text_features_of_a_plan_are_kept_apart(shipped: dict[str, Any], tmp_path: Path) -> None:
    """Under the plan's own name, so that they are found by engines with the same plan only."""
    plans = EnginePlans(some(shipped[CLIP], tmp_path, "text_encoder"), host(shipped))
    assert re.fullmatch(r"text_encoder\.onnx-fp32\.\w{12}", plans.text_identity)
    planned, without = load(shipped[CLIP]).prompts, engine_without_plans().prompts
    assert planned.fingerprint != without.fingerprint
    others = EnginePlans(some(shipped[CLIP], tmp_path, "camera_head"), host(shipped))
    assert others.text_identity == ""


def test_text_features_of_a_plan_that_is_not_used(shipped: dict[str, Any], tmp_path: Path) -> None:
    """Texts are encoded one at a time: a plan of two at once is open and names no features."""
    folder = some(shipped[CLIP], tmp_path, "text_encoder")
    (entry,) = read_manifest(folder).entries
    inputs = tuple(replace(spec, shape=(2, *spec.shape[1:])) for spec in entry.inputs)
    pairs = replace(entry, inputs=inputs, batch=(2, 2))
    (tmp_path / "plans.json").write_text(Manifest("pairs", (pairs,)).to_json())
    plans = EnginePlans(tmp_path, host(shipped))
    assert len(plans) == 1 and plans.folders == [entry.folder]
    assert plans.choose(5, 56, 56, 1, True).text_encoder is None
    assert plans.text_identity == ""


def test_module_level_names() -> None:
    assert driver.COMPONENT.keys() == PARTS | {"adapter_encoder"}
