#!/usr/bin/env bash
# Trains a LoRA of Wan2.1 I2V 1.3B on extracted features. Edit the values below, give them as environment variables, or
# append flags: NPUS_PER_NODE=2 SAVE_PATH=out bash finetune_lora.sh --train-iters 5
# Every checkpoint folder has the adapter as pytorch_lora_weights.safetensors, which diffusers loads, and as
# lora_comfyui.safetensors for ComfyUI, DiffSynth-Studio and VideoX-Fun.
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
LOAD_BASE_MODEL=${LOAD_BASE_MODEL:-./weights/Wan-AI/Wan2.1-I2V-1.3B-Diffusers/transformer}   # HF, native or MM weights
LOAD_PATH=${LOAD_PATH:-}                                 # an adapter to start from; empty: a new one
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-i2v-1.3b-lora} # rerunning goes on from here

source "$here/../../common.sh"
LORA_ARGS="
    --lora-r 16 --lora-alpha 16
    --lora-target-modules proj_q proj_k proj_v proj_out
"
GPT_ARGS="
    --lr 1e-4 --min-lr 1e-4 --lr-decay-style constant
    --weight-decay 1e-2 --clip-grad 1.0
    --train-iters 5000
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
"
OUTPUT_ARGS="--log-interval 1 --save-interval 500"

run_training --load-base-model "$LOAD_BASE_MODEL" $LORA_ARGS $GPT_ARGS $OUTPUT_ARGS $RECOMPUTE "$@"
