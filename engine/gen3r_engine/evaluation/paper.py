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
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gen3r_engine.evaluation.paper_options import PaperOptions

if TYPE_CHECKING:
    from gen3r.scene import Scene, SceneRequest
    from gen3r_engine.engine import Engine
    from gen3r_engine.evaluation.paper_data import ClipPlace, Draw, Truth
    from gen3r_engine.evaluation.paper_report import Row, Rows

CHUNK = 4  # scenes that are read ahead: 184 MB of frames each at the paper's size
SHOWN = 5  # scenes left out that are named


def run_paper(args: argparse.Namespace, load: Callable[[], Engine]) -> int:
    """Measure what is not in the rows yet, print the table; the exit code (0).

    Parameters
    ----------
    args : of `add_paper_arguments`, and the flags named there, checked as `eval` does.
    load : makes the engine; called once, after the flags have been checked.

    Raises
    ------
    ValueError : wrong flags or data, in one line. OSError : the rows cannot be written.
    Others : as `Engine.stream`, with a note that names the scene.
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
        drawn = evaluation.draw(dataset)
        for task in options.tasks:
            evaluation.run(task, drawn, rows)
        wanted += [_key(clip, task) for task in options.tasks for clip in drawn.clips]
        if drawn.left_out:
            reasons = [f"{name}: {reason}" for name, reason in drawn.left_out.items()]
            # The last ones: scenes whose files are damaged are met when clips are read.
            more = [f"and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else []
            told = "; ".join([*reasons[-SHOWN:], *more])
            notes.append(f"{dataset}: {len(reasons)} scene(s) left out; {told}")
    kept = [row for row in rows.kept if {name: row[name] for name in wanted[0]} in wanted]
    lost = sum("auc30" in row["figures"] and "rre" not in row["figures"] for row in kept)
    if lost:
        notes.append(f"{lost} row(s) have cameras that are not finite: AUC 0, no RRE and no RTE")
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


@contextlib.contextmanager
def _naming(clips: Sequence[ClipPlace], task: str) -> Iterator[None]:
    """Errors inside say of which scenes they are."""
    try:
        yield
    except Exception as error:
        # Of scenes that are made together an error may know which of them failed.
        failed = [clips[index].name for index in getattr(error, "indices", range(len(clips)))]
        error.add_note(f"{clips[0].dataset} {task}, scene {', '.join(failed)}")
        raise


@dataclass
class _Evaluation:
    """One engine and one way of measuring."""

    engine: Engine
    options: PaperOptions
    lpips_net: str | None

    def __post_init__(self) -> None:
        own = self.engine.pipeline.config
        frames, size, given = self.options.frames, self.options.size, self.options.guidance
        self.frames: int = own.num_frames if frames is None else frames
        self.size: int = own.size if size is None else size
        self.guidance = own.guidance_scale if given is None else given

    @property
    def settings(self) -> dict[str, Any]:
        """All that the figures of a scene depend on, but for the scene and the task."""
        from gen3r_engine.evaluation.record import weights_digest

        options, choice, plans = self.options, self.engine.choice, self.engine.plans
        return {
            **({} if plans is None else {"plans": plans.folders}),
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

    def draw(self, dataset: str) -> Draw:
        """The clips of a data set."""
        from gen3r_engine.evaluation.paper_data import DATA_SETS, Draw

        return Draw(
            dataset,
            self.options.roots[dataset],
            self.options.split,
            count=self.options.scenes or DATA_SETS[dataset].scenes,
            frames=self.frames,
            stride=self.options.stride,
            seed=self.options.seed,
        )

    def run(self, task: str, drawn: Draw, rows: Rows) -> None:
        """Generate and measure the clips that are not in the rows; every one becomes a row."""
        from rich.console import Console
        from rich.progress import track

        from gen3r_engine.evaluation.paper_data import DATA_SETS
        from gen3r_engine.evaluation.paper_scores import figures_of, score

        missing = [clip for clip in drawn.clips if not rows.has(_key(clip, task))]
        if not missing:
            return
        figures = figures_of(task, DATA_SETS[drawn.dataset].geometry)
        text, console = f"{drawn.dataset} {task}", Console(stderr=True)
        with contextlib.closing(self._scenes(task, drawn, missing, rows)) as scenes:
            for clip, truth, scene in track(scenes, text, total=len(missing), console=console):
                with _naming([clip], task):
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
        self, task: str, drawn: Draw, missing: Sequence[ClipPlace], rows: Rows
    ) -> Generator[tuple[ClipPlace, Truth, Scene], None, None]:
        """The truth and the generated scene of every clip, a few being read at a time."""
        chunk = max(CHUNK, self.engine.config.max_batch)
        waiting = deque(missing)
        while waiting:
            part: list[tuple[ClipPlace, Truth, SceneRequest]] = []
            while waiting and len(part) < chunk:
                clip = waiting.popleft()
                try:
                    part.append((clip, *self._read(task, clip)))
                except (ValueError, OSError) as error:  # it gives its place to the next scene
                    other = drawn.leave_out(clip, str(error))
                    if other is not None and not rows.has(_key(other, task)):
                        waiting.append(other)
            if part:
                yield from self._made(task, part)

    def _made(
        self, task: str, part: Sequence[tuple[ClipPlace, Truth, SceneRequest]]
    ) -> Generator[tuple[ClipPlace, Truth, Scene], None, None]:
        with _naming([clip for clip, _, _ in part], task):
            scenes = self.engine.stream(
                [request for _, _, request in part],
                steps=self.options.steps,
                guidance=self.guidance,
                solver=self.options.solver,
            )
            with contextlib.closing(scenes):
                for (clip, truth, _), scene in zip(part, scenes, strict=True):
                    yield clip, truth, scene

    def _read(self, task: str, clip: ClipPlace) -> tuple[Truth, SceneRequest]:
        """Generation gets the true cameras, reconstruction none."""
        from gen3r.conditioning import given_frames
        from gen3r.scene import Cameras, SceneRequest
        from gen3r_engine.evaluation.paper_data import DATA_SETS, read_truth
        from gen3r_training.data.samples import derive_seed

        truth = read_truth(clip, self.size, DATA_SETS[clip.dataset].geometry)
        return truth, SceneRequest(
            [truth.frames[index] for index in given_frames(task, self.frames)],
            prompt=truth.prompt,
            task=task,
            cameras="free" if task == "allview" else Cameras(truth.w2c, truth.intrinsics),
            num_frames=self.frames,
            height=self.size,
            width=self.size,
            seed=derive_seed("paper noise", self.options.seed, clip.dataset, clip.name, task),
        )
