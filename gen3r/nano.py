"""NANO: the same six components at a size that runs on a laptop, with its own tokenizer.

112 x 112 pixels, 17 frames, under 12 M parameters. The weights are seeded and untrained: results
have the right form and no meaning. Building is deterministic for one version of torch.

    python -m gen3r.nano DIR    # write the folder; Gen3RPipeline.from_pretrained(DIR) loads it
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
from gen3r.pipeline import Gen3RPipeline
from gen3r.schedulers import make_euler_scheduler
from gen3r_kernels import Backends

SEED = 2601
VOCABULARY = 1024

NANO = Gen3RConfig(
    transformer=TransformerConfig(
        text_len=64,
        dim=192,
        ffn_dim=768,
        freq_dim=64,
        text_dim=96,
        num_heads=4,
        num_layers=6,
        clip_dim=96,
    ),
    wan_vae=AppearanceVAEConfig(dim=12),
    geo_adapter=GeometryAdapterConfig(hidden_dim=16, input_dim=320, output_dim=320),
    vggt=VGGTConfig(
        img_size=112,
        embed_dim=32,
        depth=4,
        num_heads=4,
        vit_depth=2,
        vit_num_heads=4,
        trunk_depth=2,
        camera_num_heads=4,
        features=32,
        out_channels=(16, 24, 32, 32),
        intermediate_layer_idx=(0, 1, 2, 3),
    ),
    text_encoder=TextEncoderConfig(
        vocab=VOCABULARY, dim=96, dim_attn=96, dim_ffn=192, num_heads=4, num_layers=2
    ),
    clip_image_encoder=ImageEncoderConfig(
        image_size=112, vision_dim=96, vision_heads=4, vision_layers=3
    ),
    num_frames=17,
    size=112,
)

# The tokenizer is trained on these captions; any other text falls back to bytes.
_CORPUS = """
a red brick room with two columns and a blue sphere
a courtyard of white stone with four arches under a sunny sky
a small bedroom with a wooden floor, a green bed and a large window
an old stone arena with many arches and a yellow box in the middle
a dark corridor with a low ceiling, tall cylinders and a checkered floor
the camera moves forward through a bright hall with marble walls
a garden with a round table, a purple cylinder and grey tiles
an empty gallery with orange walls, a black cube and soft light from the left
bad detailed, blurry, low quality
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that appends ``</s>``, as umt5's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.strip().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


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
    """The embedded model as a pipeline. Weights are made on the CPU: the same on every device."""
    modules = random_modules(NANO, backends or Backends(), torch.float32, "cpu")
    pipeline = Gen3RPipeline(
        config=NANO,
        **modules,
        tokenizer=build_tokenizer(),
        scheduler=make_euler_scheduler(),
        untrained=True,
    )
    return pipeline.to(device, torch_dtype)


def main(argv: list[str] | None = None) -> None:
    """Write the embedded model as a checkpoint folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", help="folder to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args(argv)
    pipeline = build_nano(getattr(torch, arguments.dtype))
    pipeline.save_pretrained(arguments.directory)
    count = sum(p.numel() for n in COMPONENTS for p in getattr(pipeline, n).parameters())
    print(f"{arguments.directory}: {count / 1e6:.2f} M parameters, seeded and untrained")


if __name__ == "__main__":
    main()
