#!/usr/bin/env bash
# Makes the embedded model (gen3r/embedded) from nothing: scenes, five stages, evaluation.
#
#   training/recipes/nano.sh OUTPUT      an estimated 28 minutes of one H200, 8 GB in OUTPUT
#
# The autoencoders and VGGT are trained in two rounds, the second from the first's weights with a
# lower rate. Each stage is a function of its seed, up to the order of sums on the GPU. Clips and
# stages that are there whole are kept, so that an interrupted run goes on where it ended.
# nano_log.jsonl is the log of the run that made the embedded weights (docs/quality.md tells in what
# it differed). To ship the result, put OUTPUT/diffusion in the place of gen3r/embedded.
set -euo pipefail
out=${1:?usage: nano.sh OUTPUT [SCENES]}
scenes=${2:-6144}

train() { # folder, stage, then the flags of `train resident`
  local folder=$1 stage=$2
  shift 2
  [ -d "$out/$folder" ] || gen3r-engine train resident "$stage" --data "$out/clips" \
    --output "$out/$folder" "$@"
}

gen3r-engine prepare procedural "$out/clips" --form packed \
  --scenes "$scenes" --held_out 64 --seed 2601

train vae1 vae --steps 4000
train vggt1 vggt --steps 8000
train text text --steps 3000
train adapter1 adapter --steps 2000 --model "$out/vae1" --take "vggt=$out/vggt1" \
  "text_encoder=$out/text" "clip_image_encoder=$out/text"

train vae vae --steps 2504 --learning_rate 1e-3 --warmup 100 --model "$out/adapter1"
train vggt vggt --steps 6000 --learning_rate 8e-4 --model "$out/adapter1"
train adapter adapter --steps 2400 --learning_rate 1.5e-3 --model "$out/vae" \
  --take "vggt=$out/vggt"
train diffusion diffusion --steps 8915 --model "$out/adapter"

gen3r-engine eval --suite nano --pretrained "$out/diffusion" --batch 50 --json "$out/nano.json"
