"""The viewers: what they take from a folder; the page of one file and the server, in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.room import room
from gen3r.media import InputError
from gen3r.scene import Scene, SceneRequest
from gen3r_engine.cli import main
from gen3r_engine.fusion import FusionConfig
from gen3r_engine.outputs import OutputOptions, write_scene
from gen3r_engine.view.scene_folder import read_folder, read_ply
from gen3r_engine.view.scene_view import scene_view, within_reach
from gen3r_engine.view.server import MODES, SceneServer
from gen3r_engine.view.static_page import static_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BACKGROUND = np.array([18, 19, 22])  # of the page, where nothing is drawn
SIZE = (900, 600)


@cache
def scene() -> Scene:
    return room(5, 112, 112)


def request() -> SceneRequest:
    image = np.asarray(scene().rgb[0])
    return SceneRequest([image], "a </script> & room", num_frames=5, height=112, width=112)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a viewer reads."""
    options = OutputOptions(
        frozenset({"rgb", "points", "cameras", "npz"}), FusionConfig(voxel_size=0.05)
    )
    return write_scene(scene(), request(), tmp_path_factory.mktemp("view"), options).path


@pytest.fixture
def parts(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to take things away from."""
    return Path(shutil.copytree(folder, tmp_path / "parts"))


# ------------------------------------------------------------------------------------ what is shown


def test_view_holds_the_scene_by_frames() -> None:
    view = scene_view(scene(), "a room")
    kept = np.asarray(scene().mask).reshape(5, -1).sum(axis=1)
    assert view.starts is not None and view.starts.tolist() == [0, *np.cumsum(kept)]
    assert view.sureness is not None and not view.missing
    third = view.points[view.starts[2] : view.starts[3]]
    expected = np.asarray(scene().points)[2][np.asarray(scene().mask)[2]].astype(np.float32)
    np.testing.assert_array_equal(np.sort(third, axis=0), np.sort(expected, axis=0))
    assert view.sureness.min() == 0 and 95 < view.sureness.max() < 100
    assert (view.sureness < 30).mean() == pytest.approx(0.3, abs=0.05)


def test_fewer_points_are_the_same_share_of_every_frame() -> None:
    whole, thin = scene_view(scene()), scene_view(scene(), max_points=10_000)
    assert whole.starts is not None and thin.starts is not None
    assert 9_990 <= len(thin.points) <= 10_000
    ratio = np.diff(thin.starts) / np.diff(whole.starts)
    np.testing.assert_allclose(ratio, 10_000 / len(whole.points), rtol=0.01)
    with pytest.raises(ValueError, match="max_points 0"):
        scene_view(scene(), max_points=0)


def test_points_at_the_horizon_are_not_shown() -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(5000, 3)).astype(np.float32)
    points[:3] = 1e6
    assert np.flatnonzero(~within_reach(points)).tolist() == [0, 1, 2]
    assert within_reach(np.ones((4, 3), np.float32)).all()
    assert within_reach(np.zeros((0, 3), np.float32)).shape == (0,)


def test_folder_with_everything(folder: Path) -> None:
    view, direct = read_folder(folder), scene_view(scene(), request().prompt)
    np.testing.assert_array_equal(view.points, direct.points)
    np.testing.assert_array_equal(view.colors, direct.colors)
    assert view.title == request().prompt and view.count == 5 and not view.missing


def test_folder_without_arrays_names_what_is_missing(parts: Path) -> None:
    (parts / "scene.npz").unlink()
    view = read_folder(parts, max_points=500)
    assert view.starts is None and view.sureness is None and 0 < len(view.points) <= 500
    assert view.cameras is not None and len(view.cameras) == 5
    assert view.frames is not None and view.frames.shape == (5, 112, 112, 3)
    assert len(view.missing) == 1 and "no scene.npz" in view.missing[0]
    assert view.notes[0].startswith("500 of ")
    (parts / "rgb.mp4").write_bytes(b"not a video")
    (parts / "cameras.json").unlink()
    (parts / "prompts.txt").unlink()
    view = read_folder(parts)
    assert view.frames is None and view.cameras is None and view.count == 1
    assert [text.split(":")[0] for text in view.missing[1:]] == ["cameras", "frames"]
    assert "can not be decoded" in view.missing[2] and view.title == "parts"
    assert static_page(view)


def test_cameras_alone_say_how_large_frames_are(parts: Path) -> None:
    (parts / "scene.npz").unlink()
    (parts / "rgb.mp4").unlink()
    view = read_folder(parts)
    assert (view.height, view.width, view.count) == (112, 112, 5)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_bad_folders_are_told(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_folder(tmp_path / "gone")
    with pytest.raises(InputError, match=r"did you mean .*parts"):
        read_folder(tmp_path)
    damage(parts / "scene.npz")
    with pytest.raises(InputError, match=r"scene.npz is damaged"):
        read_folder(parts)
    np.savez(parts / "scene.npz", rgb=np.zeros(3))
    with pytest.raises(InputError, match="has no 'points'"):
        read_folder(parts)
    (parts / "scene.npz").unlink()
    damage(parts / "pcds.ply")
    with pytest.raises(InputError, match="cut off"):
        read_folder(parts)
    (parts / "pcds.ply").write_text("ply\nformat ascii 1.0\nend_header\n")
    with pytest.raises(InputError, match="not a binary little-endian PLY"):
        read_folder(parts)
    (parts / "pcds.ply").unlink()
    (parts / "sub").mkdir()
    with pytest.raises(InputError, match="make it with --outputs points,npz"):
        read_folder(parts / "sub")


def test_wrong_arrays_are_told(parts: Path) -> None:
    with np.load(parts / "scene.npz") as file:
        arrays = dict(file)
    for name, value, message in (
        ("mask", arrays["mask"][:, :3], "mask is"),
        ("rgb", arrays["rgb"].astype(float), "not uint8"),
        ("extrinsics", arrays["extrinsics"][:2], "2 cameras for 5 frames"),
    ):
        np.savez(parts / "scene.npz", **{**arrays, name: value})
        with pytest.raises(InputError, match=message):
            read_folder(parts)


def test_other_programs_ply(tmp_path: Path) -> None:
    rows = np.zeros(2, [("x", "<f8"), ("y", "<f8"), ("z", "<f8"), ("quality", "<f4")])
    rows["z"] = (1.5, np.nan)
    header = "ply\nformat binary_little_endian 1.0\ncomment by hand\nelement vertex 2\n"
    header += "".join(f"property double {n}\n" for n in "xyz") + "property float quality\n"
    header += "element face 0\nproperty list uchar int vertex_indices\nend_header\n"
    (tmp_path / "a.ply").write_bytes(header.encode() + rows.tobytes())
    points, colors = read_ply(tmp_path / "a.ply")
    assert points.tolist() == [[0, 0, 1.5]] and colors.tolist() == [[160] * 3]


# ----------------------------------------------------------------------------------------- the page


def script(page: str, name: str) -> str:
    found = re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return found[1]


def test_page_holds_the_points() -> None:
    view = scene_view(scene(), request().prompt, max_points=5000)
    page = static_page(view).decode("utf-8")
    content: dict[str, Any] = json.loads(script(page, "scene"))
    kind = np.dtype([("place", "<u2", 3), ("color", "u1", 3), ("sureness", "u1")])
    rows = np.frombuffer(base64.b64decode(script(page, "points")), kind)
    places = np.array(content["low"]) + rows["place"] / 65535 * np.array(content["extent"])
    half_a_step = np.array(content["extent"]) / 65535 / 2
    assert (np.abs(places - view.points) <= half_a_step + 1e-6).all()
    np.testing.assert_array_equal(rows["color"], view.colors)
    np.testing.assert_array_equal(rows["sureness"], view.sureness)
    assert content["count"] == len(rows) and content["frames"] == 5
    assert len(content["images"]) == len(content["cameras"]) == 5
    assert "<title>a &lt;/script&gt; &amp; room</title>" in page
    assert "{{" not in page.replace("=> ({", "") and page.count("</script>") == 3
    assert not re.search(r"""(src|href)=["']|https?://|import\(|fetch\(""", page)
    assert "default-src 'none'" in page


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    return found


def screenshot(address: str, tmp_path: Path, patience: int = 3000) -> NDArray[np.uint8]:
    """What a browser without a screen shows, uint8 [H, W, 3]; WebGL on the CPU."""
    picture = tmp_path / "shot.png"
    flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-dev-shm-usage"]
    flags += ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--virtual-time-budget={patience}"]
    flags += [f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={picture}"]
    done = subprocess.run(
        [browser(), *flags, address], capture_output=True, text=True, timeout=120, check=False
    )
    assert picture.is_file(), done.stderr
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def colored(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where something is drawn in the middle, right of the page's panel."""
    inner = picture[60:, 300:600].astype(int)
    return np.asarray(np.abs(inner - BACKGROUND).max(axis=-1) > 12)


def test_page_shows_points_in_a_browser(folder: Path, tmp_path: Path) -> None:
    browser()
    page = tmp_path / "page.html"
    assert main(["view", str(folder), "--static", str(page), "--max-points", "30000"]) == 0
    picture = screenshot(page.as_uri(), tmp_path)
    assert colored(picture).mean() > 0.15
    # The room's own colours: its green walls and the orange frustum of the first frame.
    inner = picture[:, 300:].astype(int)
    assert (inner[..., 1] > inner[..., 0] + 15).sum() > 3000
    assert (np.abs(inner - [255, 168, 80]).max(axis=-1) < 25).sum() > 20


def test_page_of_an_empty_cloud_opens(tmp_path: Path) -> None:
    empty = room(1, 56, 56)
    empty.mask[:] = False
    (tmp_path / "page.html").write_bytes(static_page(scene_view(empty)))
    shown = colored(screenshot((tmp_path / "page.html").as_uri(), tmp_path))
    assert shown.mean() < 0.2, "frusta and the frame, no points"


# --------------------------------------------------------------------------------------- the server


@pytest.fixture
def server(folder: Path) -> Iterator[SceneServer]:
    pytest.importorskip("viser", reason="viser is not installed")
    running = SceneServer(read_folder(folder, 20_000), port=18_080)
    yield running
    running.stop()


def test_server_answers_and_controls_work(server: SceneServer) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}", timeout=10) as answer:
        assert answer.status == 200 and b"<html" in answer.read().lower()
    clouds, view = server._clouds, server.view
    assert len(clouds) == len(server._frusta) == 5 and view.sureness is not None
    assert sum(len(cloud.points) for cloud in clouds) == len(view.points)

    def shown() -> list[bool]:
        server._update()
        return [cloud.visible for cloud in clouds]

    assert all(shown())
    server.frame.value, server.mode.value = 2, MODES[1]
    assert shown() == [True, True, True, False, False]
    server.mode.value = MODES[2]
    assert shown() == [False, False, True, False, False]
    assert [frustum.image is not None for frustum in server._frusta] == [f == 2 for f in range(5)]
    server.drop.value = 40
    shown()
    left = sum(len(cloud.points) for cloud in clouds)
    assert left == int((view.sureness >= 40).sum())
    server.size.value = 4.0
    shown()
    assert clouds[0].point_size == pytest.approx(2 * 2.0 * server.distance / 800.0)
    server.cameras.value = False
    shown()
    assert not any(frustum.visible for frustum in server._frusta)


@pytest.mark.slow
def test_server_page_shows_points_in_a_browser(server: SceneServer, tmp_path: Path) -> None:
    picture = screenshot(f"http://127.0.0.1:{server.port}", tmp_path, patience=6000)
    inner = picture[60:, 100:560].astype(int)
    colorful = inner.max(axis=-1) - inner.min(axis=-1) > 12  # dimmed while the page fades in
    assert colorful.sum() > 3000, "the room's green walls; the page itself is grey here"


def test_second_server_takes_the_next_port(server: SceneServer) -> None:
    other = SceneServer(server.view, port=server.port)
    assert other.port != server.port
    other.stop()


# ----------------------------------------------------------------------------------- command line


def test_command_serves_until_it_is_interrupted(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("viser", reason="viser is not installed")

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gen3r_engine.cli.view.wait_for_ctrl_c", interrupted)
    assert main(["view", str(folder), "--port", "18090"]) == 0
    shown = capsys.readouterr()
    port = re.search(r"http://127\.0\.0\.1:(\d+) ", shown.out)
    assert port is not None and f"ssh -L {port[1]}:127.0.0.1:{port[1]} " in shown.out
    assert shown.out.endswith("page closed\n") and shown.err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gone"], "gone is not a folder"),
        ([".", "--max-points", "0"], "--max-points 0 is below 1"),
        ([".", "--port", "70000"], "--port 70000 is no port"),
        (["."], "holds neither scene.npz nor pcds.ply"),
    ],
)
def test_bad_input_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["view", *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert message in shown.err


def test_without_viser_the_mend_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "viser", None)
    assert main(["view", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'gen3r-engine[view]'" in error and "--static" in error


def test_page_beside_the_scene(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (parts / "scene.npz").unlink()
    assert main(["view", str(parts), "--static"]) == 0
    shown = capsys.readouterr()
    assert f"page: {parts / 'view.html'} (" in shown.out and "not shown, points by" in shown.err
    assert (parts / "view.html").stat().st_size > 10_000
    assert not list(parts.glob(".*"))
