"""The flags of suite ``paper``, and what they come to."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

TASKS = ("1view", "2view", "allview")
STEPS, SEED, SOLVER = 50, 42, "euler"
SPLIT, STRIDE, NET, ROWS = "val", 1, "alex", Path("paper.jsonl")


def add_paper_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that only this suite has; their defaults are None, which `PaperOptions.of` fills.

    `run_paper` also reads scenes, frames, size, steps, guidance, solver, seed and
    pretrained_model_name_or_path from the arguments; each may be None: the paper's counts, the
    model's own two, 50, the model's own, euler, 42, the embedded model.
    """
    add = parser.add_argument_group("suite paper").add_argument
    add(
        "--data",
        nargs="+",
        metavar="NAME=DIR",
        help="data roots: realestate10k, dl3dv, co3d, wildrgbd, tartanair",
    )
    add("--split", choices=("train", "val"), help=f"of the data (default: {SPLIT})")
    add("--tasks", nargs="+", choices=TASKS, help="default: all three")
    add("--stride", type=int, help=f"every so many frames (default: {STRIDE})")
    add("--lpips-net", metavar="NET", help=f"of LPIPS: alex, vgg or squeeze (default: {NET})")
    add(
        "--rows",
        type=Path,
        metavar="FILE",
        help=f"one JSON row a scene and task; scenes in it are not made again (default: {ROWS})",
    )


@dataclass(frozen=True)
class PaperOptions:
    """What is measured and how; `of` reads it from the arguments.

    roots : by data set. scenes : of each, None: as many as the paper. frames, size : None: the
    model's own. model : the checkpoint's name, None: the embedded model.
    """

    roots: dict[str, Path]
    split: str
    tasks: tuple[str, ...]
    scenes: int | None
    frames: int | None
    size: int | None
    stride: int
    steps: int
    guidance: float | None
    solver: str
    seed: int
    lpips_net: str
    rows: Path
    model: str | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> PaperOptions:
        """Checked options. ValueError names the flag, the value and what to give."""
        from gen3r_engine.evaluation.paper_data import parse_roots
        from gen3r_training.data.layout import scene_paths

        if not args.data:
            raise ValueError("--suite paper needs --data NAME=DIR; gen3r-engine prepare writes DIR")
        roots, split = parse_roots(args.data), args.split or SPLIT
        for name, root in roots.items():
            try:
                scene_paths(root, split)  # known before the model is loaded
            except ValueError as error:  # which speaks of the flag of training
                text = str(error).replace(f"--data_root {root}", f"--data {name}={root}")
                raise ValueError(text) from error
        return cls(
            roots=roots,
            split=split,
            tasks=tuple(task for task in TASKS if args.tasks is None or task in args.tasks),
            scenes=args.scenes,
            frames=args.frames,
            size=args.size,
            stride=STRIDE if args.stride is None else args.stride,
            steps=STEPS if args.steps is None else args.steps,
            guidance=args.guidance,
            solver=SOLVER if args.solver is None else args.solver,
            seed=SEED if args.seed is None else args.seed,
            lpips_net=args.lpips_net or NET,
            rows=args.rows or ROWS,
            model=args.pretrained_model_name_or_path,
        )
