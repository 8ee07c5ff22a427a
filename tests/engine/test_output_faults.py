"""What goes wrong while a scene is written: nothing half there, the message says what was kept."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen3r.media import load_video
from gen3r.scene import Scene
from gen3r_engine import writing
from gen3r_engine.cli import main
from gen3r_engine.fusion import FusionConfig
from gen3r_engine.outputs import OUTPUTS, IncompleteScene, OutputOptions, write_scene
from gen3r_engine.view.scene_folder import read_folder, read_ply
from tests.conftest import REPOSITORY
from tests.engine.commands import process, run
from tests.engine.scenes import MadeEngine, made_scene
from tests.engine.test_outputs import request

ALL = OutputOptions(frozenset({"all"}), FusionConfig(voxel_size=0.05))
FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(error: BaseException) -> Callable[..., None]:
    """Writes half a file, then fails."""

    def write(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise error

    return write


def left(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def made(scene: Scene, folder: Path, options: OutputOptions = ALL) -> tuple[Path, dict[str, Any]]:
    """The folder of a scene that could be written whole, and its run.json."""
    written = write_scene(scene, request(), folder, options)
    return written.path, json.loads((written.path / "run.json").read_text())


# ----------------------------------------------------------------------------------- broken outputs


@pytest.mark.parametrize("error", [FULL, ValueError("no such thing"), MemoryError()])
def test_one_output_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(writing, "write_glb", failing(error))
    with pytest.raises(IncompleteScene) as raised:
        write_scene(made_scene(), request(), tmp_path, ALL)
    written = raised.value.written
    assert written is not None and list(written.failed) == ["glb"]
    text = str(raised.value)
    assert f"1 of {len(OUTPUTS)} outputs could not be written (glb: " in text
    assert f"kept in {written.path}: cameras.json, " in text
    assert not (written.path / "scene.glb").exists()
    assert {"pcds.ply", "scene.npz", "view.html", "transforms.json"} <= set(written.files)
    assert json.loads((written.path / "run.json").read_text())["failed"] == written.failed
    assert [p.parent for p in tmp_path.rglob("run.json")] == [written.path]


def test_what_needs_a_failed_part_fails_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fuse(*_: object) -> None:
        calls.append(1)
        raise MemoryError("15 million points")

    def write(folder: Path, frames: np.ndarray) -> None:
        folder.mkdir()
        (folder / "frame_00000.png").write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(writing, "fuse", fuse)
    with pytest.raises(IncompleteScene) as raised:
        write_scene(made_scene(), request(), tmp_path / "a", ALL)
    written = raised.value.written
    assert written is not None and len(calls) == 1, "fused once, told four times"
    assert set(written.failed) == {"points", "glb", "colmap", "colmap_text"}
    assert "ply_file_path" not in json.loads((written.path / "transforms.json").read_text())
    assert not (written.path / "sparse").exists() and "preview.png" in written.files
    monkeypatch.undo()
    monkeypatch.setattr(writing, "write_frames", write)
    with pytest.raises(
        IncompleteScene, match="colmap, colmap_text, nerfstudio: No space"
    ) as raised:
        write_scene(made_scene(), request(), tmp_path / "b", ALL)
    written = raised.value.written
    assert written is not None
    assert "images" not in written.files and "transforms.json" not in written.files


def test_interruption_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "write_glb", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_scene(made_scene(), request(), tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may grow beyond 40 kB, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield 40_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_do_not_fit_are_gone(tmp_path: Path, small_files: int) -> None:
    with pytest.raises(IncompleteScene, match="File too large") as raised:
        write_scene(made_scene(9, 112, 112), request(), tmp_path, ALL)
    written = raised.value.written
    assert written is not None
    assert {"npz", "points", "html", "glb"} <= set(written.failed)
    assert {"cameras.json", "run.json", "prompts.txt", "images"} <= set(written.files)
    names = left(written.path)
    assert "scene.npz" not in names and "pcds.ply" not in names and "view.html" not in names
    assert all((written.path / name).stat().st_size < small_files for name in names)
    assert left(tmp_path) == [str(written.path.relative_to(tmp_path) / name) for name in names]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with the given options; unmounted at the end."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted: list[bool] = []

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(True)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(disk: Callable[[str], Path]) -> None:
    folder = disk("size=160k")
    with pytest.raises(IncompleteScene, match="No space left on device") as raised:
        write_scene(made_scene(9, 112, 112), request(), folder, ALL)
    written = raised.value.written
    assert written is not None and "npz" in written.failed
    assert {"cameras.json", "run.json", "rgb.mp4"} <= set(written.files)
    assert len(load_video(written.path / "rgb.mp4")) == 9, "what is kept is whole"
    assert not [name for name in left(folder) if "scene.npz" in name]


def test_disk_without_any_room(disk: Callable[[str], Path]) -> None:
    folder = disk("size=8k")
    (folder / "other").write_bytes(bytes(8192))
    with pytest.raises(OSError, match="No space left on device"):
        write_scene(made_scene(), request(), folder, ALL)
    assert left(folder) == ["other"] and sorted(folder.iterdir()) == [folder / "other"]


def test_read_only_target_is_told_before_anything_runs(
    disk: Callable[[str], Path],
    here: Path,
    engine: MadeEngine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = disk("ro")
    assert run("--frame_path", "a.png", "--output_dir", str(folder / "out")) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: --output_dir {folder / 'out'} can not be written: ")
    assert "Read-only file system" in shown and shown.count("\n") == 1
    assert not engine.requests


# ------------------------------------------------------------------------------------- command line


def scenes_file(here: Path, count: int) -> None:
    lines = [json.dumps({"frame_path": "a.png", "seed": seed}) for seed in range(count)]
    (here / "scenes.jsonl").write_text("\n".join(lines))


def test_command_names_what_was_kept(
    here: Path,
    engine: MadeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(writing, "write_glb", failing(FULL))
    assert run("--frame_path", "a.png", "--outputs", "cameras,glb") == 1
    (folder,) = (here / "outputs" / "1view").iterdir()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "error: 1 of 2 outputs could not be written (glb: No space left on device); kept in "
        f"{folder.relative_to(here)}: cameras.json, prompts.txt, run.json"
    )
    assert run("--frame_path", "a.png", "--outputs", "glb", "--output_dir", "other") == 1
    assert capsys.readouterr().err.endswith("; nothing was kept\n")
    assert not (here / "other").exists()


def test_a_target_that_became_read_only(
    here: Path,
    engine: MadeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "outputs")

    def forget(folder: Path) -> None:
        monkeypatch.setattr("tempfile.mkdtemp", refuse)

    monkeypatch.setattr("gen3r_engine.cli.run.check_writable", forget)
    assert run("--frame_path", "a.png") == 1
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("error: the scene could not be written, nothing of it was kept: ")
    assert "Read-only file system" in text and not (here / "outputs").exists()


@pytest.mark.parametrize(("error", "most"), [(ValueError("odd"), 9), (FULL, 8)])
def test_many_scenes_go_on_unless_the_disk_fails(
    here: Path,
    engine: MadeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    most: int,
) -> None:
    scenes_file(here, 9)
    monkeypatch.setattr(writing, "write_glb", failing(error))
    assert run("--requests", "scenes.jsonl", "--outputs", "cameras,glb") == 1
    written = len(list(here.glob("outputs/*/*/cameras.json")))
    # The writer works behind the engine: a few scenes are under way when the disk fails.
    assert written == 9 if most == 9 else 1 <= written <= most
    assert not list(here.glob("outputs/*/*/scene.glb"))
    assert "1 of 2 outputs could not be written" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_tells_what_was_kept(
    here: Path,
    engine: MadeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    scenes_file(here, 3)

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), number)

    engine.raises, engine.fails_at = None, 2
    original = type(engine).stream

    def stream(self: MadeEngine, *args: Any, **settings: Any) -> Iterator[Scene]:
        for index, scene in enumerate(original(self, *args, **settings)):
            if index == 2:
                while len(list(here.glob("outputs/*/*/run.json"))) < 2:
                    signal.sigtimedwait([], 0.01)
                interrupt()
            yield scene

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(type(engine), "stream", stream)
    assert run("--requests", "scenes.jsonl") == code
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(list(here.glob("outputs/*/*/run.json"))) == 2
    text = "interrupted; 2 finished scenes kept in outputs; no unfinished result was left behind"
    assert capsys.readouterr().err.splitlines()[-1] == text
    assert not list(here.rglob(".*"))


@pytest.mark.slow
def test_terminated_process_leaves_nothing(tmp_path: Path) -> None:
    photo = str(REPOSITORY / "examples/1view/photo.jpg")
    flags = ["--frame_path", photo, "--steps", "100000", "--no-compile"]
    started = process("run", *flags, cwd=tmp_path, starter=subprocess.Popen, stderr=subprocess.PIPE)
    for line in started.stderr:
        if line.startswith("encode views"):  # denoising comes next
            started.send_signal(signal.SIGTERM)
            break
    rest = started.stderr.read()
    assert started.wait(timeout=60) == 143, rest
    assert rest.endswith("no unfinished result was left behind\n") and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- degenerate scenes


@pytest.mark.filterwarnings("ignore:no point of")
def test_a_scene_without_a_valid_point(tmp_path: Path) -> None:
    scene = made_scene()
    scene.mask[:] = False
    folder, record = made(scene, tmp_path)
    assert record["cloud"]["points"] == 0 and record["failed"] == {}
    assert record["cloud"]["counts"]["given"] == scene.mask.numel()
    assert record["cloud"]["counts"]["masked"] == scene.mask.numel()
    assert any(text.startswith("no valid points, the cloud is empty: ") for text in record["notes"])
    points, _ = read_ply(folder / "pcds.ply")
    assert points.shape == (0, 3)
    assert len(read_folder(folder).points) == 0
    assert (folder / "sparse" / "0" / "points3D.bin").read_bytes() == bytes(8)
    assert len(json.loads((folder / "transforms.json").read_text())["frames"]) == 5
    with Image.open(folder / "preview.png") as preview:
        assert preview.width == 1400


def test_broken_depth_and_cameras_are_dropped_and_counted(tmp_path: Path) -> None:
    scene = made_scene()
    broken = slice(10, 20)
    scene.depth[1, broken] = float("nan")
    scene.points[1, broken] = float("nan")
    scene.intrinsics[3, 0, 0] = float("inf")
    folder, record = made(scene, tmp_path)
    counts = record["cloud"]["counts"]
    assert counts["given"] == scene.mask.numel()
    assert counts["not_finite"] >= 10 * 56
    assert any("without a finite place" in text for text in record["notes"])
    assert any(text.startswith("1 frames have no usable camera") for text in record["notes"])
    assert np.isfinite(read_ply(folder / "pcds.ply")[0]).all()
    names = [f["file_path"] for f in json.loads((folder / "transforms.json").read_text())["frames"]]
    assert names == [f"images/frame_{i:05d}.png" for i in (0, 1, 2, 4)]
    cameras = json.loads((folder / "cameras.json").read_text(), parse_constant=pytest.fail)
    assert cameras["intrinsics"][3][0][0] is None
    view = read_folder(folder)
    assert view.cameras is not None and view.cameras.frames.tolist() == [0, 1, 2, 4]


@pytest.mark.filterwarnings("ignore:no point of")
@pytest.mark.parametrize("value", [2.0, 0.0, float("nan"), float("inf")])
def test_constant_depth(tmp_path: Path, value: float) -> None:
    scene = made_scene()
    scene.depth[:] = value
    points = scene.points * (value / scene.points[..., 2:])
    folder, record = made(dataclasses.replace(scene, points=points), tmp_path)
    assert record["failed"] == {}
    assert len(load_video(folder / "depth.mp4")) == 5
    with Image.open(folder / "depth" / "frame_00000.png") as image:
        assert set(np.unique(np.asarray(image))) == ({65535} if value == 2.0 else {0})


@pytest.mark.filterwarnings("ignore:no point of")
def test_no_usable_camera_at_all(tmp_path: Path) -> None:
    scene = made_scene()
    scene.extrinsics[:] = float("nan")
    folder, record = made(scene, tmp_path)
    assert record["failed"] == {}
    assert json.loads((folder / "transforms.json").read_text())["frames"] == []


def test_unwritable_page_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_scene(made_scene(), request(), here, OutputOptions(frozenset({"npz"}))).path
    (here / "file").write_text("")
    assert main(["view", str(folder), "--static", str(here / "file" / "page.html")]) == 1
    assert "can not be written" in capsys.readouterr().err
