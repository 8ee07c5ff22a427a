"""Measure this machine, report on measured rows, or compare two sets of them.

gen3r-engine bench --suite kernels                            # operators, providers side by side
gen3r-engine bench --suite kernels --case 'layer_norm*' --provider eager gen3r
gen3r-engine bench --suite step --preset eager exact fp8      # the denoising step and loop
gen3r-engine bench --suite decode --case 'vae_*'              # a stage before or behind the loop
gen3r-engine bench --suite training                           # training steps of both stages
gen3r-engine bench --suite e2e -- --steps 4 --scenes 2        # behind --: the suite's options
gen3r-engine bench --report                                   # table and roofline plot
gen3r-engine bench --compare before.jsonl after.jsonl         # exit code 1 if something got worse

Rows go to benchmarks/results/<gpu>/<suite>.jsonl of the checkout. docs/benchmarks.md has the rest.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from gen3r_engine.cli.errors import UsageError, user_input

HELP = "measure operators, steps, scenes, memory or loading; report and compare"
ENGINE_SUITES = ("step", "fidelity", "e2e", "memory", "startup", "decode", "training")
CASE_SUITES = ("kernels", "decode", "training")
EXPORT_SUITES = ("export", "export_aoti")
SUITES = ("kernels", "pipeline", "loading", "cpu", "fusion", *EXPORT_SUITES, *ENGINE_SUITES)
PROVIDERS = ("eager", "exact", "fp8", "24gb", "12gb")
CHECKOUT = Path(__file__).resolve().parents[3]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=SUITES, help="run a suite and write its rows")
    what.add_argument(
        "--report",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="tables and pictures of these files or folders (default: all committed results)",
    )
    what.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="changes from A to B, case by case",
    )
    cases = parser.add_argument_group(f"--suite {', '.join(CASE_SUITES)}")
    cases.add_argument("--case", nargs="+", default=[], help="only these cases (* and ? allowed)")
    kernels = parser.add_argument_group("--suite kernels")
    kernels.add_argument("--provider", nargs="+", default=[], help="only these providers")
    kernels.add_argument("--list", action="store_true", help="say what would run, and stop")
    engine = parser.add_argument_group(f"--suite {', '.join(ENGINE_SUITES)}")
    engine.add_argument(
        "--preset",
        nargs="+",
        choices=PROVIDERS,
        default=[],
        help="presets, memory tiers and upstream's way (default: the suite's own choice)",
    )
    engine.add_argument(
        "--pretrained_model_name_or_path",
        metavar="PATH",
        help="weights of e2e, memory and startup (default: random ones)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for rows (default: benchmarks/results of the checkout) "
        "or for the report (default: outputs/bench)",
    )
    parser.add_argument(
        "--commit",
        "--revision",
        help="commit to record where the tree is not a git checkout",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.05,
        help="share by which a figure must change to count in --compare (default 0.05)",
    )
    parser.add_argument(
        "suite_options", nargs="*", metavar="-- OPTIONS", help="further options of the suite"
    )


def main(args: argparse.Namespace) -> int:
    """Run what was asked for; 1 when a provider failed or something became worse."""
    commands = load_commands()
    with user_input(kinds=(commands.BadInput, PermissionError)):
        if args.compare is not None:
            return int(commands.compare(*args.compare, args.threshold))
        if args.report is not None:
            return int(commands.report(args.report, args.out or Path("outputs/bench")))
        return int(commands.run_suite(args.suite, suite_arguments(args)))


def suite_arguments(args: argparse.Namespace) -> list[str]:
    """The suite's own command line."""
    if args.case and args.suite not in CASE_SUITES:
        raise UsageError(f"--case belongs to --suite {', '.join(CASE_SUITES)}; leave it out")
    chosen = [("--case", args.case), ("--provider", args.provider)]
    only_kernels = [f for f, value in (chosen[1], ("--list", args.list)) if value]
    if args.suite != "kernels" and only_kernels:
        raise UsageError(f"{only_kernels[0]} belongs to --suite kernels; leave it out")
    engine = [
        ("--preset", args.preset),
        ("--pretrained_model_name_or_path", args.pretrained_model_name_or_path),
    ]
    only_engine = [flag for flag, value in engine if value]
    if args.suite not in ENGINE_SUITES and only_engine:
        raise UsageError(f"{only_engine[0]} belongs to --suite {', '.join(ENGINE_SUITES)}")
    given = [text for flag, values in chosen if values for text in (flag, *values)]
    given += ["--preset", *args.preset] if args.preset else []
    checkpoint = args.pretrained_model_name_or_path
    given += ["--pretrained_model_name_or_path", checkpoint] if checkpoint is not None else []
    given += ["--list"] if args.list else []
    given += ["--out", str(args.out)] if args.out is not None else []
    given += ["--commit", args.commit] if args.commit is not None else []
    return given + args.suite_options


def load_commands() -> ModuleType:
    """`benchmarks.commands` of the checkout that this package runs from.

    The suites need the results beside them and are not part of an installed package, so they are
    taken from the checkout by place, whatever the current directory is.
    """
    package = CHECKOUT / "benchmarks" / "__init__.py"
    if not package.is_file():
        raise UsageError(
            f"the benchmark suites are not there ({package.parent}): they belong to the source "
            "checkout; clone it and run 'make install' or 'pip install -e .' in it"
        )
    loaded = sys.modules.get("benchmarks")
    if loaded is None:
        spec = importlib.util.spec_from_file_location(
            "benchmarks", package, submodule_search_locations=[str(package.parent)]
        )
        if spec is None or spec.loader is None:
            raise UsageError(f"{package} cannot be loaded")
        loaded = sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    elif Path(str(loaded.__file__)).resolve() != package:
        raise UsageError(f"another package called 'benchmarks' is in use: {loaded.__file__}")
    return importlib.import_module("benchmarks.commands")
