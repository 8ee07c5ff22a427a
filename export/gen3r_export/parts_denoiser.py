"""The diffusion transformer in two graphs, as the engine runs it.

``prepare`` runs once a request: keys and values of text and image for all blocks, the share of
control latents and cameras in the patch embedding, and the modulation of every step. ``step``
predicts the velocity; it reads what ``prepare`` gave. Guidance and the solver, a sum of tensors,
stay with whoever runs the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gen3r.rope import rope_table
from gen3r.transformer import StepConstants, WanTransformer
from gen3r.transformer_blocks import KeysValues
from gen3r_export.graph import DimRange, Graph, TensorSpec
from gen3r_export.parts import Request, whole

ROWS = 2  # of conditions a scene: guidance's negative and positive prompt
MOST_STEPS = 1000  # timesteps that one call of ``prepare`` takes
CAMERA_SIDE = 8  # pixels of the camera maps per latent


class Prepare(nn.Module):
    """Projected conditions and modulation tables.

    The angles of the time embedding are computed in float32, as inference libraries have no
    float64; the largest, 1,000 radians, is off by 6e-5 then.
    """

    def __init__(self, model: WanTransformer, scenes: int | None) -> None:
        super().__init__()
        self.model, self.scenes = model, scenes
        half = model.config.freq_dim // 2
        powers = torch.arange(half, dtype=torch.float64) / half
        device = model.patch_embedding.weight.device
        frequencies = torch.pow(10000.0, -powers).float().to(device)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self,
        text: Tensor,  # [2 B, text_len, text_dim]
        image: Tensor,  # [2 B, Li, clip_dim]
        control: Tensor,  # [2 B, 20, f, h, 2 w]
        cameras: Tensor,  # [2 B, 24, f, 8 h, 16 w]
        timesteps: Tensor,  # [T] float32
    ) -> tuple[Tensor, ...]:
        model = self.model
        lengths = torch.full((1,), text.shape[1], dtype=torch.int32, device=text.device)
        conditions = model.condition_padded(text, lengths, image, control, cameras)
        scenes = control.shape[0] // ROWS if self.scenes is None else self.scenes
        embedding, _ = model.embed_control(conditions, scenes)
        angles = timesteps[:, None] * self.get_buffer("frequencies")
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        tables = model.modulation(*model.embed_time(features))
        kept = [
            block.cross_attn.keys_values(conditions.text, conditions.image, lengths)
            for block in model.typed_blocks
        ]
        stacked = (
            torch.stack([getattr(one, name) for one in kept]) for name in KeysValues._fields[:4]
        )
        return (embedding, tables, *stacked)


class Step(nn.Module):
    """The velocity of one step. Rotary tables are constants, for the longest clip."""

    def __init__(
        self, model: WanTransformer, grid: tuple[int, int, int], *, dynamic_frames: bool
    ) -> None:
        super().__init__()
        self.model, self.grid, self.dynamic_frames = model, grid, dynamic_frames
        device = model.patch_embedding.weight.device
        cos, sin = rope_table(grid, model.config.head_dim, True, device)
        self.register_buffer("cos", cos.clone(), persistent=False)
        self.register_buffer("sin", sin.clone(), persistent=False)

    def forward(
        self,
        latents: Tensor,  # [B, 16, f, h, 2 w] float32
        tables: Tensor,  # [1, 6 L + 2, D] float32
        embedding: Tensor,  # [B, S, D] float32
        k_text: Tensor,  # [L, 2 B, Lt, heads, head_dim], as v_text
        v_text: Tensor,
        k_image: Tensor,  # [L, 2 B, Li, heads, head_dim], as v_image
        v_image: Tensor,
        text_lengths: Tensor | None = None,  # [2 B] int32
    ) -> tuple[Tensor]:  # [2 B, 16, f, h, 2 w] float32
        frames, rows, columns = self.grid
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        if self.dynamic_frames:
            # Tokens are counted frame by frame: a shorter clip has the beginning of the tables.
            frames = latents.shape[2] // self.model.config.patch_size[0]
            tokens = frames * rows * columns
            # Picked, not sliced: a slice would bind the axis to the tables' length when traced.
            picked = torch.arange(tokens, device=cos.device)
            cos, sin = cos.index_select(0, picked), sin.index_select(0, picked)
        if text_lengths is None:  # every key is read
            _, count, length = k_text.shape[:3]
            text_lengths = torch.full((count,), length, dtype=torch.int32, device=k_text.device)
        kept = tuple(
            KeysValues(k_text[i], v_text[i], k_image[i], v_image[i], text_lengths)
            for i in range(len(self.model.typed_blocks))
        )
        constants = StepConstants(embedding, kept, (cos, sin), (frames, rows, columns))
        return (self.model.velocity(latents, tables, constants),)


class _Denoiser:
    """Shapes of both graphs."""

    def __init__(self, request: Request) -> None:
        self.request = request
        own = request.pipeline.config
        self.config, self.model = own.transformer, request.pipeline.transformer
        channels, _, rows, columns = request.grid
        self.frames = request.clip_axis(1)
        self.latents = (channels, self.frames, rows, columns)
        _, p, q = self.config.patch_size
        self.tokens = rows // p * (columns // q)  # of one latent frame
        encoder = own.clip_image_encoder
        self.image_len = 1 + (encoder.image_size // encoder.patch_size) ** 2
        self.rows = request.batches(ROWS)

    @property
    def sequence(self) -> int | str:
        """The axis of all tokens."""
        if isinstance(self.frames, int):
            return self.frames * self.tokens
        return f"{self.tokens}*k+{self.tokens}"

    def constants(self) -> list[TensorSpec]:
        """What ``step`` reads of ``prepare`` beside the tables."""
        spec, config = self.request.spec, self.config
        heads = (config.num_heads, config.head_dim)
        text = (config.num_layers, self.rows, config.text_len, *heads)
        image = (config.num_layers, self.rows, self.image_len, *heads)
        return [
            spec("embedding", self.request.batch, self.sequence, config.dim, dtype="float32"),
            spec("k_text", *text),
            spec("v_text", *text),
            spec("k_image", *image),
            spec("v_image", *image),
        ]

    def tables(self, steps: int | str) -> TensorSpec:
        width = 6 * self.config.num_layers + 2
        return self.request.spec("tables", steps, width, self.config.dim, dtype="float32")

    def prepare(self) -> Graph:
        request, config = self.request, self.config
        spec, (_, frames, rows, columns) = request.spec, self.latents
        side = (CAMERA_SIDE * rows, CAMERA_SIDE * columns)
        inputs = [
            spec("text", self.rows, config.text_len, config.text_dim),
            spec("image", self.rows, self.image_len, config.clip_dim),
            spec("control", self.rows, config.in_dim - config.out_dim, frames, rows, columns),
            spec("cameras", self.rows, config.in_dim_control_adapter, frames, *side),
            spec("timesteps", "steps", dtype="float32"),
        ]
        embedding, *keys_values = self.constants()
        outputs = [embedding, self.tables("steps"), *keys_values]
        static = None if request.config.batch_range else request.config.batch[0]

        def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
            sizes = [one.sizes(lengths) for one in inputs]
            drawn = [request.normal(size, seed) for seed, size in enumerate(sizes[:4])]
            times = torch.linspace(1000.0, 20.0, sizes[4][0], device=request.pipeline.device)
            return (*drawn, times)

        dims = request.clip_dims | {"steps": DimRange(2, 50, MOST_STEPS)}
        return whole(
            request,
            "denoiser",
            Prepare(self.model, static),
            inputs,
            outputs,
            example,
            form="prepare",
            dims=dims,
        )

    def step(self, prepare: Graph) -> Graph:
        request, config = self.request, self.config
        latents = request.spec("latents", request.batch, *self.latents, dtype="float32")
        inputs = [latents, self.tables(1), *self.constants()]
        # The fused kernels skip a prompt's padding by its length; all others read every key.
        fused = request.config.device == "cuda"
        if fused:
            inputs.append(request.spec("text_lengths", self.rows, dtype="int32"))
        velocity = request.spec("velocity", self.rows, *self.latents, dtype="float32")

        def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
            with torch.no_grad():
                found = prepare.module(*prepare.example({**lengths, "steps": 2}))
            embedding, tables, *keys_values = found
            noise = request.normal(latents.sizes(lengths)).float()
            given = [noise, tables[:1], embedding, *keys_values]
            if fused:
                size = inputs[-1].sizes(lengths)
                full = torch.full(size, config.text_len, dtype=torch.int32)
                given.append(full.to(request.pipeline.device))
            return tuple(given)

        _, _, rows, columns = request.grid
        p, q, r = config.patch_size
        grid = (request.most_latents // p, rows // q, columns // r)
        module = Step(self.model, grid, dynamic_frames=not isinstance(self.frames, int))
        return whole(request, "denoiser", module, inputs, [velocity], example, form="step")


def denoiser(request: Request) -> Iterator[Graph]:
    """What is constant over the steps, and the velocity of a step."""
    parts = _Denoiser(request)
    prepare = parts.prepare()
    yield prepare
    yield parts.step(prepare)
