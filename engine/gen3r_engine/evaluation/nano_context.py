"""What the parts of the nano suite share: the clips, the truth, the baselines, the sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from gen3r_engine.engine import Engine
from gen3r_engine.evaluation import held_out, measures
from gen3r_engine.evaluation.figures import Figure
from gen3r_engine.evaluation.sampling import Sampler
from gen3r_training.procedural import Clips

Told = Callable[[str, int, int], None]  # part, scenes done, scenes in all
SHOWN = 3  # scenes of a contact sheet


@dataclass
class Context:
    """One run of the suite.

    seed : of the clips.
    kept : part -> generated frames and depth of the first scenes, for a contact sheet.
    """

    engine: Engine
    sampler: Sampler
    clips: Clips
    seed: int
    told: Told
    kept: dict[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def keep(
        self,
        part: str,
        rgb: Tensor | None,  # [N, F, H, W, 3] uint8
        depth: Tensor | None,  # [N, F, H, W]
    ) -> None:
        """Remember a part's first scenes for the contact sheet, on the host."""
        self.kept[part] = (
            None if rgb is None else rgb[:SHOWN].cpu(),
            None if depth is None else depth[:SHOWN].cpu(),
        )

    @cached_property
    def true_depth(self) -> Tensor:  # [N, F, H, W] float32
        """On the host; 0 where there is none."""
        return self.clips.depth.cpu().float()

    @cached_property
    def true_w2c(self) -> Tensor:  # [N, F, 4, 4] float64
        """On the host."""
        return held_out.true_w2c(self.clips)

    @cached_property
    def depth_baselines(self) -> dict[str, tuple[float, ...]]:
        """AbsRel of the mean depth of training clips, pixel by pixel, and of a constant."""
        size, device = self.clips.rgb.shape[2], self.clips.rgb.device
        mean = held_out.mean_depth(seed=self.seed, size=size, device=device)
        truth = self.true_depth
        constant = torch.ones_like(mean)
        return {
            "mean depth": measures.depth_errors(mean.expand_as(truth), truth),
            "constant": measures.depth_errors(constant.expand_as(truth), truth),
        }

    def pose_figures(
        self, part: str, name: str, auc: tuple[float, ...], bar: float | None = None
    ) -> list[Figure]:
        """The pose AUC of all scenes, then of the built-in moves and of the random paths apart."""
        still = self.pose_baselines["identity"]
        figures = [Figure(part, name, "", auc, bar, baselines=self.pose_baselines)]
        for kind, of_kind in (("built-in moves", False), ("random paths", True)):
            rows = [i for i, move in enumerate(self.clips.moves) if (move == "random") == of_kind]
            values, baseline = tuple(auc[i] for i in rows), tuple(still[i] for i in rows)
            if rows:
                baselines, note = {"identity": baseline}, f"{len(rows)} scenes"
                figures.append(
                    Figure(part, f"{name}, {kind}", "", values, baselines=baselines, note=note)
                )
        return figures

    @cached_property
    def pose_baselines(self) -> dict[str, tuple[float, ...]]:
        """AUC of cameras that stand still."""
        still = torch.eye(4, dtype=torch.float64).expand_as(self.true_w2c)
        return {"identity": measures.pose_aucs(still, self.true_w2c)}
