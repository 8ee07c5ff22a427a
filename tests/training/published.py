"""Small copies of published data sets, all showing one known scene: bright dots before cameras."""

from __future__ import annotations

import functools
import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

Floats = NDArray[np.float64]
SIZE = (200, 152)  # width, height
FRAMES = 4
BACKGROUND = 7.0  # depth where no dot is


@dataclass(frozen=True, eq=False)
class Known:
    """points [P, 3] world, poses [F, 4, 4] world to camera (OpenCV), intrinsics [3, 3] pixels."""

    points: Floats
    poses: Floats
    intrinsics: Floats
    size: tuple[int, int] = SIZE

    def project(self, frame: int) -> tuple[Floats, Floats]:
        """Pixels [P, 2] (corner of the first pixel at 0) and depth [P]."""
        return project(self.points, self.poses[frame], self.intrinsics)

    @functools.cache  # noqa: B019 - two known scenes, both for the whole of the tests
    def image(self, frame: int) -> Image.Image:
        """The frame."""
        return self.image_with(self.project(frame)[0])

    def image_with(self, at: Floats) -> Image.Image:
        """Soft bright dots at these pixels on a dark weave."""
        width, height = self.size
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        light = 20.0 + 10.0 * np.sin(x / 3.0) * np.cos(y / 4.0)
        for u, v in at:
            light = light + 210.0 * np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * 1.5**2))
        grey = np.clip(light, 0, 255).astype(np.uint8)
        return Image.fromarray(np.stack([grey, grey, grey], axis=-1))

    @functools.cache  # noqa: B019
    def depth(self, frame: int) -> NDArray[np.float32]:
        """Depth along the axis: a disc for every dot before a far wall."""
        width, height = self.size
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        depth = np.full((height, width), BACKGROUND, np.float32)
        for (u, v), z in zip(*self.project(frame), strict=True):
            depth[(x - u) ** 2 + (y - v) ** 2 < 16.0] = z
        return depth


def project(points: Floats, pose: Floats, intrinsics: Floats) -> tuple[Floats, Floats]:
    """Pixels [P, 2] and depth [P] of world points."""
    camera = points @ pose[:3, :3].T + pose[:3, 3]
    pixels = camera @ intrinsics.T
    return pixels[:, :2] / pixels[:, 2:], camera[:, 2]


def known_scene(size: tuple[int, int] = SIZE, centred: bool = False) -> Known:
    """Nine dots, four cameras on an arc that also climb and roll."""
    rng = np.random.default_rng(5)
    grid = np.stack(np.meshgrid([-0.8, 0.0, 0.8], [-0.6, 0.0, 0.6]), axis=-1).reshape(-1, 2)
    points = np.c_[grid + rng.uniform(-0.15, 0.15, grid.shape), rng.uniform(-0.4, 0.4, 9)]
    poses = []
    for step in range(FRAMES):
        turn = Rotation.from_euler("yxz", [6.0 * step - 8.0, 3.0 * step, 4.0 * step], degrees=True)
        pose = np.eye(4)
        pose[:3, :3] = turn.as_matrix()
        pose[:3, 3] = (0.05 * step, -0.04 * step, 3.2 + 0.1 * step)
        poses.append(pose)
    width, height = size
    focal = (width / 2, width / 2) if centred else (0.86 * width, 0.92 * width)
    centre = (width / 2, height / 2) if centred else (width / 2 + 5.3, height / 2 - 3.7)
    intrinsics = np.array([[focal[0], 0, centre[0]], [0, focal[1], centre[1]], [0, 0, 1]])
    return Known(points, np.stack(poses), intrinsics, size)


def dots_in(image: Image.Image) -> Floats:
    """Centres [D, 2] of the bright dots of a frame, corner of the first pixel at 0."""
    light = np.asarray(image.convert("L"), dtype=np.float64)
    labels, count = ndimage.label(light > 90)
    weight = np.where(light > 90, light - 40.0, 0.0)
    centres = np.array(ndimage.center_of_mass(weight, labels, range(1, count + 1)))
    return centres.reshape(-1, 2)[:, ::-1] + 0.5


def worst_miss(scene: Path, known: Known) -> float:
    """The largest distance in pixels from a projected point to the dot that shows it."""
    record = json.loads((scene / "cameras.json").read_text())
    files = sorted((scene / "frames").iterdir())
    assert [file.name for file in files] == record["frames"]
    assert len(files) == len(record["extrinsics"]) == len(record["intrinsics"])
    worst = 0.0
    for file, pose, k in zip(files, record["extrinsics"], record["intrinsics"], strict=True):
        pixels, _ = project(known.points, np.array(pose), np.array(k))
        with Image.open(file) as image:
            dots = dots_in(image)
        assert len(dots) == len(known.points), file
        away = np.linalg.norm(pixels[:, None] - dots[None], axis=-1)
        worst = max(worst, float(away.min(axis=1).max()))
    return worst


def worst_depth(scene: Path, known: Known) -> float:
    """The largest distance of an unprojected dot from its point, over the distance to it."""
    record = json.loads((scene / "cameras.json").read_text())
    step = json.loads((scene / "depth" / "scale.json").read_text())["scale"]
    worst = 0.0
    for name, pose, k in zip(
        record["frames"], record["extrinsics"], record["intrinsics"], strict=True
    ):
        pose, k = np.array(pose), np.array(k)
        with Image.open(scene / "depth" / f"{Path(name).stem}.png") as image:
            depth = np.asarray(image).astype(np.float64) * step
        with Image.open(scene / "frames" / name) as image:
            assert image.size == depth.shape[::-1]
            dots = dots_in(image)
        values = depth[dots[:, 1].astype(int), dots[:, 0].astype(int)]
        rays = np.c_[dots, np.ones(len(dots))] @ np.linalg.inv(k).T
        world = (rays * values[:, None] - pose[:3, 3]) @ pose[:3, :3]
        away = np.linalg.norm(known.points[:, None] - world[None], axis=-1).min(axis=1)
        worst = max(worst, float(away.max() / values.min()))
    return worst


def write_re10k(root: Path, known: Known, name: str = "0123456789abcdef") -> Path:
    """One scene of RealEstate10K with images named by timestamps; the folder of its images."""
    width, height = known.size
    lines = ["https://www.youtube.com/watch?v=ab-C_dEf012"]
    k = known.intrinsics
    relative = (k[0, 0] / width, k[1, 1] / height, k[0, 2] / width, k[1, 2] / height)
    frames = root / "frames" / "train" / name
    frames.mkdir(parents=True)
    for frame, time in enumerate(re10k_times()):
        numbers = (*relative, 0.0, 0.0, *known.poses[frame][:3].ravel())
        lines.append(" ".join([str(time), *(f"{n:.9f}" for n in numbers)]))
        known.image(frame).save(frames / f"{time}.png")
    cameras = root / "RealEstate10K" / "train"
    cameras.mkdir(parents=True, exist_ok=True)
    (cameras / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return frames


def re10k_times() -> list[int]:
    """Timestamps in microseconds whose names do not sort as the numbers do."""
    return [960_000, 1_000_000, 1_040_000, 1_080_000]


def write_video(path: Path, images: list[Image.Image], before: int = 0) -> None:
    """A video of 25 frames a second; `before` black frames come first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "8"})
        stream.width, stream.height = images[0].size
        stream.pix_fmt = "yuv420p"
        black = Image.new("RGB", images[0].size)
        for image in [black] * before + images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def write_dl3dv(
    root: Path,
    known: Known,
    name: str = "0a1b2c",
    distortion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
) -> Path:
    """One scene of DL3DV: cameras of images four times as large, entries out of order."""
    folder = root / "1K" / name
    (folder / "images_4").mkdir(parents=True)
    k = 4.0 * known.intrinsics
    entries = []
    for frame in range(FRAMES):
        opengl = np.linalg.inv(known.poses[frame]) @ np.diag([1.0, -1.0, -1.0, 1.0])
        entries.append(
            {"file_path": f"images/frame_{frame + 1:05d}.png", "transform_matrix": opengl.tolist()}
        )
        at = _distorted(known, frame, distortion)
        known.image_with(at).save(folder / "images_4" / f"frame_{frame + 1:05d}.png")
    known.image(0).save(folder / "images_4" / "frame_00009.png")  # was not registered
    content = {
        **{"w": 4 * known.size[0], "h": 4 * known.size[1], "camera_model": "OPENCV"},
        **{"fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2], "cy": k[1, 2]},
        **dict(zip(("k1", "k2", "p1", "p2"), distortion, strict=True)),
        "frames": entries[::-1],
    }
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def _distorted(known: Known, frame: int, distortion: tuple[float, float, float, float]) -> Floats:
    k1, k2, p1, p2 = distortion
    k = known.intrinsics
    out = []
    for u, v in known.project(frame)[0]:
        x, y = (u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1]
        r2 = x**2 + y**2
        radial = 1 + k1 * r2 + k2 * r2**2
        xd = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
        yd = y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
        out.append((xd * k[0, 0] + k[0, 2], yd * k[1, 1] + k[1, 2]))
    return np.array(out)


def write_co3d(
    root: Path, known: Known, sequences: dict[str, dict[str, object]], space: str
) -> Path:
    """One category of Co3Dv2; `sequences`: name -> extra fields of its annotation."""
    category = root / "apple"
    frames = []
    for name in sequences:
        for part in ("images", "depths", "depth_masks"):
            (category / name / part).mkdir(parents=True)
        for frame in range(FRAMES):
            frames.append(_co3d_frame(category, known, name, frame, space))
    annotated = [{"sequence_name": n, "category": "apple", **e} for n, e in sequences.items()]
    for file, content in (("frame", frames[::-1]), ("sequence", annotated)):
        with gzip.open(category / f"{file}_annotations.jgz", "wt") as stream:
            json.dump(content, stream)
    return category


def _co3d_frame(
    category: Path, known: Known, name: str, frame: int, space: str
) -> dict[str, object]:
    file = f"frame{frame + 1:06d}.jpg"
    base = f"apple/{name}"
    known.image(frame).save(category / name / "images" / file, quality=97, subsampling=0)
    depth, adjust = known.depth(frame), 1.7
    bits = (depth / adjust).astype(np.float16).view(np.uint16)
    depth_file = f"{file}.geometric.png"
    Image.fromarray(bits).save(category / name / "depths" / depth_file)
    mask = Image.fromarray((depth < BACKGROUND).astype(np.uint8) * 255).convert("1")
    mask.save(category / name / "depth_masks" / f"{frame + 1:06d}.png")
    half = np.array(known.size) / 2.0
    factor = half if space == "ndc_norm_image_bounds" else np.full(2, half.min())
    k, pose = known.intrinsics, known.poses[frame]
    flip = np.diag([-1.0, -1.0, 1.0])
    return {
        **{"sequence_name": name, "frame_number": frame, "frame_timestamp": frame / 30},
        "image": {"path": f"{base}/images/{file}", "size": [known.size[1], known.size[0]]},
        "depth": {
            **{"path": f"{base}/depths/{depth_file}", "scale_adjustment": adjust},
            "mask_path": f"{base}/depth_masks/{frame + 1:06d}.png",
        },
        "viewpoint": {
            "R": (flip @ pose[:3, :3]).T.tolist(),
            "T": (flip @ pose[:3, 3]).tolist(),
            "focal_length": (np.array([k[0, 0], k[1, 1]]) / factor).tolist(),
            "principal_point": ((half - k[:2, 2]) / factor).tolist(),
            "intrinsics_format": space,
        },
    }


def write_wildrgbd(root: Path, known: Known, name: str = "scenes_000") -> Path:
    """One scene of WildRGB-D, K column by column, depth in millimetres."""
    folder = root / "apple" / "scenes" / name
    for part in ("rgb", "depth", "masks"):
        (folder / part).mkdir(parents=True)
    lines = []
    for frame in range(FRAMES):
        c2w = np.linalg.inv(known.poses[frame])
        lines.append(" ".join([str(frame), *(f"{n:.8f}" for n in c2w.ravel())]))
        known.image(frame).save(folder / "rgb" / f"{frame:05d}.png")
        depth = np.rint(known.depth(frame) * 1000).astype(np.uint16)
        Image.fromarray(depth).save(folder / "depth" / f"{frame:05d}.png")
    (folder / "cam_poses.txt").write_text("\n".join(lines) + "\n")
    metadata = {"w": known.size[0], "h": known.size[1], "K": known.intrinsics.T.ravel().tolist()}
    (folder / "metadata").write_text(json.dumps(metadata))
    return folder


def write_tartanair(
    root: Path, known: Known, name: str = "P000", camera: str = "left", depth: str = "npy"
) -> Path:
    """One trajectory of TartanAir; `known` has a field of view of 90 degrees."""
    folder = root / "office" / "Easy" / name
    (folder / f"image_{camera}").mkdir(parents=True)
    (folder / f"depth_{camera}").mkdir()
    axes = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # NED -> OpenCV
    rows = []
    for frame in range(FRAMES):
        c2w = np.linalg.inv(known.poses[frame])
        position = axes.T @ c2w[:3, 3]
        turn = Rotation.from_matrix(axes.T @ c2w[:3, :3] @ axes)
        rows.append(np.r_[position, turn.as_quat()])
        known.image(frame).save(folder / f"image_{camera}" / f"{frame:06d}_{camera}.png")
        values = known.depth(frame).copy()
        values[:4] = 10_000.0  # sky
        target = folder / f"depth_{camera}" / f"{frame:06d}_{camera}_depth.{depth}"
        if depth == "npy":
            np.save(target, values)
        elif depth == "npz":
            np.savez_compressed(target, depth=values)
        else:
            bgra = values.view(np.uint8).reshape(*values.shape, 4)
            Image.fromarray(bgra[..., [2, 1, 0, 3]], "RGBA").save(target)
    np.savetxt(folder / f"pose_{camera}.txt", np.stack(rows), fmt="%.9e")
    return folder
