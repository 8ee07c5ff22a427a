"""unproject's kernel in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels import Backends, unproject, unproject_reference

TRITON = Backends(operators="triton")


def scene(*lead: int, rows: int = 3) -> tuple[Tensor, ...]:
    """Depth maps of 13 x 29 pixels with cameras, and bounds that cut off some pixels."""
    rotation, _ = torch.linalg.qr(torch.randn(*lead, 3, 3, dtype=torch.float64))
    pose = torch.cat([rotation, 3 * torch.randn(*lead, 3, 1, dtype=torch.float64)], dim=-1)
    if rows == 4:
        last = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64).expand(*lead, 1, 4)
        pose = torch.cat([pose, last], dim=-2)
    k = torch.tensor([[40.0, 0, 14.2], [0, 50, 6.1], [0, 0, 1]]).expand(*lead, 3, 3)
    depth = torch.rand(*lead, 13, 29) + 0.5
    return depth, pose, k, torch.full(lead, 0.6), torch.full(lead, 1.4)


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("rows", [3, 4])
def test_float64_and_float32(lead: tuple[int, ...], rows: int) -> None:
    inputs = scene(*lead, rows=rows)
    expected, valid = unproject_reference(*inputs)
    points, mask = unproject(*inputs, backends=TRITON)
    assert points.dtype == torch.float64 and torch.equal(mask, valid)
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-14)
    single, mask = unproject(*inputs, out_dtype=torch.float32, backends=TRITON)
    assert single.dtype == torch.float32 and torch.equal(mask, valid)
    largest = inputs[1][..., :3, 3].abs().max()  # the translation is the largest term here
    assert (single - expected).abs().max() <= 4 * 2**-24 * 3 * largest


def test_bounds_are_exclusive_and_compared_in_float32() -> None:
    depth, *cameras, near, far = scene(2)
    depth[0, 0, 0], depth[0, 0, 1] = near[0], far[0]
    depth[1, 0, 0] = torch.nextafter(near[1], far[1])
    _, mask = unproject(depth, *cameras, near, far, backends=TRITON)
    assert not mask[0, 0, 0] and not mask[0, 0, 1] and mask[1, 0, 0]


def test_an_infinite_focal_length_gives_the_axis() -> None:
    depth, pose, k, near, far = scene(1)
    k = k.clone()
    k[..., 0, 0] = torch.inf
    points, _ = unproject(depth, pose, k, near, far, backends=TRITON)
    expected, _ = unproject_reference(depth, pose, k, near, far)
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-14)


def test_shared_cameras_are_broadcast() -> None:
    depth, pose, k, near, far = scene(3)
    points, _ = unproject(depth, pose[0], k[0], near[0], far[0], backends=TRITON)
    each = (x[:1].expand_as(x) for x in (pose, k, near, far))
    torch.testing.assert_close(points, unproject_reference(depth, *each)[0], rtol=0, atol=1e-14)


def test_refusals() -> None:
    inputs = scene(1)
    with pytest.raises(ValueError, match=r"asked for torch\.float16; use operators='auto'"):
        unproject(*inputs, out_dtype=torch.float16, backends=TRITON)
    with pytest.raises(ValueError, match="float64 with gradients"):
        unproject(inputs[0].requires_grad_(), *inputs[1:], backends=TRITON)


def test_opcheck() -> None:
    depth, pose, k, near, far = scene(2)
    arguments = (depth, pose, k.contiguous(), near, far, torch.float32)
    torch.library.opcheck(torch.ops.gen3r.unproject.default, arguments)
