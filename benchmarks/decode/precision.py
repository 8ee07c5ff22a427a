"""Case encode_precision: latents of the control video by what the encoder computes in.

Against the encoder in float32 without TF32, of the same weights. The weights are random, drawn so
that every layer keeps the scale of its input, and rounded to bfloat16 at once: all precisions hold
the same ones. Rows: latent_error |mean - float32| / |float32| and time, a provider a precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.decode.cases import SEED, Setting
from benchmarks.engine.common import PROVIDERS, Options, Rows, release
from benchmarks.timing import Stopwatch
from gen3r.appearance_vae import ENCODER_PRECISIONS, AppearanceVAE

CASE = "encode_precision"


@torch.no_grad()
def keep_scale(module: nn.Module) -> None:
    """Weights N(0, 2 / inputs) of convolutions and gains around one, as values of bfloat16."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 4 and parameter.shape[1] > 1:
            scale, mean = math.sqrt(2 / parameter[0].numel()), 0.0
        elif name.endswith("gamma"):
            scale, mean = 0.1, 1.0
        else:
            scale, mean = 0.02, 0.0
        drawn = torch.empty(parameter.shape, device=device, dtype=torch.float32)
        drawn.normal_(mean, scale, generator=generator)
        parameter.copy_(drawn.bfloat16())


def pictures(options: Options) -> Tensor:  # [1, 3, F, H, W] in [-1, 1]
    """A control video of two views: smooth pictures with edges, first and last; black between."""
    side = torch.linspace(0, 6 * math.pi, options.size)
    y, x = torch.meshgrid(side, side, indexing="ij")
    views = [
        torch.stack([(a * x + b * y).sin(), (b * x - a * y).cos(), (x * y / 20).sin().sign()])
        for a, b in ((1.0, 0.3), (0.4, 1.7))
    ]
    video = torch.full((1, 3, options.frames, options.size, options.size), -1.0)
    video[0, :, 0], video[0, :, -1] = views
    return video


@torch.no_grad()
def latents(options: Options, precision: str, watch: Stopwatch) -> tuple[Tensor, list[float]]:
    """Posterior mean in float64 on the host, and milliseconds of the encoding."""
    vae: AppearanceVAE = Setting(options, PROVIDERS["exact"], options.device).vae()
    # Filled in float32, then as the model has it: every precision rounds from the same values.
    vae.to(torch.float32)
    keep_scale(vae)
    vae.to(torch.float32 if precision in ("tf32", "float32") else options.dtype)
    vae.set_encoder_precision(precision)
    clip = pictures(options).to(options.device, vae.encoder_dtype)

    def run() -> Tensor:
        with vae.encoder_products():
            return vae.encode(clip).mean

    mean = run()
    times = watch.times(lambda: run)
    return mean.double().cpu(), times


def encode_precision(options: Options, rows: Rows, watch: Stopwatch) -> None:
    """Measure every precision against float32."""
    exact, times = latents(options, "float32", watch)
    rows.add(CASE, "float32", "time", "ms", times)
    for precision in ENCODER_PRECISIONS:
        name = options.dtype_name if precision == "model" else precision
        if name == "float32":
            continue
        release(options.device)
        found, times = latents(options, precision, watch)
        error = float((found - exact).norm() / exact.norm())
        largest = float((found - exact).abs().max() / exact.abs().max())
        rows.add(CASE, name, "latent_error", "1", [error], largest=largest)
        rows.add(CASE, name, "time", "ms", times)
