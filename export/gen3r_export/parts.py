"""The parts of the model that can be exported, as graphs with names, shapes and examples.

A graph's module is a thin wrapper around the model's own modules (nothing is computed anew here):
flat tensors in, flat tensors out, with the cache of a chunked clip among them.

| part | graphs | what it is |
|---|---|---|
| text_encoder | text_encoder | token ids and mask to text features |
| image_encoder | image_encoder | CLIP pixels to image features |
| vae_encoder, vae_decoder | clip, `_first`, `_next` | the appearance VAE |
| adapter_encoder, adapter_decoder | clip, `_first`, `_next` | the geometry adapter |
| camera_head, depth_head, point_head | one each | VGGT's heads over decoded tokens |
| denoiser | `_prepare`, `_step` | what is constant over the steps, and the velocity of one step |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gen3r.pipeline import Gen3RPipeline
from gen3r.stages import VAE_STRIDE, latent_shape
from gen3r_export.config import ExportConfig
from gen3r_export.graph import DimRange, Graph, TensorSpec

SEED = 8
Make = Callable[["Request"], Iterator[Graph]]


@dataclass(frozen=True)
class Request:
    """A config with the model's own values in the place of what it leaves open.

    frames : least and most video frames. height, width : pixels.
    """

    pipeline: Gen3RPipeline
    config: ExportConfig
    frames: tuple[int, int]
    height: int
    width: int

    @classmethod
    def of(cls, pipeline: Gen3RPipeline, config: ExportConfig) -> Request:
        """ValueError for a pipeline in another dtype or on another device than the config says."""
        own = pipeline.config
        dtype = str(pipeline.dtype).removeprefix("torch.")
        if dtype != config.dtype or pipeline.device.type != config.device:
            raise ValueError(
                f"the model is {dtype} on {pipeline.device.type}; an export of precision "
                f"'{config.precision}' for {config.device} takes it as {config.dtype} there"
            )
        return cls(
            pipeline,
            config,
            config.frames or (own.num_frames, own.num_frames),
            config.height or own.size,
            config.width or own.size,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.dtype

    @property
    def most_latents(self) -> int:
        """Latent frames of the longest clip."""
        return (self.frames[1] - 1) // 4 + 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent rows and columns of one half."""
        return self.height // VAE_STRIDE, self.width // VAE_STRIDE

    @property
    def token_size(self) -> tuple[int, int]:
        """Token rows and columns."""
        patch = self.pipeline.config.vggt.patch_size
        return self.height // patch, self.width // patch

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(C, f, h, 2 w) of the joint latents of the longest clip."""
        channels = self.pipeline.config.transformer.out_dim
        return latent_shape(self.frames[1], self.height, self.width, channels)

    # ------------------------------------------------------------------------------- axes of specs

    @property
    def batch(self) -> int | str:
        return "batch" if self.config.batch_range else self.config.batch[0]

    def batches(self, factor: int) -> int | str:
        """The axis of `factor` rows a scene."""
        return f"{factor}*batch" if self.config.batch_range else factor * self.config.batch[0]

    @property
    def dims(self) -> dict[str, DimRange]:
        """The dynamic batch axis, where there is one."""
        found = self.config.batch_range
        return {} if found is None else {"batch": found}

    @property
    def clip_dims(self) -> dict[str, DimRange]:
        """`dims`, and k of the 4 k + 1 frames where their number is dynamic."""
        least, most = ((count - 1) // 4 for count in self.frames)
        if least == most:
            return self.dims
        if least == 0:
            raise ValueError("frames of a dynamic axis begin with 5; use 5 as the least number")
        return self.dims | {"k": DimRange(least, most, most)}

    def clip_axis(self, factor: int) -> int | str:
        """The axis of 1 + factor * k frames."""
        if "k" not in self.clip_dims:
            return 1 + factor * ((self.frames[1] - 1) // 4)
        return "k+1" if factor == 1 else f"{factor}*k+1"

    # ------------------------------------------------------------------------------------ examples

    def normal(self, shape: Sequence[int], seed: int = SEED) -> Tensor:
        """Seeded normal numbers in the model's dtype, on its device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(tuple(shape), generator=generator)
        return drawn.to(self.pipeline.device, self.dtype)

    def spec(self, name: str, *shape: int | str, dtype: str | None = None) -> TensorSpec:
        """A tensor of the model's dtype unless told otherwise."""
        return TensorSpec(name, shape, dtype or self.config.dtype)


def widened(module: nn.Module) -> Callable[[], nn.Module]:
    """A float32 copy of a module, made when it is asked for."""
    return lambda: copy.deepcopy(module).float()


def whole(
    request: Request,
    part: str,
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    example: Callable[..., tuple[Tensor, ...]],
    *,
    form: str = "whole",
    dims: dict[str, DimRange] | None = None,
) -> Graph:
    """A graph; its name is the part's, with the form behind it where the part has several."""
    return Graph(
        name=part if form in ("whole", "clip") else f"{part}_{form}",
        part=part,
        form=form,
        module=module.eval(),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        dims=request.clip_dims if dims is None else dims,
        example=example,
        wide=widened(module),
    )


def _parts() -> dict[str, Make]:
    # Imported here: these modules import the helpers above.
    from gen3r_export import parts_autoencoder, parts_denoiser, parts_encoder, parts_heads

    return {
        "text_encoder": parts_encoder.text_encoder,
        "image_encoder": parts_encoder.image_encoder,
        "vae_encoder": parts_autoencoder.vae_encoder,
        "vae_decoder": parts_autoencoder.vae_decoder,
        "adapter_encoder": parts_autoencoder.adapter_encoder,
        "adapter_decoder": parts_autoencoder.adapter_decoder,
        "camera_head": parts_heads.camera_head,
        "depth_head": parts_heads.depth_head,
        "point_head": parts_heads.point_head,
        "denoiser": parts_denoiser.denoiser,
    }


PART_NAMES = (
    *("text_encoder", "image_encoder"),
    *("vae_encoder", "vae_decoder", "adapter_encoder", "adapter_decoder"),
    *("camera_head", "depth_head", "point_head", "denoiser"),
)
# The component of the checkpoint that each part's weights belong to.
COMPONENT = {
    "text_encoder": "text_encoder",
    "image_encoder": "clip_image_encoder",
    "vae_encoder": "wan_vae",
    "vae_decoder": "wan_vae",
    "adapter_encoder": "geo_adapter",
    "adapter_decoder": "geo_adapter",
    "camera_head": "vggt",
    "depth_head": "vggt",
    "point_head": "vggt",
    "denoiser": "transformer",
}


def chosen_parts(config: ExportConfig) -> tuple[str, ...]:
    """The parts that a config asks for. ValueError for a name that is none."""
    unknown = sorted(set(config.parts) - set(PART_NAMES))
    if unknown:
        raise ValueError(
            f"parts {', '.join(unknown)} are unknown; known: {', '.join(PART_NAMES)}, all"
        )
    return config.parts or PART_NAMES


def graphs(pipeline: Gen3RPipeline, config: ExportConfig) -> Iterator[Graph]:
    """The graphs that a config asks for, one after another.

    Raises
    ------
    ValueError : an unknown part; a model in another dtype or on another device than the config
        says; sizes that the model does not take.
    """
    request = Request.of(pipeline, config)
    makers = _parts()
    for name in chosen_parts(config):
        yield from makers[name](request)
