"""Golden fixture `train_stage2`: control latents of the three tasks, and one step of the
transformer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gen3r.encoders import tokenize_and_encode
from gen3r.schedulers import make_euler_scheduler
from gen3r.stages import embed_views
from gen3r.transformer import Conditions, pad_text
from gen3r_training.diffusion import (
    DrawNoise,
    EncodedSample,
    FlowSample,
    diffusion_step,
    encode_camera_batch,
    encode_joint,
    encode_sample,
    flow_sample,
    keep_given_frames,
    training_control,
)
from tests.golden_fixtures.golden import END_TO_END_TOLERANCE as TOLERANCE
from tests.golden_fixtures.golden import Golden, relative_error
from tests.golden_fixtures.tiny_pipeline import build_component
from tests.golden_fixtures.training_steps import (
    IMAGE_SIZE,
    check_gradients,
    check_value,
    posterior_noise,
    shared_noise,
    training_frames,
)

KIND = "train_stage2"


class Frozen:
    """The frozen components and the batch of one fixture file."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden
        self.source = golden.sibling("e2e_weights")
        self.modules = tuple(
            build_component(self.source, name) for name in ("wan_vae", "geo_adapter", "vggt")
        )
        first = training_frames(golden)
        self.frames = torch.stack([first, first.flip(-1)])  # the recipe's batch of two

    def batch(self) -> list[EncodedSample]:
        """Both samples, draws 0 to 3 and 4 to 7."""
        modes = self.golden.meta["values"]["modes"]
        return [
            encode_sample(
                *self.modules,
                self.frames[row : row + 1],
                task,
                DrawNoise(*(posterior_noise(self.golden, 4 * row + k) for k in range(4))),
            )
            for row, task in enumerate(modes)
        ]

    def text(self) -> list[Tensor]:
        """Features of the stored captions (a dropped one is empty)."""
        tokenizer = AutoTokenizer.from_pretrained(self.golden.folder / "e2e_tokenizer")
        model = build_component(self.source, "text_encoder")
        length = self.source.meta["configs"]["transformer"]["text_len"]
        return tokenize_and_encode(tokenizer, model, self.golden.meta["values"]["texts"], length)

    def image_features(self) -> Tensor:
        return embed_views(build_component(self.source, "clip_image_encoder"), self.frames[:, 0])


def mask_row(control: Tensor) -> Tensor:
    """The mask channels of the top row at the edges of both halves."""
    half = control.shape[-1] // 2
    return control[:, -4:, :, 0, [0, half - 1, half, 2 * half - 1]]


def check_controls(golden: Golden, frozen: Frozen, first: EncodedSample) -> None:
    """The first sample's control latents of every task; `first` has some of its posteriors."""
    known = {
        golden.meta["values"]["modes"][0]: first.control_posterior,
        "allview": first.target_posterior,
    }
    frames = frozen.frames[:1]
    for task in golden.cases(r"control/(\w+)/"):
        posterior = known.get(task)
        if posterior is None:
            posterior = encode_joint(*frozen.modules, keep_given_frames(frames, [task]))
        # Draw 0 is the adapter's, draw 1 the appearance VAE's.
        noise = posterior_noise(golden, 1), posterior_noise(golden, 0)
        control = training_control(posterior, [task], frames.shape[1], *noise)
        golden.check(f"control/{task}/latents", control, TOLERANCE)
        golden.check(f"control/{task}/mask_row", mask_row(control))
        half = control.shape[-1] // 2
        name = f"control_{task}_geo_half_absmean"
        mean = control[:, :-4, ..., half:].abs().mean().item()
        check_value(golden, name, mean, golden.meta["values"][name])
        # Zeros there, as at inference, would not be upstream's training step.
        zeroed = control.clone()
        zeroed[:, :-4, ..., half:] = 0
        stored, stride = golden.stored(f"control/{task}/latents") or ("", 1)
        assert relative_error(zeroed[..., ::stride, ::stride], golden[stored]) > 100 * TOLERANCE


def noisy_batch(golden: Golden, clean: Tensor) -> FlowSample:
    scheduler = make_euler_scheduler(**golden.meta["scheduler"])
    noise = shared_noise(golden, "noise")
    noise = torch.cat([noise, noise.flip(-1)])
    sample = flow_sample(scheduler, clean, noise, golden["mid/indices"])
    golden.check("mid/sigmas", sample.sigmas)
    golden.check("mid/timesteps", sample.timesteps)
    golden.check("mid/noisy", sample.noisy, TOLERANCE)
    golden.check("mid/target", sample.target, TOLERANCE)
    return sample


def test_one_step(golden: Golden) -> None:
    values = golden.meta["values"]
    frozen = Frozen(golden)
    batch = frozen.batch()
    check_controls(golden, frozen, batch[0])
    tokens = [s.target_posterior.tokens for s in batch]
    golden.check("mid/vggt_latents", torch.cat(tokens), TOLERANCE)
    clean = torch.cat([s.latents for s in batch])
    control = torch.cat([s.control for s in batch])
    golden.check("mid/combined_latents", clean, TOLERANCE)
    golden.check("mid/control_latents", control, TOLERANCE)
    sample = noisy_batch(golden, clean)
    text = frozen.text()
    embedded = pad_text(text, golden["mid/prompt_embeds"].shape[1])
    golden.check("mid/prompt_embeds", embedded, TOLERANCE)

    transformer = build_component(frozen.source, "transformer").requires_grad_(True)
    image = frozen.image_features()
    golden.check("control/clip_context", image[:1], TOLERANCE)

    def conditions(dropped: bool) -> Conditions:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        cameras = encode_camera_batch(golden["in/c2ws"], golden["in/Ks"], *size, dropped=dropped)
        if not dropped:
            golden.check("mid/plucker", cameras, TOLERANCE)
        return transformer.condition(text, image, control, cameras)

    step = diffusion_step(transformer, sample, conditions(dropped=False))
    step.loss.backward()
    golden.check("out/camera/noise_pred", step.prediction, TOLERANCE)
    check_value(golden, "loss_camera", step.loss.item(), values["loss_camera"])
    for row, value in enumerate(values["loss_per_sample_camera"]):
        check_value(golden, f"loss_per_sample_camera/{row}", step.per_sample[row].item(), value)
    gradients = {name: p.grad for name, p in transformer.named_parameters()}
    check_gradients(golden, gradients, values["grad_norm_per_param"], values["total_grad_norm"])

    with torch.no_grad():
        step = diffusion_step(transformer, sample, conditions(dropped=True))
    golden.check("out/camera_dropped/noise_pred", step.prediction, TOLERANCE)
    check_value(golden, "loss_camera_dropped", step.loss.item(), values["loss_camera_dropped"])
    for row, value in enumerate(values["loss_per_sample_camera_dropped"]):
        name = f"loss_per_sample_camera_dropped/{row}"
        check_value(golden, name, step.per_sample[row].item(), value)
