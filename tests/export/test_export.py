"""The export's driver: what is placed, what is replaced, and what interrupts it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gen3r_export.export as driver
import gen3r_export.files as files
from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r_export.config import ExportConfig
from gen3r_export.export import Exports, Model, load_model, model_of, run_export
from gen3r_export.graph import Exported, Graph
from gen3r_export.manifest import read_manifest
from gen3r_export.runtime import Plans
from tests.export.made import double_graph, export_double, write_double

HASHES = {"vggt": "a" * 32}


@pytest.fixture(scope="module")
def pipeline() -> Gen3RPipeline:
    return build_nano()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two small graphs and an exporter that takes no time; what it is may be changed."""
    fakes: dict[str, Any] = {
        "export": export_double,
        "graphs": lambda: iter([double_graph("camera_head"), double_graph("depth_head")]),
    }
    monkeypatch.setattr(driver, "graphs", lambda pipeline, config: fakes["graphs"]())
    monkeypatch.setattr(
        "gen3r_export.onnx.export_onnx", lambda *a, **named: fakes["export"](*a, **named)
    )
    return fakes


def export(out: Path, pipeline: Gen3RPipeline, **settings: Any) -> Exports:
    config = ExportConfig(parts=("camera_head",), out=out, **settings)
    return run_export(lambda: Model(pipeline, HASHES, "nano"), config, lambda line: None)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_placed(tmp_path: Path, pipeline: Gen3RPipeline, fakes: dict[str, Any]) -> None:
    done = export(tmp_path / "new" / "plans", pipeline, batch=(1, 3))
    folder = tmp_path / "new" / "plans"
    manifest = read_manifest(folder)
    assert manifest == done.manifest and manifest.model == "nano"
    assert [entry.name for entry in manifest.entries] == ["camera_head", "depth_head"]
    entry = manifest.entries[0]
    assert (entry.component, entry.weights, entry.device) == ("vggt", HASHES["vggt"], "any")
    assert (entry.frames, entry.height, entry.batch) == ((17, 17), 112, (1, 3))
    assert entry.versions["torch"] == str(torch.__version__) and "onnx" in entry.versions
    assert (entry.errors, entry.checked) == ({"float32": 1e-7}, {"run": "passed"})
    assert listed(folder) == sorted({e.folder for e in manifest.entries} | {"plans.json"})
    assert listed(folder / entry.folder) == ["camera_head.onnx"], "nothing else comes along"
    assert (folder / entry.folder).stat().st_mode & 0o777 == 0o755
    (y,) = Plans(folder).open(entry, verify=True)(torch.ones(2, 4))
    assert torch.equal(y, 2 * torch.ones(2, 4))


def test_a_later_export_replaces_and_removes(
    tmp_path: Path, pipeline: Gen3RPipeline, fakes: dict[str, Any]
) -> None:
    before = export(tmp_path, pipeline).manifest
    (tmp_path / "notes.txt").write_text("mine")
    again = export(tmp_path, pipeline).manifest
    assert again == before, "the same content has the same place"

    def other(graph: Graph, folder: Path, **named: Any) -> Exported:
        return Exported(write_double(folder / f"{graph.name}.onnx", 3.0))

    fakes["export"] = other
    runner = Plans(tmp_path).open(before.entries[0])
    after = export(tmp_path, pipeline).manifest
    assert {e.folder for e in after.entries}.isdisjoint(e.folder for e in before.entries)
    assert listed(tmp_path) == sorted(
        {"notes.txt", "plans.json", *(e.folder for e in after.entries)}
    )
    assert runner(torch.ones(1, 4))[0][0, 0] == 2, "what is open stays as it was"
    (y,) = Plans(tmp_path).open(before.entries[0])(torch.ones(1, 4))
    assert y[0, 0] == 3, "a reader with the old manifest finds what stands in its place"
    other_shape = export(tmp_path, pipeline, frames=(5, 5)).manifest
    assert len(other_shape.entries) == 4, "another shape stands beside it"


def test_a_reader_is_not_disturbed(
    tmp_path: Path, pipeline: Gen3RPipeline, fakes: dict[str, Any]
) -> None:
    """Opening in a loop while the folder is exported into again and again, each time otherwise."""
    factor = iter(range(2, 100))

    def other(graph: Graph, folder: Path, **named: Any) -> Exported:
        return Exported(write_double(folder / f"{graph.name}.onnx", float(next(factor))))

    fakes["export"] = other
    export(tmp_path, pipeline)
    stop, errors, seen = threading.Event(), [], set()

    def read() -> None:
        while not stop.is_set():
            try:
                plans = Plans(tmp_path)
                runner = plans.open(plans.find("camera_head"), verify=True)
                seen.add(float(runner(torch.ones(1, 4))[0][0, 0]))
            except ValueError as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(15):
        export(tmp_path, pipeline)
    stop.set()
    reader.join()
    assert not errors and len(seen) > 1


# ---------------------------------------------------------------------------------- interruptions


def interrupting(*names: str) -> Callable[..., Exported]:
    """An exporter that is stopped in the middle of the file of these graphs."""

    def work(graph: Graph, folder: Path, **named: Any) -> Exported:
        if graph.name in names:
            (folder / f"{graph.name}.onnx").write_bytes(b"half")
            raise KeyboardInterrupt
        return export_double(graph, folder, **named)

    return work


def test_interrupted_in_the_first_graph(
    tmp_path: Path, pipeline: Gen3RPipeline, fakes: dict[str, Any]
) -> None:
    fakes["export"] = interrupting("camera_head")
    with pytest.raises(KeyboardInterrupt) as stop:
        export(tmp_path / "a" / "b", pipeline)
    assert listed(tmp_path) == [], "folders that were made for it go too"
    assert not getattr(stop.value, "__notes__", None)


def test_interrupted_in_the_second_graph(
    tmp_path: Path, pipeline: Gen3RPipeline, fakes: dict[str, Any]
) -> None:
    fakes["export"] = interrupting("depth_head")
    with pytest.raises(KeyboardInterrupt) as stop:
        export(tmp_path, pipeline)
    assert stop.value.__notes__ == [f"1 finished graphs kept in {tmp_path}"]
    (entry,) = read_manifest(tmp_path).entries
    assert entry.name == "camera_head" and listed(tmp_path) == [entry.folder, "plans.json"]


@pytest.mark.parametrize("place", ["rename", "replace", "fsync"])
def test_interrupted_while_placing(
    tmp_path: Path,
    pipeline: Gen3RPipeline,
    fakes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """Whichever system call the signal comes in: the manifest is the old one, and nothing lies
    beside what it names."""
    before = export(tmp_path, pipeline).manifest
    fakes["export"] = lambda graph, folder, **named: Exported(
        write_double(folder / f"{graph.name}.onnx", 3.0)
    )

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, place, stopped)
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path, pipeline)
    assert read_manifest(tmp_path) == before
    assert listed(tmp_path) == sorted({"plans.json", *(e.folder for e in before.entries)})
    for entry in before.entries:
        Plans(tmp_path).open(entry, verify=True)


def test_interrupted_right_behind_the_replacement(
    tmp_path: Path,
    pipeline: Gen3RPipeline,
    fakes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """plans.json names the new graph already: it stays."""
    export(tmp_path, pipeline)
    fakes["export"] = lambda graph, folder, **named: Exported(
        write_double(folder / f"{graph.name}.onnx", 3.0)
    )
    replace_file = os.replace

    def stopped(*arguments: Any) -> None:
        replace_file(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path, pipeline)
    entries = read_manifest(tmp_path).entries
    assert listed(tmp_path) == sorted({"plans.json", *(e.folder for e in entries)})
    runners = {e.name: Plans(tmp_path).open(e, verify=True) for e in entries}
    assert float(runners["camera_head"](torch.ones(1, 4))[0][0, 0]) == 3


def test_what_a_killed_export_left_goes_with_the_next(
    tmp_path: Path, pipeline: Gen3RPipeline, fakes: dict[str, Any]
) -> None:
    (tmp_path / ".export-abc").mkdir()
    (tmp_path / ".export-abc" / "half.onnx").write_bytes(b"half")
    (tmp_path / ".export-abd").write_text("half a manifest")
    (tmp_path / "vae_decoder.onnx-fp32.0123456789ab").mkdir()  # placed and never named
    done = export(tmp_path, pipeline)
    assert listed(tmp_path) == sorted({"plans.json", *(e.folder for e in done.manifest.entries)})


# -------------------------------------------------------------------------------------- refusals


def test_two_exports_into_one_folder(
    tmp_path: Path, pipeline: Gen3RPipeline, fakes: dict[str, Any]
) -> None:
    def second() -> Iterator[Graph]:
        with pytest.raises(ValueError, match=r"another export is writing .*; wait for it"):
            export(tmp_path, pipeline)
        yield double_graph()

    fakes["graphs"] = second
    assert len(export(tmp_path, pipeline).entries) == 1


def test_a_graph_that_fails_does_not_stop_the_others(
    tmp_path: Path, pipeline: Gen3RPipeline, fakes: dict[str, Any]
) -> None:
    def work(graph: Graph, folder: Path, **named: Any) -> Exported:
        if graph.name == "camera_head":
            raise ValueError("camera_head has an operator that must not be")
        return export_double(graph, folder, **named)

    fakes["export"] = work
    done = export(tmp_path, pipeline)
    assert done.failed == {"camera_head": "camera_head has an operator that must not be"}
    assert [entry.name for entry in done.entries] == ["depth_head"]


def test_folders_that_cannot_be(
    tmp_path: Path,
    pipeline: Gen3RPipeline,
    fakes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(ValueError, match="is not a folder; give another folder"):
            export(out, pipeline)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "_sync", full)
        with pytest.raises(
            ValueError, match=r"cannot be written \(No space left on device\); make"
        ):
            export(tmp_path / "full", pipeline)
    assert listed(tmp_path) == ["file"]
    (tmp_path / "plans.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        export(tmp_path, pipeline)


def test_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Model:
        raise AssertionError("loaded")

    def absent(*packages: str) -> None:
        raise ValueError("onnx is not installed; pip install 'gen3r-engine[onnx]'")

    config = ExportConfig(parts=("nose",), out=tmp_path / "x")
    with pytest.raises(ValueError, match="parts nose are unknown; known: text_encoder"):
        run_export(load, config, print)
    monkeypatch.setattr("gen3r_export.onnx_runner.need", absent)
    with pytest.raises(ValueError, match="pip install 'gen3r-engine"):
        run_export(load, ExportConfig(out=tmp_path / "x"), print)
    assert listed(tmp_path) == []
    with pytest.raises(ValueError, match="there is no CUDA GPU; use device 'cpu'"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        load_model(None, ExportConfig(device="cuda", format="aoti"))


# ------------------------------------------------------------------------------- loading, targets


def test_only_the_weights_of_the_parts_are_read(pipeline: Gen3RPipeline) -> None:
    model = load_model(None, ExportConfig(parts=("camera_head",)))
    whole = model_of(pipeline)
    assert model.name == "embedded"
    assert model.hashes == {n: whole.hashes[n] for n in ("transformer", "geo_adapter", "vggt")}
    assert model.pipeline.text_encoder.shared.weight.is_meta
    assert not any(p.is_meta for p in model.pipeline.vggt.parameters())


def test_one_entry_for_every_gpu_that_plans_were_built_for(
    tmp_path: Path,
    pipeline: Gen3RPipeline,
    fakes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []

    def build(file: Path, graph: Graph, folder: Path, **named: Any) -> Exported:
        given.append(file)
        names = tuple(f"{graph.name}.sm{n}.rtx.plan" for n in (89, 120))
        for name in names:
            (folder / name).write_bytes(name.encode())
        plans = {name: {"seconds": float(i)} for i, name in enumerate(names, 1)}
        facts = {"versions": {"tensorrt-rtx": "1.7"}, "plans": plans, "ran": names[0]}
        return Exported(
            names,
            {"parse": 1.0, "build": 3.0},
            {"float32": 1e-7},
            {"layers": "passed", "run": f"{names[0]} on this GPU"},
            facts,
        )

    fakes["graphs"] = lambda: iter([double_graph()])
    monkeypatch.setattr("gen3r_export.tensorrt.build_tensorrt", build)
    monkeypatch.setattr("gen3r_export.tensorrt.preferred_library", lambda config: None)
    entries = export(tmp_path, pipeline, format="tensorrt").entries
    assert [entry.format for entry in entries] == ["onnx", "tensorrt", "tensorrt"]
    assert [entry.gpu and entry.gpu.capability for entry in entries] == [None, "89", "120"]
    assert [entry.main_file for entry in entries[1:]] == [
        "camera_head.sm89.rtx.plan",
        "camera_head.sm120.rtx.plan",
    ]
    assert given == [tmp_path / entries[0].folder / "camera_head.onnx"]
    assert entries[1].device == "cuda" and entries[1].versions["tensorrt-rtx"] == "1.7"
    assert "versions" not in entries[1].facts
    for index, entry in enumerate(entries[1:], 1):
        assert entry.seconds == {"parse": 1.0, "build": float(index)}, "of its own plan"
        assert list(entry.facts["plans"]) == [entry.main_file]
    assert [bool(entry.errors) for entry in entries[1:]] == [True, False]
    assert entries[2].checked["run"] == f"not run: {entries[1].main_file} was, on this GPU"
