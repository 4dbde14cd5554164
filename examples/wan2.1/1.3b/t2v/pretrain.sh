#!/usr/bin/env bash
# Pretrains Wan2.1 T2V 1.3B on extracted features. Edit the values below, give them as environment variables, or
# append flags: NPUS_PER_NODE=2 SAVE_PATH=out bash pretrain.sh --train-iters 5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

NPUS_PER_NODE=${NPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

TP=${TP:-1}
PP=${PP:-1}
VP=${VP:-1}
CP=${CP:-1}
MBS=${MBS:-1}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-1}
PRECISION=${PRECISION:-bf16}          # bf16 or fp32
RECOMPUTE=${RECOMPUTE---recompute-granularity selective}   # RECOMPUTE= keeps everything: fastest, if it fits

MM_DATA=${MM_DATA:-$here/feature_data.json}
MM_MODEL=${MM_MODEL:-$here/pretrain_model.json}
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer}   # HF, native or MM weights
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-t2v-1.3b}                              # rerunning goes on from here

source "$here/../../common.sh"
GPT_ARGS="
    --lr 1e-5 --min-lr 1e-5 --lr-decay-style constant
    --weight-decay 1e-2 --clip-grad 1.0
    --train-iters 5000
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
"
OUTPUT_ARGS="--log-interval 1 --save-interval 500"

run_training $GPT_ARGS $OUTPUT_ARGS $RECOMPUTE "$@"
