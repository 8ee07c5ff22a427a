"""geometry: poses, trajectories, rays, unprojection, image preparation, token lists."""

from __future__ import annotations

import re

import torch

from gen3r import cameras, conditioning
from gen3r.vggt.tokens import token_list
from gen3r_kernels import unproject
from tests.golden_fixtures.golden import Golden

KIND = "geometry"


def test_pose_encoding(golden: Golden) -> None:
    height, width = golden.meta["pose_image_hw"]
    extrinsics, intrinsics = cameras.decode_pose(golden["pose/enc"], height, width)
    golden.check("pose/extrinsics", extrinsics)
    golden.check("pose/intrinsics", intrinsics)
    golden.check("pose/reencoded", cameras.encode_pose(extrinsics, intrinsics, height, width))


def test_relative_poses(golden: Golden) -> None:
    for dtype in golden.cases(r"poses/(\w+)/c2ws"):
        c2w = golden[f"poses/{dtype}/c2ws"]
        relative = cameras.relative_poses(c2w)
        assert relative.dtype == c2w.dtype
        golden.check(f"poses/{dtype}/relative", relative)


def test_rays(golden: Golden) -> None:
    height, width = golden["rays/direction"].shape[-2:]
    c2w, intrinsics = golden["rays/c2ws"], golden["rays/Ks"]
    origin, direction = cameras.rays(c2w, intrinsics, height, width)
    golden.check("rays/origin", origin)
    golden.check("rays/direction", direction)
    golden.check("rays/plucker", cameras.plucker_map(c2w, intrinsics, height, width))


def test_trajectories(golden: Golden) -> None:
    scale = golden.meta["scene_scale"]
    for case in golden.cases(r"traj/(\w+/F\d+)"):
        name, frames = case.split("/F")
        golden.check(f"traj/{case}", cameras.trajectory(name, int(frames), scale))
    for case in golden.cases(r"traj_rays/(\w+)_plucker"):
        name, frames = re.fullmatch(r"(\w+)_F(\d+)", case).groups()
        height, width = golden[f"traj_rays/{case}_plucker"].shape[-2:]
        c2w = cameras.trajectory(name, int(frames), scale)
        plucker = cameras.plucker_map(c2w, golden["traj_rays/Ks"], height, width)
        golden.check(f"traj_rays/{case}_plucker", plucker)


def test_unprojection(golden: Golden) -> None:
    depth = golden["unproj/depth"].squeeze(-1)
    pose, intrinsics = golden["unproj/extrinsics"], golden["unproj/intrinsics"]
    for name in golden.cases(r"unproj/mask_minmax_(\w+)"):
        bounds = cameras.depth_bounds(depth, min_max=name == "True")
        points, mask = unproject(depth, pose, intrinsics, *bounds)
        golden.check(f"unproj/mask_minmax_{name}", mask)
        golden.check("unproj/points", points)


def test_image_preparation(golden: Golden) -> None:
    for case in golden.cases(r"resize/(\w+)/in_u8"):
        frames = golden[f"resize/{case}/in_u8"].float() / 255
        height, width = golden[f"resize/{case}/out"].shape[-2:]
        golden.check(f"resize/{case}/resized", conditioning.resize_to_cover(frames, height, width))
        golden.check(f"resize/{case}/out", conditioning.resize_center_crop(frames, height, width))
    for case in golden.cases(r"crop/(\w+_\d+x\d+)"):
        height, width = map(int, case.rsplit("_", 1)[1].split("x"))
        golden.check(f"crop/{case}", conditioning.center_crop(golden["crop/in"], height, width))


def test_crop_intrinsics(golden: Golden) -> None:
    (name,) = (n for n in golden.names if n.startswith("get_K/out_"))
    size = int(name.rsplit("_", 1)[1])
    rows = golden["get_K/in_w_h_fx_fy_cx_cy"].tolist()
    out = [
        cameras.crop_intrinsics((int(h), int(w)), (fx, fy), (cx, cy), size)
        for w, h, fx, fy, cx, cy in rows
    ]
    golden.check(name, torch.stack(out))


def test_token_list(golden: Golden) -> None:
    for index, tokens in enumerate(token_list(golden["token_list/latents"])):
        golden.check(f"token_list/out_{index}", tokens)
