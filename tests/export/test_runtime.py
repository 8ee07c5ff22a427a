"""Opening exported files: without the model's code, verified, and what may be wrong with them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gen3r_export.graph import DimRange, TensorSpec
from gen3r_export.manifest import Entry
from gen3r_export.runtime import Plans, axis_lengths, open_plan
from tests.conftest import REPOSITORY
from tests.engine.commands import environment
from tests.export.made import made_entry, made_folder

WITHOUT_THE_MODEL = """
import sys, torch

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gen3r", "gen3r_kernels", "gen3r_engine", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from gen3r_export.runtime import Plans
plans = Plans(sys.argv[1])
runner = plans.open(plans.find("camera_head"), verify=True)
print(runner.names_in, runner.names_out, runner(torch.ones(2, 4))[0].sum().item())
"""
MODEL_FREE = (
    *("runtime", "manifest", "files", "graph", "compare", "config"),
    *("onnx_runner", "tensorrt_run", "tensorrt_library", "aoti_package"),
)


def opened(folder: Path, entry: Entry, **settings: object) -> None:
    open_plan(entry, folder, **settings)  # type: ignore[arg-type]


def test_runs_without_the_models_code(tmp_path: Path) -> None:
    made_folder(tmp_path, made_entry(tmp_path))
    command = [sys.executable, "-c", WITHOUT_THE_MODEL, str(tmp_path)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert found.stdout.strip() == "('x',) ('y',) 16.0", found.stderr


@pytest.mark.parametrize("name", MODEL_FREE)
def test_modules_that_import_no_model(name: str) -> None:
    source = (REPOSITORY / "export" / "gen3r_export" / f"{name}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for imported in names:
            assert imported.split(".")[0] not in ("gen3r", "gen3r_kernels"), imported
            if imported.startswith("gen3r_export."):
                assert imported.split(".")[1] in (*MODEL_FREE, "tensorrt_messages"), imported


def test_finding(tmp_path: Path) -> None:
    entry = made_entry(tmp_path)
    half = made_entry(tmp_path, precision="fp16")
    plans = Plans(made_folder(tmp_path, entry, half))
    assert plans.find("camera_head", precision="fp16") == half
    with pytest.raises(
        ValueError, match=r"several entries are 'camera_head' in .*: camera_head \("
    ):
        plans.find("camera_head")
    with pytest.raises(ValueError, match=r"no entry is 'nose' in .*; there are: camera_head"):
        plans.find("nose")


def test_truncated(tmp_path: Path) -> None:
    entry = made_entry(tmp_path)
    path = tmp_path / entry.folder / entry.main_file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"has \d+ bytes, plans.json says \d+: it was cut short"):
        opened(tmp_path, entry)


def test_edited(tmp_path: Path) -> None:
    """The same size: only the hash tells, where it is asked for."""
    entry = made_entry(tmp_path)
    path = tmp_path / entry.folder / entry.main_file
    data = path.read_bytes()
    path.write_bytes(data.replace(b"double", b"triple"))
    opened(tmp_path, entry)
    with pytest.raises(
        ValueError, match=r"was changed: its sha256 is not that of plans.json; copy"
    ):
        opened(tmp_path, entry, verify=True)


def test_missing_weights_beside_the_graph(tmp_path: Path) -> None:
    entry = made_entry(tmp_path, external=True)
    assert list(entry.files) == ["camera_head.onnx", "camera_head.onnx.data"]
    opened(tmp_path, entry, verify=True)
    (tmp_path / entry.folder / "camera_head.onnx.data").unlink()
    with pytest.raises(
        ValueError, match=r"camera_head.onnx.data is missing; copy the folder again"
    ):
        opened(tmp_path, entry)


def test_replaced_by_an_export_of_other_weights(tmp_path: Path) -> None:
    plans = Plans(made_folder(tmp_path, made_entry(tmp_path, place="old")))
    entry = plans.find("camera_head")
    made_folder(tmp_path, made_entry(tmp_path, 3.0, place="new"))
    (tmp_path / "old" / entry.main_file).unlink()
    assert plans.open(entry)(torch.ones(1, 4))[0][0, 0] == 3
    made_folder(tmp_path, made_entry(tmp_path, 3.0, place="newer", weights="others"))
    with pytest.raises(ValueError, match="was replaced by an export of other weights; read the"):
        plans.open(entry)


def test_another_device_and_format(tmp_path: Path) -> None:
    entry = made_entry(tmp_path, device="cuda")
    with pytest.raises(ValueError, match="is for cuda, not for cpu; export it for cpu"):
        opened(tmp_path, entry)
    entry = made_entry(tmp_path, format="openvino")
    with pytest.raises(ValueError, match="format 'openvino', which this version does not know"):
        opened(tmp_path, entry)


def test_wrong_shapes_are_told_with_what_is_right(tmp_path: Path) -> None:
    runner = open_plan(made_entry(tmp_path), tmp_path)
    with pytest.raises(ValueError, match=r"input 'x' of camera_head.onnx has shape \(2, 5\)"):
        runner(torch.ones(2, 5))
    with pytest.raises(ValueError, match="is float16; it must be float32"):
        runner(torch.ones(2, 4, dtype=torch.float16))


SPECS = (
    TensorSpec("latents", ("batch", 16, "k+1"), "float32"),
    TensorSpec("text", ("2*batch", "6*k+6"), "float32"),
)
DIMS = {"batch": DimRange(1, 1, 4), "k": DimRange(1, 2, 4)}


def test_axis_lengths() -> None:
    shapes = {"latents": (2, 16, 4), "text": (4, 24)}
    assert axis_lengths(SPECS, DIMS, shapes) == {"batch": 2, "k": 3}
    for wrong in (
        {"latents": (2, 16, 6)},  # k beyond its range
        {"latents": (5, 16, 4)},
        {"latents": (2, 15, 4)},
        {"latents": (2, 16)},
        {"text": (3, 24)},  # no even number
        {"latents": (2, 16, 4), "text": (6, 24)},  # another batch
        {"latents": (2, 16, 4), "text": (4, 18)},  # another k
    ):
        with pytest.raises(ValueError, match=r"does not fit \[.*batch 1 to 4, k 1 to 4"):
            axis_lengths(SPECS, DIMS, wrong)
    with pytest.raises(ValueError, match="there is no input 'x'; there are: latents, text"):
        axis_lengths(SPECS, DIMS, {"x": (1,)})
