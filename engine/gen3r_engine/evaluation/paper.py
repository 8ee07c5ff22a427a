"""The paper's protocol on real data sets, for any preset (Gen3R, arXiv 2601.04090, section 4).

gen3r-engine eval --suite paper --pretrained checkpoints/gen3r --preset fp8 \\
    --data realestate10k=data/re10k wildrgbd=data/wildrgbd --rows results/paper-fp8.jsonl

Data roots are in the layout that ``gen3r-engine prepare`` writes. Generation (``1view``, ``2view``)
gets the true cameras; reconstruction (``allview``) gets all frames and no cameras. Every scene
becomes one JSON row in the file of --rows, as soon as it is measured; the same command continues
where it was cut off. Means over scenes are printed with the paper's own figures.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen3r.scene import Scene, SceneRequest
    from gen3r_engine.engine import Engine
    from gen3r_engine.evaluation.paper_data import ClipPlace, Truth
    from gen3r_engine.evaluation.paper_report import Row, Rows

TASKS = ("1view", "2view", "allview")
NETS = ("alex", "vgg", "squeeze")
CHUNK = 4  # scenes that are read ahead: 184 MB of frames each at the paper's size
STEPS, SEED, SOLVER = 50, 42, "euler"


def add_paper_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that only this suite has.

    `run_paper` also reads scenes, steps, guidance, solver, seed and pretrained_model_name_or_path
    from the arguments; each may be None: the paper's counts, 50, the model's own, euler, 42, the
    embedded model.
    """
    add = parser.add_argument_group("suite paper").add_argument
    add(
        "--data",
        nargs="+",
        metavar="NAME=DIR",
        help="data roots: realestate10k, dl3dv, co3d, wildrgbd, tartanair",
    )
    add("--split", choices=("train", "val"), default="val", help="of the data (default: val)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all three")
    add("--frames", type=int, help="frames of a clip, 4k + 1 (default: the model's)")
    add("--size", type=int, help="pixels, a multiple of 56 (default: the model's)")
    add("--stride", type=int, default=1, help="every so many frames (default: 1)")
    add("--lpips-net", choices=NETS, default="alex", help="net of LPIPS (default: alex)")
    add(
        "--rows",
        type=Path,
        default=Path("paper.jsonl"),
        metavar="FILE",
        help="one JSON row a scene and task; scenes in it are not made again (paper.jsonl)",
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
        for name in ("scenes", "stride", "steps"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} is below 1; use 1 or more")
        roots = parse_roots(args.data)
        for root in roots.values():
            scene_paths(root, args.split)  # known before the model is loaded
        if not args.rows.parent.is_dir():
            raise ValueError(f"--rows {args.rows}: no folder {args.rows.parent}; make it first")
        if args.rows.is_dir():
            raise ValueError(f"--rows {args.rows} is a folder; give a file")
        return cls(
            roots=roots,
            split=args.split,
            tasks=tuple(task for task in TASKS if task in args.tasks),
            scenes=args.scenes,
            frames=args.frames,
            size=args.size,
            stride=args.stride,
            steps=STEPS if args.steps is None else args.steps,
            guidance=args.guidance,
            solver=SOLVER if args.solver is None else args.solver,
            seed=SEED if args.seed is None else args.seed,
            lpips_net=args.lpips_net,
            rows=args.rows,
            model=args.pretrained_model_name_or_path,
        )


def run_paper(args: argparse.Namespace, load: Callable[[], Engine]) -> int:
    """Measure what is not in the rows yet, print the table; the exit code (0).

    Parameters
    ----------
    args : of `add_paper_arguments`, and the flags named there.
    load : makes the engine; called once, after the flags have been checked.

    Raises
    ------
    ValueError : wrong flags or data, in one line. OSError : the rows cannot be written.
    Others : as `Engine.stream`.
    """
    from gen3r_engine.evaluation.images import lpips_problem
    from gen3r_engine.evaluation.paper_report import Rows, show, summary

    options = PaperOptions.of(args)
    problem = lpips_problem(options.lpips_net)
    evaluation = _Evaluation(load(), options, options.lpips_net if problem is None else None)
    rows = Rows(options.rows, evaluation.settings)
    notes = [] if problem is None else [f"LPIPS is not measured: {problem}"]
    if rows.damaged:
        notes.append(f"{options.rows}: {rows.damaged} damaged line(s) do not count")
    wanted: list[Row] = []
    for dataset in options.roots:
        clips, left_out = evaluation.choose(dataset)
        if left_out:
            name, reason = next(iter(left_out.items()))
            notes.append(f"{dataset}: {len(left_out)} scene(s) left out; {name}: {reason}")
        for task in options.tasks:
            wanted += [_key(clip, task) for clip in clips]
            evaluation.run(task, [clip for clip in clips if not rows.has(_key(clip, task))], rows)
    kept = [row for row in rows.kept if {name: row[name] for name in wanted[0]} in wanted]
    show(summary(kept, list(options.roots), options.tasks, evaluation.caption, notes))
    return 0


def _key(clip: ClipPlace, task: str) -> Row:
    """What says which scene a row is of."""
    return {
        "dataset": clip.dataset,
        "scene": clip.name,
        "cameras": clip.scene.cameras_digest[:16],
        "task": task,
    }


@dataclass
class _Evaluation:
    """One engine and one way of measuring."""

    engine: Engine
    options: PaperOptions
    lpips_net: str | None

    def __post_init__(self) -> None:
        from gen3r_training.data.dataset import check_clip

        own = self.engine.pipeline.config
        self.frames, self.size = self.options.frames, self.options.size
        self.frames = own.num_frames if self.frames is None else self.frames
        self.size = own.size if self.size is None else self.size
        check_clip(self.frames, self.size, self.options.stride)
        given = self.options.guidance
        self.guidance = own.guidance_scale if given is None else given

    @property
    def settings(self) -> dict[str, Any]:
        """All that the figures of a scene depend on, but for the scene and the task."""
        from gen3r_engine.evaluation.paper_report import weights_digest

        options, choice = self.options, self.engine.choice
        return {
            "model": options.model,
            "weights": weights_digest(self.engine.pipeline),
            "text_encoder": self.engine.model.fingerprint[:16],
            "preset": choice.preset,
            "dtype": choice.dtype,
            "attention": choice.attention,
            "encoder_precision": self.engine.config.encoder_precision,
            "split": options.split,
            "frames": self.frames,
            "size": self.size,
            "stride": options.stride,
            "steps": options.steps,
            "guidance": self.guidance,
            "solver": options.solver,
            "seed": options.seed,
            "lpips": self.lpips_net,
        }

    @property
    def caption(self) -> str:
        """How the figures were measured, in a line."""
        options, choice = self.options, self.engine.choice
        lpips = "" if self.lpips_net is None else f", LPIPS {self.lpips_net}"
        return (
            f"{options.model or 'the embedded model'}, preset {choice.preset} ({choice.dtype}); "
            f"{self.frames} frames, {self.size} px, stride {options.stride}; {options.steps} "
            f"{options.solver} steps, guidance {self.guidance:g}, seed {options.seed}{lpips}; "
            "mean ± standard error over scenes; published: arXiv 2601.04090v2"
        )

    def choose(self, dataset: str) -> tuple[list[ClipPlace], dict[str, str]]:
        """The clips of a data set, and scenes left out with the reason."""
        from gen3r_engine.evaluation.paper_data import DATA_SETS, choose_clips

        return choose_clips(
            dataset,
            self.options.roots[dataset],
            self.options.split,
            count=self.options.scenes or DATA_SETS[dataset].scenes,
            frames=self.frames or 0,
            stride=self.options.stride,
            seed=self.options.seed,
        )

    def run(self, task: str, clips: Sequence[ClipPlace], rows: Rows) -> None:
        """Generate and measure clips of one data set; every one becomes a row."""
        from rich.console import Console
        from rich.progress import track

        from gen3r_engine.evaluation.paper_data import DATA_SETS
        from gen3r_engine.evaluation.paper_scores import figures_of, score

        if not clips:
            return
        figures = figures_of(task, DATA_SETS[clips[0].dataset].geometry)
        text = f"{clips[0].dataset} {task}"
        with contextlib.closing(self._scenes(task, clips)) as pairs:
            made = track(pairs, text, total=len(clips), console=Console(stderr=True))
            for clip, (truth, scene) in zip(clips, made, strict=True):
                found = score(
                    scene,
                    truth,
                    figures,
                    lpips_net=self.lpips_net,
                    seed=self.options.seed,
                    device=self.engine.device,
                )
                rows.add(_key(clip, task), found)

    def _scenes(
        self, task: str, clips: Sequence[ClipPlace]
    ) -> Generator[tuple[Truth, Scene], None, None]:
        """The truth and the generated scene of every clip, a few being read at a time."""
        from gen3r_engine.evaluation.paper_data import DATA_SETS, read_truth

        chunk = max(CHUNK, self.engine.config.max_batch)
        for start in range(0, len(clips), chunk):
            part = clips[start : start + chunk]
            depth = DATA_SETS[part[0].dataset].geometry
            truths = [read_truth(clip, self.size or 0, depth) for clip in part]
            requests = [
                self._request(task, clip, truth) for clip, truth in zip(part, truths, strict=True)
            ]
            scenes = self.engine.stream(
                requests,
                steps=self.options.steps,
                guidance=self.guidance,
                solver=self.options.solver,
            )
            with contextlib.closing(scenes):
                yield from zip(truths, scenes, strict=True)

    def _request(self, task: str, clip: ClipPlace, truth: Truth) -> SceneRequest:
        """Generation gets the true cameras, reconstruction none."""
        from gen3r.conditioning import given_frames
        from gen3r.scene import Cameras, SceneRequest
        from gen3r_training.data.samples import derive_seed

        frames, size = len(truth.frames), truth.frames.shape[-1]
        cameras = "free" if task == "allview" else Cameras(truth.w2c, truth.intrinsics)
        return SceneRequest(
            [truth.frames[index] for index in given_frames(task, frames)],
            prompt=truth.prompt,
            task=task,
            cameras=cameras,
            num_frames=frames,
            height=size,
            width=size,
            seed=derive_seed("paper noise", self.options.seed, clip.dataset, clip.name, task),
        )
