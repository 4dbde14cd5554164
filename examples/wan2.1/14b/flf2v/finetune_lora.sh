#!/usr/bin/env bash
# Trains a LoRA of Wan2.1 FLF2V 14B on extracted features.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash finetune_lora.sh --lr 1e-4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

CP=${CP:-2}   # ranks that share a clip: 720P needs two
RECOMPUTE=${RECOMPUTE---recompute-granularity full --recompute-method uniform}
LOAD_BASE_MODEL=${LOAD_BASE_MODEL:-./weights/Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers/transformer}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-flf2v-14b-lora}

source "$here/../../common.sh"
finetune_lora "$@"
