"""Stage 1: train the geometry adapter, VGGT and the Wan VAE frozen.

python training/train_adapter.py --data_root data --vggt_path checkpoints \\
    --wan_vae_path checkpoints --output_dir outputs/adapter --num_frames 25 --mixed_precision bf16
accelerate launch --config_file training/configs/accelerate_8gpu.yaml training/train_adapter.py ...

`gen3r-engine train adapter` takes the same flags. The result is OUTPUT_DIR/final_pipeline.
"""

import sys

from gen3r_training.command import main

if __name__ == "__main__":
    sys.exit(main("adapter", __doc__))
