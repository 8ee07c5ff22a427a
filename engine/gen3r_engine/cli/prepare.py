"""Turn a downloaded data set into the folders that training reads, or fill the latent cache.

RealEstate10K, DL3DV-10K, Co3Dv2, WildRGB-D, TartanAir (re10k, dl3dv, co3d, wildrgbd, tartanair):
  gen3r-engine prepare re10k /data/RealEstate10K data --captions captions.json
  gen3r-engine prepare dl3dv /data/DL3DV data --val_share 0.02 --link symlink --workers 16
  gen3r-engine prepare co3d /data/co3d data_co3d --split val --size 560

Scenes that the project renders itself, with exact depth and cameras:
  gen3r-engine prepare procedural data --scenes 8000 --held_out 64 --seed 0

What stage 2 would encode again in every epoch, once:
  gen3r-engine prepare latents --data_root data --pretrained_path P --cache_dir cache

A scene appears whole or not at all; scenes that are there are skipped, so that an interrupted
command goes on where it ended.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gen3r_engine.cli import prepare_latents, prepare_procedural
from gen3r_engine.cli.errors import UsageError, user_input
from gen3r_engine.cli.prepare_latents import add_latent_arguments
from gen3r_engine.cli.prepare_procedural import add_procedural_arguments
from gen3r_engine.cli.progress import StageProgress, note

if TYPE_CHECKING:
    from gen3r_training.formats import Format, PrepareOptions, PrepareReport, SceneEntry

HELP = "turn a data set into training scenes, render some, or encode them once (latents)"
LATENTS = "latents"
PROCEDURAL = "procedural"
# Short and published names, as gen3r_training.formats has them: importing it takes a second.
NAMES = {
    **{"re10k": "RealEstate10K", "dl3dv": "DL3DV-10K", "co3d": "Co3Dv2"},
    **{"wildrgbd": "WildRGB-D", "tartanair": "TartanAir"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One form for every data set, one for rendered scenes and one for the latent cache."""
    forms = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True)

    def form(name: str, text: str, aliases: Sequence[str] = ()) -> argparse.ArgumentParser:
        command = forms.add_parser(
            name, aliases=aliases, help=text, description=text, allow_abbrev=False
        )
        command.set_defaults(dataset=name)
        command.add_argument(
            *("-v", "--verbose"),
            action="store_true",
            default=argparse.SUPPRESS,
            help="show tracebacks of errors",
        )
        return command

    for name, title in NAMES.items():
        _add_dataset_arguments(form(name, f"scenes of {title}", _spellings(name, title)), name)
    text = "render rooms and courtyards with exact depth and cameras"
    add_procedural_arguments(form(PROCEDURAL, text))
    add_latent_arguments(form(LATENTS, "encode prepared scenes once, for stage 2", ["LATENTS"]))


def _spellings(name: str, title: str) -> list[str]:
    plain = title.replace("-", "")
    every = [title, name.upper(), title.lower(), title.upper()]
    every += [plain, plain.lower(), plain.upper()]
    return [text for text in dict.fromkeys(every) if text != name]


def _add_dataset_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="folder of the data set as it is published")
    add("destination", metavar="DST", help="scenes go to DST/train and DST/val")
    add("--split", choices=("train", "val"), help="which split is written (default: train)")
    add(
        "--val_share",
        type=float,
        metavar="SHARE",
        help="write both splits: this share of the scenes, and the published val ones, to DST/val",
    )
    add("--max_scenes", type=int, metavar="N", help="at most so many scenes")
    add("--workers", type=int, metavar="N", help="scenes at once (default: one a core, up to 8)")
    add(
        "--link",
        choices=("symlink", "hardlink"),
        help="link frames that stay as they are to SRC instead of copying them",
    )
    add("--size", type=int, metavar="PX", help="shrink frames to this short side")
    add(
        "--captions",
        metavar="PATH",
        help="captions by scene: .json, .csv (scene, prompt) or a folder of SCENE.txt",
    )
    add("--overwrite", action="store_true", help="write scenes again that are there")
    if name == "co3d":
        add(
            "--min_quality",
            type=float,
            default=0.5,
            metavar="SCORE",
            help="skip sequences whose viewpoint score is lower (default: 0.5; 0 keeps all)",
        )


def main(args: argparse.Namespace) -> int:
    """Prepare a data set or the latents; 0 when there is at least one scene, 1 when none."""
    if args.dataset == LATENTS:
        return prepare_latents.main(args)
    if args.dataset == PROCEDURAL:
        return prepare_procedural.main(args)
    from gen3r_training.formats import format_named

    known = format_named(args.dataset)
    source, options = _checked(args)
    entries = _find(known, source, args)
    if not entries:
        raise UsageError(f"{source} holds no scene of {known.title}; expected: {known.looks_for}")
    return _prepare(known, entries, options)


def _checked(args: argparse.Namespace) -> tuple[Path, PrepareOptions]:
    from gen3r.folders import check_writable
    from gen3r_training.formats import PrepareOptions, read_captions

    # Absolute: names come from folders, and "." has none.
    source, destination = Path(os.path.abspath(args.source)), Path(args.destination)
    if not source.is_dir():
        raise UsageError(f"SRC {source} is no folder")
    _check_apart(source.resolve(), destination.resolve())
    if args.split is not None and args.val_share is not None:
        raise UsageError("--val_share writes both splits; leave --split out")
    if args.link and args.size is not None:
        raise UsageError("--size changes the frames, which --link would keep; use one of the two")
    with user_input(f"DST {destination} can not be written", (OSError,)):
        check_writable(destination)
    with user_input("--captions"):
        captions = read_captions(Path(args.captions)) if args.captions else {}
    with user_input():
        options = PrepareOptions(
            destination,
            split=args.split or "train",
            val_share=args.val_share,
            max_scenes=args.max_scenes,
            workers=min(8, os.cpu_count() or 1) if args.workers is None else args.workers,
            size=args.size,
            link=args.link,
            overwrite=args.overwrite,
            captions=captions,
        )
    if args.link == "hardlink" and _device(source) != _device(destination):
        raise UsageError("--link hardlink needs SRC and DST on one file system; use symlink")
    return source, options


def _check_apart(source: Path, destination: Path) -> None:
    if destination.is_relative_to(source):
        raise UsageError(f"DST {destination} is inside SRC {source}; choose a folder outside of it")
    for split in ("train", "val"):
        if source.is_relative_to(destination / split):
            raise UsageError(f"SRC {source} is inside DST/{split}; choose another DST")


def _device(path: Path) -> int:
    """The file system of the path, or of its nearest parent that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists()).stat().st_dev


def _find(known: Format, source: Path, args: argparse.Namespace) -> list[SceneEntry]:
    from gen3r_training.formats import BadScene, co3d

    find = known.find
    if known.name == "co3d":
        find = functools.partial(co3d.find, min_quality=args.min_quality)
    with user_input(f"SRC {source}", (OSError, BadScene)):
        return list(find(source))


def _prepare(known: Format, entries: list[SceneEntry], options: PrepareOptions) -> int:
    from gen3r_training.formats import prepare_scenes

    with StageProgress() as progress, user_input("DST can not be written", (OSError,), code=1):
        report = prepare_scenes(
            entries,
            options,
            on_skip=lambda name, reason: progress.say(f"skipped {name}: {reason}"),
            progress=functools.partial(progress, f"prepare {known.title}"),
        )
    _tell(report, options)
    return 0 if report.done else 1


def _tell(report: PrepareReport, options: PrepareOptions) -> None:
    written = report.written.values()
    if report.absent:
        first, reason = next(iter(report.absent.items()))
        note(f"{len(report.absent)} scenes are listed and not there, the first {first}: {reason}")
    if report.other_split:
        other = "val" if options.split == "train" else "train"
        note(f"{report.other_split} scenes are in the published {other} split: --split {other}")
    if options.captions and report.without_caption:
        note(f"{report.without_caption} of {len(written)} scenes have no caption in --captions")
    if options.link and (copied := sum(not one.linked for one in written)):
        note(f"the frames of {copied} scenes could not be linked: of a video, or undistorted")
    if undistorted := sum(one.undistorted for one in written):
        note(f"{undistorted} scenes were undistorted: their lens moved pixels by more than 0.5")
    frames = sum(one.frames for one in written)
    print(
        f"{len(written)} scenes written ({frames} frames), {len(report.existing)} there already, "
        f"{len(report.skipped)} skipped as corrupt, {len(report.absent)} absent: "
        f"{options.destination}"
    )
