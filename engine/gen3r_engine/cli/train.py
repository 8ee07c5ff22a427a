"""Train the geometry adapter (stage 1) or the diffusion transformer (stage 2).

gen3r-engine train adapter --data_root data --vggt_path checkpoints --wan_vae_path checkpoints \\
    --output_dir outputs/adapter
gen3r-engine train diffusion --data_root data --pretrained_path checkpoints/gen3r \\
    --geo_adapter outputs/adapter/final_pipeline --output_dir outputs/diffusion

Several GPUs: accelerate launch --config_file training/configs/accelerate_8gpu.yaml \\
    -m gen3r_engine.cli train diffusion ...
"""

from __future__ import annotations

import argparse

from gen3r_training.arguments import CONFIGS
from gen3r_training.arguments import add_arguments as add_stage_arguments

HELP = "train the geometry adapter or the diffusion transformer"
_STAGES = {
    "adapter": "stage 1: the geometry adapter, VGGT and the Wan VAE frozen",
    "diffusion": "stage 2: the diffusion transformer, everything else frozen",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two stages with their flags."""
    stages = parser.add_subparsers(
        dest="stage", metavar="stage", required=True, parser_class=type(parser)
    )
    for name in CONFIGS:
        stage = stages.add_parser(
            name, help=_STAGES[name], description=_STAGES[name], allow_abbrev=False
        )
        add_stage_arguments(stage, name)
        stage.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show tracebacks of errors",
        )


def main(args: argparse.Namespace) -> int:
    """Train as asked; errors are told in one line."""
    from gen3r_training.command import execute

    return execute(args, args.stage)
