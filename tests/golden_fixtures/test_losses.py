"""Golden fixture `losses`: every term of both training stages."""

from __future__ import annotations

import torch
from torch import Tensor

from gen3r_training.losses import (
    adaptive_weight,
    camera_loss,
    camera_loss_terms,
    dense_loss,
    filter_by_quantile,
    gaussian_kl,
    linear_decay,
    truncated_square,
)
from tests.golden_fixtures.golden import Golden, relative_error

KIND = "losses"
TOLERANCE = 1e-4  # the fixtures' README for losses


def check_value(golden: Golden, name: str, actual: float | Tensor) -> None:
    """Compare with an entry of the metadata's `values`."""
    reference = torch.as_tensor(golden.meta["values"][name], dtype=torch.float64)
    golden.compare(name, torch.as_tensor(actual).double(), reference, TOLERANCE)


def test_camera_losses(golden: Golden) -> None:
    prediction, target = golden["cam/pred"].unbind(0), golden["cam/gt"].unbind(0)
    for name in golden.meta["values"]:
        if name.startswith("camera_loss_"):
            kind = name.removeprefix("camera_loss_")
            check_value(golden, name, camera_loss(prediction, target, kind))
    terms = camera_loss_terms(prediction[0], target[0])
    check_value(golden, "camera_single_TRF_stage0", torch.stack(terms))


def test_depth_and_point_losses(golden: Golden) -> None:
    depth = golden["depth/pred_nan_at_0_0_0_0"].clone()
    depth[0, 0, 0, 0, 0] = torch.nan  # stored as 0
    pairs = {
        "depth": (depth, golden["depth/gt"]),
        "point": (golden["point/pred"], golden["point/gt"]),
    }
    for name, pair in pairs.items():
        check_value(golden, f"{name}_loss", dense_loss(*pair))
        check_value(golden, f"{name}_loss_power", dense_loss(*pair, power=2.0))


def test_quantile_filter(golden: Golden) -> None:
    for name in golden.meta["values"]:
        if name.startswith("quantile_") and name.endswith("_mean"):
            fraction = name.removeprefix("quantile_").removesuffix("_mean")
            kept = filter_by_quantile(golden["quantile/in"], float(fraction))
            check_value(golden, name, kept.mean())
            check_value(golden, f"quantile_{fraction}_count", float(kept.numel()))


def test_adaptive_weights(golden: Golden) -> None:
    rows = torch.tensor(golden.meta["values"]["adaptive_weight"], dtype=torch.float64)
    actual = torch.tensor([adaptive_weight(t, c) for t, c, _ in rows.tolist()])
    # Weights are powers of ten over many orders: compare their exponents.
    golden.compare("adaptive_weight", actual.log10().round(), rows[:, 2].log10().round(), 0.0)


def test_kl_keeps_the_width_axis(golden: Golden) -> None:
    a, b = golden["kl/params_a"].chunk(2, 1), golden["kl/params_b"].chunk(2, 1)
    golden.check("kl/a_vs_b", gaussian_kl(*a, *b))
    golden.check("kl/a_vs_normal", gaussian_kl(*a))
    check_value(golden, "kl_a_std_normal", gaussian_kl(*a))


def test_truncated_mse(golden: Golden) -> None:
    pair = golden["mse50/pred"], golden["mse50/target"]
    check_value(golden, "mse50", truncated_square(*pair).mean())
    check_value(golden, "mse50_plain", truncated_square(*pair, limit=float("inf")).mean())


def test_linear_decay(golden: Golden) -> None:
    rows = golden.meta["values"]["linear_decay"]
    start, end = rows[0][1], rows[-1][1]
    # The decay's length, which the rows do not name, from a row inside the ramp.
    inside = next((step, value) for step, value in rows if end < value < start)
    length = round(inside[0] * (start - end) / (start - inside[1]))
    actual = [linear_decay(int(step), length, start, end) for step, _ in rows]
    golden.compare(
        "linear_decay", torch.tensor(actual), torch.tensor([v for _, v in rows]), TOLERANCE
    )


def test_wrong_variants_fail(golden: Golden) -> None:
    values = golden.meta["values"]
    nan = golden["depth/pred_nan_at_0_0_0_0"]  # the NaN taken as 0 instead of as no error
    assert abs(dense_loss(nan, golden["depth/gt"]) / values["depth_loss"] - 1) > 10 * TOLERANCE
    mean, logvar = golden["kl/params_a"].chunk(2, 1)
    all_axes = gaussian_kl(mean, logvar).sum(1, keepdim=True).expand(-1, mean.shape[-1])
    assert relative_error(all_axes, golden["kl/a_vs_normal"]) > 100 * TOLERANCE
