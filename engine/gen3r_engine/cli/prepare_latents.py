"""``gen3r-engine prepare latents``: what stage 2 would encode again in every epoch, once."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r_engine.cli.errors import one_line, user_input
from gen3r_engine.cli.progress import StageProgress, note

if TYPE_CHECKING:
    from gen3r_training.data import CacheReport


def add_latent_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `LatentCacheConfig`, whose defaults count where a flag is not given."""
    add = parser.add_argument
    add("--data_root", nargs="+", required=True, metavar="DIR", help="prepared data sets")
    add(
        "--pretrained_path",
        required=True,
        metavar="P",
        help="model that encodes: a folder or hub id",
    )
    add("--cache_dir", required=True, metavar="DIR", help="where the encoded clips go")
    add("--split", choices=("train", "val"), help="which split is encoded (default: train)")
    add("--geo_adapter", metavar="P", help="another adapter than the model's, from stage 1")
    add("--num_frames", type=int, metavar="N", help="frames of a clip (default: 49)")
    add("--resolution", type=int, metavar="PX", help="pixels of a side (default: 560)")
    add("--max_stride", type=int, metavar="N", help="frame strides 1 to N (default: 2)")
    add("--clips_per_scene", type=int, metavar="N", help="clips of every scene (default: 4)")
    add("--seed", type=int, help="of the choice of clips (default: 42)")
    add("--device", help="auto, cpu or cuda (default: auto)")
    add("--dtype", help="bfloat16 or float32 (default: bfloat16)")
    add("--tokens", action="store_true", default=None, help="keep VGGT's token maps too")
    add(
        "--upstream_control_geometry",
        action="store_true",
        default=None,
        help="encode the geometry of the control videos as well",
    )
    add(
        "--skip_bad_scenes",
        action="store_true",
        default=None,
        help="leave damaged scenes out instead of refusing the data set",
    )
    add("--num_workers", type=int, metavar="N", help="threads that read frames (default: 2)")


def main(args: argparse.Namespace) -> int:
    """Fill the cache; 0 when it holds a clip then, 1 when it holds none."""
    from gen3r_training.data import LatentCacheConfig

    given = {f.name: getattr(args, f.name, None) for f in fields(LatentCacheConfig)}
    values: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
    values["data_root"] = tuple(Path(root) for root in args.data_root)
    values |= {name: Path(values[name]) for name in ("cache_dir", "geo_adapter") if name in values}
    with user_input():
        config = LatentCacheConfig(**values)
    from gen3r_training.data.encode_dataset import encode_dataset

    with StageProgress() as progress, user_input("--cache_dir", (OSError,), code=1), user_input():
        report = encode_dataset(config, progress)
    _tell(report, config.cache_dir)
    return 0 if report.encoded + report.reused else 1


def _tell(report: CacheReport, folder: Path) -> None:
    for name, reason in (*report.skipped.items(), *report.failed.items()):
        print(f"skipped {name}: {one_line(ValueError(reason))}")
    for path, reason in report.damaged.items():
        note(f"{path} was damaged and is made anew: {reason}")
    for name, count in report.unreadable.items():
        note(f"{name}: {count} frames could not be read and were left out")
    print(
        f"{report.encoded} clips and {report.prompts} prompts encoded, {report.reused} clips "
        f"there already, {len(report.failed) + len(report.skipped)} scenes skipped: {folder}"
    )
