"""Measure how good a model's scenes are, on scenes whose truth is known.

gen3r-engine eval --suite nano                                     # the embedded model, 50 scenes
gen3r-engine eval --suite nano --parts vae,1view --scenes 4 --steps 20 --sheet sheet.png
gen3r-engine eval --suite nano --pretrained outputs/nano --json nano.json
gen3r-engine eval --suite yardstick --json quality.jsonl --markdown quality.md
gen3r-engine eval --suite yardstick --knobs 'euler*' fp8           # some of its rows
gen3r-engine eval --suite yardstick --without compiled '??gb'      # all but some of them
gen3r-engine eval --suite paper --pretrained checkpoints/gen3r --data realestate10k=data/re10k

nano: held-out procedural scenes with exact depth and cameras, each figure with its trivial answers
beside it. yardstick: every preset and knob against the exact preset and against the truth, with its
time. paper: the paper's protocol on real data sets, its published figures beside.
Exit code 0: measured (bars that are missed are marked); 1: failed; 2: wrong input.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r_engine.cli.errors import UsageError, user_input
from gen3r_engine.cli.files import check_file, check_picture, write_file
from gen3r_engine.cli.model import add_model_arguments, engine_config, load_engine
from gen3r_engine.cli.progress import StageProgress
from gen3r_engine.cli.requests import check_clip
from gen3r_engine.evaluation.paper_options import ROWS, add_paper_arguments

if TYPE_CHECKING:
    from gen3r_engine.engine import Engine

HELP = "measure quality on held-out scenes, against every preset, or as the paper does"
SUITES = ("nano", "yardstick", "paper")
SCENES = {"nano": 50, "yardstick": 16}
BATCH = 8  # of suites on small models; paper: 1
ONLY = {  # flags that belong to some suites
    "parts": ("nano",),
    "sheet": ("nano",),
    "knobs": ("yardstick",),
    "without": ("yardstick",),
    "markdown": ("yardstick",),
    "json": ("nano", "yardstick"),
    "commit": ("nano", "yardstick"),
    **{name: ("paper",) for name in ("data", "split", "tasks", "stride", "lpips_net", "rows")},
    "plans": ("paper",),  # the others run the model's own modules
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `eval`."""
    add = parser.add_argument
    add("--suite", choices=SUITES, required=True, help="what is measured")
    add("--scenes", type=int, help="held-out scenes (default: nano 50, yardstick 16)")
    add("--frames", type=int, help="frames of a clip, 4k + 1 and 5 or more (default: the model's)")
    add("--size", type=int, help="pixels, a multiple of 56 (default: the model's)")
    add("--steps", type=int, help="denoising steps (default: 50)")
    add("--guidance", type=float, help="guidance scale (default: the model's)")
    add("--solver", help="euler, unipc or dpm++ (default: euler)")
    add("--seed", type=int, help="of the held-out scenes; paper: of the noise")
    add = parser.add_argument_group("suites nano and yardstick").add_argument
    add("--parts", metavar="LIST", help="nano: comma list of its parts (default: all of them)")
    add("--sheet", type=Path, metavar="FILE.png", help="nano: truth and results as one picture")
    add("--knobs", nargs="+", metavar="NAME", help="yardstick: these rows (* and ? allowed)")
    add("--without", nargs="+", metavar="NAME", help="yardstick: leave these rows out")
    add("--markdown", type=Path, metavar="FILE", help="yardstick: the table (default: printed)")
    add("--json", type=Path, metavar="FILE", help="all figures; yardstick: one row a line")
    add("--commit", help="commit to record where the tree is not a git checkout")
    add_paper_arguments(parser)
    add_model_arguments(parser, batch=f"nano and yardstick {BATCH}, paper 1")
    add = parser.add_argument_group("compiling").add_argument
    add(
        "--compile",
        dest="no_compile",
        action="store_false",
        help="use torch.compile; nano and yardstick leave it out, it takes longer than they do",
    )
    parser.set_defaults(batch=None, no_compile=None)


def main(args: argparse.Namespace) -> int:
    """Run the suite, print its tables, write its files."""
    _check(args)
    paper = args.suite == "paper"
    args.batch = (1 if paper else BATCH) if args.batch is None else args.batch
    args.no_compile = not paper if args.no_compile is None else args.no_compile
    import torch

    from gen3r_engine.engine import OutOfMemory, SceneError

    mend = f"--batch ({args.batch} now)" if args.batch > 1 else "--size, or fewer --frames"
    text = f"the GPU's memory does not hold this: use a smaller {mend}"
    with (
        user_input(text, (OutOfMemory, torch.cuda.OutOfMemoryError), code=1),
        user_input(kinds=(SceneError,), code=1),
    ):
        return RUN[args.suite](args)


def _check(args: argparse.Namespace) -> None:
    for name in ("scenes", "steps", "stride"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} is below 1; use 1 or more")
    if args.guidance is not None and not 0 <= args.guidance < float("inf"):
        raise UsageError(f"--guidance {args.guidance} is out of range; use 5 (1 turns it off)")
    if args.seed is not None and args.seed < 0:
        raise UsageError(f"--seed {args.seed} is negative; use 0 or more")
    for name, suites in ONLY.items():
        if getattr(args, name) is not None and args.suite not in suites:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} belongs to --suite {', '.join(suites)}; leave it out")
    with user_input():
        check_clip(args.frames, args.size)
    for name in ("json", "markdown"):
        check_file(f"--{name}", getattr(args, name))
    check_picture("--sheet", args.sheet)


def _load(args: argparse.Namespace) -> Engine:
    return load_engine(args.pretrained_model_name_or_path, engine_config(args))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What nano and yardstick take: which scenes, and how they are made."""
    from gen3r_engine.evaluation.held_out import SEED

    default = {"scenes": SCENES[args.suite], "steps": 50, "solver": "euler", "seed": SEED}
    given = {name: getattr(args, name) for name in (*default, "frames", "size", "guidance")}
    known = {name: value for name, value in given.items() if value is not None}
    return {**default, **known, "batch": args.batch}


def _paper(args: argparse.Namespace) -> int:
    from gen3r_engine.evaluation.paper import run_paper

    check_file("--rows", args.rows or ROWS)
    with user_input():
        return run_paper(args, lambda: _load(args))


def _nano(args: argparse.Namespace) -> int:
    from gen3r_engine.evaluation.nano import PARTS, NanoOptions, run_nano
    from gen3r_engine.evaluation.report import print_nano
    from gen3r_engine.evaluation.sheet import contact_sheet

    parts = PARTS
    if args.parts is not None:
        parts = tuple(part.strip() for part in args.parts.split(",") if part.strip())
    with user_input("--parts"):
        options = NanoOptions(parts=parts, **_settings(args))
    engine = _load(args)
    with user_input(), StageProgress() as progress:
        checkpoint = args.pretrained_model_name_or_path
        result = run_nano(engine, options, progress, args.commit, checkpoint)
    print_nano(result)
    if args.json is not None:
        write_file("--json", args.json, json.dumps(result.to_dict(), indent=1) + "\n")
    if args.sheet is not None:
        with user_input(f"--sheet {args.sheet} can not be written"):
            args.sheet.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(result.rows).save(args.sheet)
    return 0


def _yardstick(args: argparse.Namespace) -> int:
    from gen3r_engine.evaluation.knobs import all_knobs, choose
    from gen3r_engine.evaluation.yardstick import YardstickOptions, run_yardstick
    from gen3r_engine.evaluation.yardstick_report import json_rows, markdown

    config = engine_config(args)
    with user_input():
        options = YardstickOptions(
            checkpoint=args.pretrained_model_name_or_path, config=config, **_settings(args)
        )
    with user_input("--knobs"):
        knobs = choose(all_knobs(config), args.knobs or ("*",))
    if args.without is not None:
        with user_input("--without"):
            left_out = choose(all_knobs(config), args.without)
        knobs = [knob for knob in knobs if knob not in left_out]
    with user_input(), StageProgress() as progress:
        found = run_yardstick(options, knobs, progress, args.commit)
    table = markdown(found)
    if args.markdown is None:
        print(table)
    else:
        write_file("--markdown", args.markdown, table + "\n")
    if args.json is not None:
        rows = "".join(json.dumps(row) + "\n" for row in json_rows(found))
        write_file("--json", args.json, rows)
    return 0


RUN = {"nano": _nano, "yardstick": _yardstick, "paper": _paper}
