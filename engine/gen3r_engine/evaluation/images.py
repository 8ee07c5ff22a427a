"""PSNR, SSIM and LPIPS of frames against true frames, one value a frame, by torchmetrics.

    psnr(scene.rgb, truth).mean()

LPIPS (Zhang et al., arXiv 1801.03924) needs torchvision and the ImageNet weights of its backbone,
which torchvision downloads once; a suite asks `lpips_problem` first and prints "not measured" where
they cannot be had.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from gen3r.run import full_float32
from gen3r_engine.evaluation.geometry import Array, Floats

BATCH = 8  # frames at once: the filters of SSIM and LPIPS keep several copies of each
NETS = {  # net of LPIPS: the backbone's file as torchvision names it
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def psnr(
    predicted: Array,  # uint8 [N, H, W, 3] in 0 ... 255, or float [N, 3, H, W] in [0, 1]
    truth: Array,  # same form
) -> Floats:  # [N] dB
    """10 log10(1 / mean squared error) of each frame; infinite where the frames are equal.

    Raises
    ------
    ValueError : frames that do not agree or are of neither form; torchmetrics is not installed.
    """
    _need_torchmetrics()
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def measure(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()
        return peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))

    return _by_frame(measure, predicted, truth)


def ssim(
    predicted: Array,  # uint8 [N, H, W, 3] in 0 ... 255, or float [N, 3, H, W] in [0, 1]
    truth: Array,  # same form
) -> Floats:  # [N] in [-1, 1]
    """Structural similarity of each frame: Gaussian window of 11 pixels, sigma 1.5 (Wang 2004).

    In full float32: a variance is a small difference of filtered squares, which TF32 would spoil.

    Raises
    ------
    ValueError : as `psnr`.
    """
    _need_torchmetrics()
    from torchmetrics.functional.image import structural_similarity_index_measure

    def measure(a: Tensor, b: Tensor) -> Tensor:
        with full_float32(True):
            values = structural_similarity_index_measure(
                a.float(), b.float(), data_range=1.0, reduction="none"
            )
        return values[0] if isinstance(values, tuple) else values

    return _by_frame(measure, predicted, truth)


def lpips(
    predicted: Array,  # uint8 [N, H, W, 3] in 0 ... 255, or float [N, 3, H, W] in [0, 1]
    truth: Array,  # same form
    net: str = "alex",
) -> Floats:  # [N], less is better
    """Learned perceptual distance of each frame; `net`: ``alex``, ``vgg`` or ``squeeze``.

    Raises
    ------
    ValueError : as `psnr`; an unknown net; torchvision or the backbone's weights are missing (the
        text says how to get them).
    """
    problem = lpips_problem(net)
    if problem is not None:
        raise ValueError(problem)
    device = predicted.device if isinstance(predicted, Tensor) else torch.device("cpu")
    network = _lpips_network(net).to(device)

    def measure(a: Tensor, b: Tensor) -> Tensor:
        return network(a, b, normalize=True).flatten()

    return _by_frame(measure, predicted, truth)


def lpips_problem(net: str = "alex") -> str | None:
    """Why LPIPS cannot be measured here, with the mend, or None. Nothing is downloaded.

    Raises
    ------
    ValueError : an unknown net.
    """
    if net not in NETS:
        raise ValueError(f"LPIPS net '{net}' is unknown; known: {', '.join(NETS)}")
    for package in ("torchmetrics", "torchvision"):
        if importlib.util.find_spec(package) is None:
            return f"LPIPS needs {package}, which is not installed; pip install {package}"
    file = Path(torch.hub.get_dir()) / "checkpoints" / NETS[net]
    if not file.is_file():
        address = f"https://download.pytorch.org/models/{NETS[net]}"
        return f"LPIPS needs the {net} weights: download {address} to {file}"
    return None


@lru_cache(maxsize=1)
def _lpips_network(net: str) -> Any:
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    return _NoTrainLpips(net=cast(Literal["alex", "vgg", "squeeze"], net))


def _need_torchmetrics() -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError("torchmetrics is not installed; pip install 'gen3r-engine[eval]'")


def _by_frame(measure: Any, predicted: Array, truth: Array) -> Floats:
    a, b = _frames(predicted, "predicted"), _frames(truth, "truth")
    if a.shape != b.shape:
        raise ValueError(f"predicted frames {list(a.shape)} against true ones {list(b.shape)}")
    with torch.no_grad():
        parts = [
            measure(_unit(x), _unit(y.to(x.device)))
            for x, y in zip(a.split(BATCH), b.split(BATCH), strict=True)
        ]
    return torch.cat([part.reshape(-1) for part in parts]).cpu().double().numpy()


def _frames(values: Array, name: str) -> Tensor:  # [N, 3, H, W] uint8 or float
    frames = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)
    elif not (frames.is_floating_point() and frames.ndim == 4 and frames.shape[1] == 3):
        raise ValueError(
            f"{name} frames are {frames.dtype} {list(frames.shape)}; give uint8 [N, H, W, 3] or "
            "float [N, 3, H, W] in [0, 1]"
        )
    if len(frames) == 0:
        raise ValueError(f"no {name} frames")
    return frames


def _unit(frames: Tensor) -> Tensor:
    """float32 in [0, 1]."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float().clamp(0, 1)
