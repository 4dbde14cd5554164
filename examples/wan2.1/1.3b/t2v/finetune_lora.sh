#!/usr/bin/env bash
# Trains a LoRA of Wan2.1 T2V 1.3B on extracted features.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash finetune_lora.sh --lr 1e-4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

RECOMPUTE=${RECOMPUTE---recompute-granularity selective}
LOAD_BASE_MODEL=${LOAD_BASE_MODEL:-./weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-t2v-1.3b-lora}

source "$here/../../common.sh"
finetune_lora "$@"
