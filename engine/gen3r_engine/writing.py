"""The parts of one scene's folder: each is written alone, so that one that fails costs no other.

What a part had written before it failed is removed: a file that is there is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from gen3r.scene import Cameras, ImageLike, Scene, SceneRequest
from gen3r.writers import masked_cloud, save_video, scene_arrays, write_cameras
from gen3r_engine.depth_colors import depth_colors
from gen3r_engine.formats import colmap, nerfstudio
from gen3r_engine.formats.cameras import FrameCameras, frame_cameras
from gen3r_engine.formats.depth_png import write_depth_png
from gen3r_engine.formats.frames import write_frames
from gen3r_engine.formats.glb import write_glb
from gen3r_engine.formats.ply import write_cloud
from gen3r_engine.fusion import FusionConfig, PointCloud, fuse
from gen3r_engine.npz import write_npz
from gen3r_engine.preview import PreviewContent, contact_sheet
from gen3r_engine.view.scene_view import scene_view
from gen3r_engine.view.static_page import static_page

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

FUSED = frozenset({"points", "glb", "colmap", "colmap_text", "nerfstudio"})  # need the fused cloud
_COARSE_STEP = 0.01  # of the median depth: a depth PNG coarser than this is told


class Once(Generic[T]):
    """A value made when first asked for; the error of making it is raised again every time."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._error: Exception | None = None

    def __call__(self) -> T:
        if self._error is not None:
            raise self._error
        if not self._made:
            try:
                self._made.append(self._make())
            except Exception as error:
                self._error = error
                raise
        return self._made[0]

    @property
    def value(self) -> T | None:
        """The value if it has been made."""
        return self._made[0] if self._made else None


@dataclass(frozen=True)
class Part:
    """One output: what it makes in the folder, and how."""

    makes: tuple[str, ...]
    write: Callable[[], None]


class SceneWriter:
    """Writes the parts of one scene into a folder and times them.

    After `write_all`: seconds by stage, notes for the person, errors by output, and the cloud as it
    was fused (None when nothing asked for it).
    """

    def __init__(
        self,
        scene: Scene,
        request: SceneRequest,
        outputs: frozenset[str],
        fusion: FusionConfig,
        folder: Path,
        config: Mapping[str, Any],
    ) -> None:
        self.scene, self.request, self.outputs = scene, request, outputs
        self.fusion, self.folder, self.config = fusion, folder, config
        self.rgb = np.asarray(scene.rgb)
        self.height, self.width = self.rgb.shape[1:3]
        self.notes: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.seconds: dict[str, float] = {}
        self._cloud = Once(self._fuse)
        self._depth = Once(lambda: depth_colors(np.asarray(scene.depth)))
        self._cameras = Once(self._usable_cameras)
        self._images = Once(lambda: self._whole("images", self._write_images))
        self._model = Once(self._colmap_model)

    @property
    def cloud(self) -> PointCloud | None:
        """The fused cloud, if one was made."""
        return self._cloud.value

    def write_all(self, progress: Progress) -> None:
        """Write every part that is asked for. OSError when not even the prompt can be written."""
        (self.folder / "prompts.txt").write_text(self.request.prompt + "\n", encoding="utf-8")
        chosen = {name: part for name, part in self._parts().items() if name in self.outputs}
        if FUSED & chosen.keys() and self.scene.cloud is None:
            self._timed("fuse points", progress, self._attempt_fuse)
        for name, part in chosen.items():
            self._timed(f"write {name}", progress, partial(self._attempt, name, part))
        for name in self.errors:
            del self.seconds[f"write {name}"]
        for empty in ("sparse/0", "sparse"):  # a model whose files failed
            with contextlib.suppress(OSError):
                (self.folder / empty).rmdir()

    def _timed(self, stage: str, progress: Progress, work: Callable[[], None]) -> None:
        progress(stage, 0, 1)
        start = time.perf_counter()
        work()
        self.seconds[stage] = time.perf_counter() - start
        progress(stage, 1, 1)

    def _attempt(self, name: str, part: Part) -> None:
        try:
            part.write()
        except Exception as error:
            self.errors[name] = error
        finally:
            if name in self.errors:
                for made in part.makes:
                    remove(self.folder / made)

    def _attempt_fuse(self) -> None:
        with contextlib.suppress(Exception):  # every part that needs the cloud raises it again
            self._cloud()

    def _parts(self) -> dict[str, Part]:
        """All that can be written, what is small and dear first."""
        scene, folder = self.scene, self.folder
        return {
            "cameras": Part(
                ("cameras.json",),
                lambda: write_cameras(folder / "cameras.json", scene.extrinsics, scene.intrinsics),
            ),
            "rgb": Part(("rgb.mp4",), lambda: save_video(self.rgb, folder / "rgb.mp4")),
            "depth": Part(("depth.mp4",), lambda: save_video(self._depth(), folder / "depth.mp4")),
            "points": Part(("pcds.ply",), self._points),
            "preview": Part(("preview.png",), self._preview),
            "glb": Part(("scene.glb",), self._glb),
            "colmap": Part(_MODEL_FILES["bin"], lambda: self._colmap(colmap.write_binary)),
            "colmap_text": Part(_MODEL_FILES["txt"], lambda: self._colmap(colmap.write_text)),
            "nerfstudio": Part(("transforms.json",), self._nerfstudio),
            "depth_png": Part(("depth",), self._depth_png),
            "html": Part(("view.html",), self._page),
            "npz": Part(
                ("scene.npz",), lambda: write_npz(folder / "scene.npz", scene_arrays(scene))
            ),
        }

    # ----------------------------------------------------------------------------- what parts share

    def _fuse(self) -> PointCloud:
        cloud = self.scene.cloud
        if cloud is None:
            try:
                cloud = fuse(self.scene, self.fusion)
            except ValueError as error:
                # A scene that took minutes is not thrown away because its cloud is too wide for the
                # grid (a field of view near 180 degrees does that): it is saved at full density.
                self.notes.append(f"the cloud is not thinned out: {error}")
                cloud = fuse(self.scene, dataclasses.replace(self.fusion, voxel_size=None))
        broken = cloud.counts.get("not_finite", 0)
        if broken:
            self.notes.append(f"{broken} points without a finite place were left out of the cloud")
        if not len(cloud):
            counts = ", ".join(
                f"{number} {name}" for name, number in cloud.counts.items() if number
            )
            self.notes.append(f"no valid points, the cloud is empty: {counts}")
        return cloud

    def _usable_cameras(self) -> FrameCameras:
        cameras = frame_cameras(self.scene.extrinsics, self.scene.intrinsics)
        missing = sorted(set(range(len(self.rgb))) - set(cameras.frames.tolist()))
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            self.notes.append(
                f"{len(missing)} frames have no usable camera (NaN or infinity, no focal length, "
                f"no rotation) and are left out of camera files: {shown}"
            )
        return cameras

    def _whole(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a folder that several parts share; gone again when that fails."""
        try:
            write(self.folder / name)
        except Exception:
            remove(self.folder / name)
            raise

    def _write_images(self, folder: Path) -> None:
        write_frames(folder, self.rgb)

    def _colmap_model(self) -> colmap.ColmapModel:
        cloud = self._cloud()
        depth = np.asarray(self.scene.depth)
        model = colmap.colmap_model(cloud.points, cloud.colors, self._cameras(), depth)
        if model.left_out:
            self.notes.append(f"{model.left_out} points that no frame sees are not in sparse/0")
        if model.thinned:
            number, whole = len(cloud) - model.thinned, len(cloud)
            self.notes.append(f"sparse/0 holds {number} of {whole} points; pcds.ply holds all")
        return model

    # ------------------------------------------------------------------------------------ the parts

    def _points(self) -> None:
        write_cloud(self.folder / "pcds.ply", self._cloud())

    def _glb(self) -> None:
        path, cameras = self.folder / "scene.glb", self._cameras()
        write_glb(path, self._cloud(), cameras, self.height, self.width)

    def _colmap(self, write: Callable[[colmap.ColmapModel, Path], None]) -> None:
        self._images()
        folder = self.folder / "sparse" / "0"
        folder.mkdir(parents=True, exist_ok=True)
        write(self._model(), folder)

    def _nerfstudio(self) -> None:
        self._images()
        content = nerfstudio.transforms(
            self._cameras(),
            self.height,
            self.width,
            images="images",
            cloud="pcds.ply" if (self.folder / "pcds.ply").exists() else None,
        )
        nerfstudio.write_transforms(self.folder / "transforms.json", content)

    def _depth_png(self) -> None:
        scale = write_depth_png(self.folder / "depth", np.asarray(self.scene.depth))
        if scale.scale > _COARSE_STEP * scale.median > 0:
            self.notes.append(
                f"one step of the depth PNGs is {scale.scale:.3g} where the median depth is "
                f"{scale.median:.3g}: a few depths are very large; scene.npz holds them exactly"
            )

    def _page(self) -> None:
        view = scene_view(self.scene, self.request.prompt)
        self.notes += view.notes
        (self.folder / "view.html").write_bytes(static_page(view))

    def _preview(self) -> None:
        request = self.request
        facts = [str(request.task), f"{len(self.rgb)} frames", f"{self.width} x {self.height}"]
        facts += [_cameras_text(request), f"seed {request.seed}"]
        if self.config.get("untrained"):
            facts.append("untrained weights: not a picture of the scene")
        cloud = self.cloud
        if cloud is not None:
            points, colors = cloud.points, cloud.colors
        else:
            points, colors = masked_cloud(self.scene)
        sheet = contact_sheet(
            PreviewContent(
                title=request.prompt or "(no prompt)",
                subtitle="  ·  ".join(facts),
                views=[_as_uint8(image) for image in request.images],
                rgb=self.rgb,
                depth=self._depth(),
                points=points,
                colors=colors,
                extrinsics=np.asarray(self.scene.extrinsics, dtype=np.float64),
            )
        )
        sheet.save(self.folder / "preview.png", optimize=True)


_MODEL_FILES = {
    suffix: tuple(f"sparse/0/{name}.{suffix}" for name in ("cameras", "images", "points3D"))
    for suffix in ("bin", "txt")
}


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cameras_text(request: SceneRequest) -> str:
    if request.task == "allview":
        return "cameras estimated"
    return "cameras given" if isinstance(request.cameras, Cameras) else f"cameras {request.cameras}"


def _as_uint8(image: ImageLike) -> np.ndarray:
    """uint8 RGB [H, W, 3] of anything that a request takes as an image."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8:
        array = (array.clip(0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0)
    return np.asarray(Image.fromarray(array).convert("RGB"))
