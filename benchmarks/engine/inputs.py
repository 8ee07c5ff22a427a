"""What the transformer is given in the suites: seeded, of order one, the same for every provider.

Everything is drawn on the CPU in float32 and rounded to bfloat16, so that a float32 reference and
a bfloat16 run read the same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gen3r import cameras as camera_maths
from gen3r import stages
from gen3r.conditioning import control_latents, task_mask
from gen3r.scene import Cameras
from gen3r.transformer import Conditions, WanTransformer

SEED = 41
PROMPT_TOKENS, NEGATIVE_TOKENS = 17, 4  # a short sentence, and "bad detailed"
IMAGE_TOKENS = 257


@dataclass(frozen=True)
class StepInputs:
    """conditions : of 2 n rows, the negative ones first; noise : [n, 16, f, h, 2 w] float32."""

    conditions: Conditions
    noise: Tensor


def zoom(frames: int, size: int) -> Cameras:
    """A camera path that moves forward, with a field of view of one radian."""
    c2w = camera_maths.trajectory("zoom_in", frames, 1.0)
    focal = size / 2 / math.tan(0.5)
    intrinsics = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    return Cameras(camera_maths.invert_pose(c2w.double()), intrinsics.double().expand(frames, 3, 3))


@torch.no_grad()
def make_inputs(
    transformer: WanTransformer, frames: int, size: int, scenes: int = 1, seed: int = SEED
) -> StepInputs:
    """Conditions and noise of `scenes` guided 1view scenes of frames x size x size pixels."""
    config, weight = transformer.config, transformer.patch_embedding.weight
    device, dtype = weight.device, weight.dtype
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device, dtype)

    rows, columns = stages.latent_grid(size, size)
    shape = stages.latent_shape(frames, size, size, config.out_dim)
    noise = torch.stack([draw(*shape) for _ in range(scenes)]).float()
    negative = draw(min(NEGATIVE_TOKENS, config.text_len), config.text_dim)
    prompts = [draw(min(PROMPT_TOKENS, config.text_len), config.text_dim) for _ in range(scenes)]
    image = torch.stack([draw(IMAGE_TOKENS, config.clip_dim) for _ in range(scenes)])
    appearance = torch.stack([draw(config.out_dim, shape[1], rows, columns) for _ in range(scenes)])
    mask = task_mask(["1view"] * scenes, frames, rows, columns).to(device)
    control = control_latents(appearance, mask)
    rays = stages.encode_cameras(zoom(frames, size), frames, size, size, device, torch.float32)
    rays = rays.bfloat16().to(dtype).expand(scenes, -1, -1, -1, -1)
    conditions = transformer.condition(
        [negative] * scenes + prompts, *(torch.cat([x, x]) for x in (image, control, rays))
    )
    return StepInputs(conditions, noise)
