"""Stage 2: train the diffusion transformer, everything else frozen.

python training/train_diffusion.py --data_root data --pretrained_path checkpoints/gen3r \\
    --geo_adapter outputs/adapter/final_pipeline --output_dir outputs/diffusion
accelerate launch --config_file training/configs/accelerate_8gpu.yaml \\
    training/train_diffusion.py ...

`gen3r-engine train diffusion` takes the same flags. The result is OUTPUT_DIR/final_pipeline, which
`gen3r-engine run --pretrained_model_name_or_path` loads.
"""

import sys

from gen3r_training.command import main

if __name__ == "__main__":
    sys.exit(main("diffusion", __doc__))
