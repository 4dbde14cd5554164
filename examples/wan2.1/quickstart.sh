#!/usr/bin/env bash
# From nothing to generated videos in minutes, on a laptop without a GPU: sets up .venv, writes the embedded default (a
# tiny Wan2.1 and 16 clips), extracts features, pretrains, resumes, converts to HF and generates from the captions.
# Every stage calls the script that a cluster user calls.   WORKSPACE=DIR bash examples/wan2.1/quickstart.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

WORKSPACE=${WORKSPACE:-$root/workspace}
STEPS=${STEPS:-1200}
SEED=${SEED:-1234}
DEVICE=${DEVICE:-cpu}      # or cuda, npu
AT_LEAST=${AT_LEAST:-14}   # of 16 clips must have the colour, and the direction, that their captions ask for

if [ -e "$WORKSPACE" ] && [ -n "$(ls -A "$WORKSPACE")" ]; then
    echo "error ENV-003: $WORKSPACE is not empty. Fix: remove it, or WORKSPACE=another/folder bash $0" >&2
    exit 64
fi

# Every program of a stage runs in a process group of its own (set -m), with the script waiting: so a signal to the script
# reaches it, from a terminal too, and is the script's own end when it has ended.
set -m
export MM_LAUNCHER=$$   # programs of this checkout end with the process of this number
running=
for name in INT TERM HUP USR1; do
    trap "asked=$name; [ -z \"\$running\" ] || kill -s $name -- \"-\$running\" 2>/dev/null" "$name"
done
run() { # command, words...
    local code=0 now=0
    asked=
    "$@" &
    running=$!
    while now=0; wait "$running" || now=$?; [ "$now" -ne 127 ]; do   # 127: it has been waited for
        code=$now
        [ "$code" -gt 128 ] && [ -n "$asked" ] || break              # the signal ended the waiting, not the program
    done
    running=
    if [ "$code" -ne 0 ]; then exit "$code"; fi
    if [ -n "$asked" ]; then exit "$((128 + $(kill -l "$asked")))"; fi
}

run bash "$root/tools/setup_env.sh"
export PATH=$root/.venv/bin:$PATH VIRTUAL_ENV=$root/.venv NPUS_PER_NODE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # the tensors are tiny: a second thread costs more than it gives
mkdir -p "$WORKSPACE"
WORKSPACE=$(cd "$WORKSPACE" && pwd)
demo=$WORKSPACE/demo
weights=$demo/weights/Wan2.1-T2V-Tiny-Diffusers/transformer
checkpoints=$WORKSPACE/checkpoints
started=$SECONDS
stage() { printf '\n=== %s\n' "$*"; }

stage "1/7 The embedded default"
run mm demo --out "$demo"

stage "2/7 Feature extraction"
MM_DATA=$demo/configs/data.json MM_MODEL=$demo/configs/model_wan.json MM_TOOL=$demo/configs/tools.json \
    LOG_DIR=$WORKSPACE/logs run bash "$here/feature_extract/feature_extraction.sh" --device "$DEVICE"

stage "3/7 Weights from HF to MM"
run python "$here/convert_ckpt.py" --source_path "$weights" --target_path "$WORKSPACE/weights_mm" --mode convert_to_mm

pretrain() { # steps
    MM_DATA=$demo/configs/feature_data.json MM_MODEL=$demo/configs/pretrain_model.json PRECISION=fp32 MBS=16 RECOMPUTE= \
        LOAD_PATH=$WORKSPACE/weights_mm SAVE_PATH=$checkpoints run bash "$here/1.3b/t2v/pretrain.sh" \
        --train-iters "$1" --lr-decay-iters "$STEPS" --lr 2e-3 --min-lr 2e-5 --lr-decay-style cosine \
        --lr-warmup-iters 100 --log-interval 100 --save-interval "$STEPS" --num-workers 1 --seed "$SEED" \
        --device "$DEVICE"
}
stage "4/7 Pretraining, the first half"
pretrain "$((STEPS / 2))"
stage "5/7 Pretraining, resumed from the checkpoint"
pretrain "$STEPS"

stage "6/7 The trained weights from MM to HF"
run python "$here/convert_ckpt.py" --source_path "$checkpoints" --ckpt_path "$weights" \
    --target_path "$WORKSPACE/trained_hf" --mode convert_to_hf

stage "7/7 Generation"
MM_MODEL=$demo/configs/inference_model.json LOAD_PATH=$WORKSPACE/trained_hf SAVE_PATH=$WORKSPACE/videos \
    PROMPT=$demo/prompts.txt run bash "$here/1.3b/t2v/inference.sh" --micro-batch-size 16 --device "$DEVICE"
run mm score --videos "$WORKSPACE/videos" --prompts "$demo/prompts.txt" --sheet "$WORKSPACE/videos.png" --at-least "$AT_LEAST"
run mm plot --run "$checkpoints" --out "$WORKSPACE/training.png"

stage "Done in $((SECONDS - started)) s"
cat <<EOF
videos      $WORKSPACE/videos/   one clip for each line of $demo/prompts.txt, all of them in $WORKSPACE/videos.png
loss plot   $WORKSPACE/training.png
checkpoint  $checkpoints/
HF weights  $WORKSPACE/trained_hf/
EOF
