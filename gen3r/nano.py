"""NANO: the same six components at a size that runs on a laptop, with its own tokenizer.

112 x 112 pixels, 17 frames, 8 M parameters: a checkpoint folder in the published layout that comes
with the package (`EMBEDDED`, float16). ``training/recipes/nano.sh`` made it from nothing, on
procedural scenes; what it was trained on and how well it does is told in docs/quality.md.

    python -m gen3r.nano DIR    # write the folder; Gen3RPipeline.from_pretrained(DIR) loads it
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from gen3r.checkpoint import pipeline_config
from gen3r.components import COMPONENTS
from gen3r.config import (
    AppearanceVAEConfig,
    Gen3RConfig,
    GeometryAdapterConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VGGTConfig,
)
from gen3r.nano_tokenizer import VOCABULARY, build_tokenizer
from gen3r.pipeline import Gen3RPipeline
from gen3r.schedulers import make_euler_scheduler
from gen3r_kernels import Backends

SEED = 2601
EMBEDDED = Path(__file__).with_name("embedded")  # the checkpoint folder of the package
_MEAN, _STD = (0.0,) * 16, (1.0,) * 16  # of latents that are not measured yet

# What training begins with: sizes, and latents as they are.
ARCHITECTURE = Gen3RConfig(
    transformer=TransformerConfig(
        text_len=64,
        dim=128,
        ffn_dim=384,
        freq_dim=64,
        text_dim=64,
        num_heads=1,  # of 128 channels, as the kernels of the 8-bit presets take them
        num_layers=8,
        clip_dim=64,
    ),
    wan_vae=AppearanceVAEConfig(
        dim=24, dim_mult=(1, 1, 2, 2), num_res_blocks=1, latents_mean=_MEAN, latents_std=_STD
    ),
    geo_adapter=GeometryAdapterConfig(
        hidden_dim=16,
        input_dim=800,
        output_dim=800,
        resample_scale=25,
        dim_mult=(2, 2, 2, 2),
        num_res_blocks=1,
        latents_mean=_MEAN,
        latents_std=_STD,
    ),
    vggt=VGGTConfig(
        img_size=112,
        embed_dim=80,
        depth=4,
        num_heads=5,
        vit_depth=1,
        vit_num_heads=5,
        trunk_depth=1,
        camera_num_heads=5,
        features=32,
        out_channels=(16, 32, 32, 32),
        intermediate_layer_idx=(0, 1, 2, 3),
    ),
    text_encoder=TextEncoderConfig(
        vocab=VOCABULARY, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2
    ),
    clip_image_encoder=ImageEncoderConfig(
        image_size=112, vision_dim=64, vision_heads=4, vision_layers=2
    ),
    num_frames=17,
    size=112,
    guidance_scale=2.0,
)

NANO = pipeline_config(EMBEDDED)


def random_modules(
    config: Gen3RConfig,
    backends: Backends,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int = SEED,
) -> dict[str, Any]:
    """All six components with seeded random weights, made on `device` in `dtype`.

    The camera head's last layer is set to give nearly an identity rotation and a field of view of
    one radian, so that cameras are finite.
    """
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    modules: dict[str, Any] = {}  # as keyword arguments of Gen3RPipeline
    previous = torch.get_default_dtype()
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            for name, component in COMPONENTS.items():
                module = component.build(getattr(config, name), backends)
                modules[name] = module.to(device, dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(previous)
    head = modules["vggt"].camera_head
    with torch.no_grad():
        head.pose_branch.fc2.weight.mul_(0.05)
        head.pose_branch.fc2.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]))
        head.pose_branch.fc2.bias.div_(4)  # four refinement steps add up
    return modules


def build_nano(
    torch_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backends: Backends | None = None,
) -> Gen3RPipeline:
    """The embedded model as a pipeline."""
    return Gen3RPipeline.from_pretrained(
        EMBEDDED, torch_dtype=torch_dtype, device=device, backends=backends
    )


def build_untrained(seed: int = SEED, backends: Backends | None = None) -> Gen3RPipeline:
    """What training begins with: seeded random weights in float32 on the CPU.

    Results have the right form and no meaning. Deterministic for one version of torch.
    """
    modules = random_modules(ARCHITECTURE, backends or Backends(), torch.float32, "cpu", seed)
    return Gen3RPipeline(
        config=ARCHITECTURE,
        **modules,
        tokenizer=build_tokenizer(),
        scheduler=make_euler_scheduler(),
        untrained=True,
    )


def main(argv: list[str] | None = None) -> None:
    """Write the embedded model as a checkpoint folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", help="folder to make")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    arguments = parser.parse_args(argv)
    pipeline = build_nano(getattr(torch, arguments.dtype))
    try:
        pipeline.save_pretrained(arguments.directory)
    except OSError as error:
        parser.error(str(error))
    count = sum(p.numel() for n in COMPONENTS for p in getattr(pipeline, n).parameters())
    print(f"{arguments.directory}: {count / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
