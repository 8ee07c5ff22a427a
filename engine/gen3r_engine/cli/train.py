"""Train the geometry adapter (stage 1), the diffusion transformer (stage 2), or a small model.

gen3r-engine train adapter --data_root data --vggt_path checkpoints --wan_vae_path checkpoints \\
    --output_dir outputs/adapter
gen3r-engine train diffusion --data_root data --pretrained_path checkpoints/gen3r \\
    --geo_adapter outputs/adapter/final_pipeline --output_dir outputs/diffusion

A model of a few million parameters from nothing, with all data in the GPU's memory:
gen3r-engine train resident vae --data clips --output outputs/vae    # then vggt, text, adapter,
gen3r-engine train resident diffusion --data clips --model outputs/adapter --output outputs/nano

Several GPUs: accelerate launch --config_file training/configs/accelerate_8gpu.yaml \\
    -m gen3r_engine.cli train diffusion ...
"""

from __future__ import annotations

import argparse

from gen3r_training.arguments import add_arguments as add_stage_arguments

HELP = "train the geometry adapter, the diffusion transformer, or a small model from nothing"
RESIDENT = "resident"
_STAGES = {
    "adapter": "stage 1: the geometry adapter, VGGT and the Wan VAE frozen",
    "diffusion": "stage 2: the diffusion transformer, everything else frozen",
    RESIDENT: "any component of a small model, with all data in the GPU's memory",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two stages with their flags, and the small model's."""
    from gen3r_training.resident.command import add_arguments as add_resident_arguments

    stages = parser.add_subparsers(
        dest="stage", metavar="stage", required=True, parser_class=type(parser)
    )
    for name, text in _STAGES.items():
        stage = stages.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == RESIDENT:
            add_resident_arguments(stage)
        else:
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
    if args.stage == RESIDENT:
        from gen3r_training.resident.command import execute as execute_resident

        return execute_resident(args)
    from gen3r_training.command import execute

    return execute(args, args.stage)
