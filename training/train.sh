#!/usr/bin/env bash
# Both stages one after the other; run `training/train.sh --help`.
set -euo pipefail

usage() {
    cat <<'TEXT'
Train Gen3R: stage 1 (geometry adapter) with 25, then 49 frames, then stage 2 (diffusion).

    DATA_ROOT=data CHECKPOINTS_DIR=checkpoints OUTPUT_DIR=outputs bash training/train.sh

DATA_ROOT        folder with train/ and val/ (several: separated by spaces)
CHECKPOINTS_DIR  the published pipeline folder: vggt/, wan_vae/, transformer/, ...
OUTPUT_DIR       receives adapter_25/, adapter_49/, diffusion/
ADAPTER_ARGS     further flags of both runs of stage 1, for example "--validate_every 500"
DIFFUSION_ARGS   further flags of stage 2
FRAMES           frames of the two runs of stage 1, default "25 49"
LAUNCH           what starts a script, default "python"; for several GPUs
                 "accelerate launch --config_file training/configs/accelerate_8gpu.yaml"

Call it again after an interruption: finished parts are skipped, the others go on from their newest
checkpoint. The result is OUTPUT_DIR/diffusion/final_pipeline.
TEXT
}

if [[ $# -gt 0 ]]; then
    usage
    [[ $1 == -h || $1 == --help ]] && exit 0 || exit 2
fi
for name in DATA_ROOT CHECKPOINTS_DIR OUTPUT_DIR; do
    if [[ -z ${!name:-} ]]; then
        echo "error: $name is not set (see training/train.sh --help)" >&2
        exit 2
    fi
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Split at spaces on purpose: each holds a list of words.
read -ra data <<<"$DATA_ROOT"
read -ra launch <<<"${LAUNCH:-python}"
read -ra adapter_args <<<"${ADAPTER_ARGS:-}"
read -ra diffusion_args <<<"${DIFFUSION_ARGS:-}"
read -ra frames <<<"${FRAMES:-25 49}"

# part NAME SCRIPT FLAGS...: run a script unless its result is there.
part() {
    local name=$1 script=$2
    shift 2
    if [[ -d $OUTPUT_DIR/$name/final_pipeline ]]; then
        echo "$name: finished before, skipped" >&2
        return
    fi
    echo "$name: $script" >&2
    "${launch[@]}" "$here/$script" --data_root "${data[@]}" \
        --output_dir "$OUTPUT_DIR/$name" --resume auto "$@"
}

start=()
for count in "${frames[@]}"; do
    part "adapter_$count" train_adapter.py --vggt_path "$CHECKPOINTS_DIR" \
        --wan_vae_path "$CHECKPOINTS_DIR" --num_frames "$count" "${adapter_args[@]}" "${start[@]}"
    start=(--init_from "$OUTPUT_DIR/adapter_$count/final_pipeline")
done
part diffusion train_diffusion.py --pretrained_path "$CHECKPOINTS_DIR" \
    --geo_adapter "$OUTPUT_DIR/adapter_${frames[-1]}/final_pipeline" "${diffusion_args[@]}"
