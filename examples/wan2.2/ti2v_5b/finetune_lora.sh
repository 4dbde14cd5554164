#!/usr/bin/env bash
# Trains a LoRA of Wan2.2 TI2V 5B on extracted features.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash finetune_lora.sh --lr 1e-4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MM_DATA=${MM_DATA:-$here/../../wan2.1/feature_extract/ti2v/feature_data.json}
RECOMPUTE=${RECOMPUTE---recompute-granularity full --recompute-method uniform}
LOAD_BASE_MODEL=${LOAD_BASE_MODEL:-./weights/Wan-AI/Wan2.2-TI2V-5B-Diffusers/transformer}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.2-ti2v-5b-lora}

source "$here/../../wan2.1/common.sh"
finetune_lora "$@"
