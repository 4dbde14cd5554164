#!/usr/bin/env bash
# Trains a LoRA of one expert of Wan2.2 T2V A14B on extracted features.
# common.sh says what else can be set; words are flags: EXPERT=low bash finetune_lora.sh --lr 1e-4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

source "$here/../expert.sh"   # EXPERT=high or low
MM_DATA=${MM_DATA:-$here/../../wan2.1/14b/t2v/feature_data.json}   # the features are those of Wan2.1's T2V
RECOMPUTE=${RECOMPUTE---recompute-granularity full --recompute-method uniform}
LOAD_BASE_MODEL=${LOAD_BASE_MODEL:-./weights/Wan-AI/Wan2.2-T2V-A14B-Diffusers/$transformer}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.2-t2v-a14b-$EXPERT-lora}

source "$here/../../wan2.1/common.sh"
finetune_lora "$@"
