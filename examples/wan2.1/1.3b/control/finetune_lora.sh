#!/usr/bin/env bash
# Trains a LoRA of Wan2.1-Fun-1.3B Control on extracted features.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash finetune_lora.sh --lr 1e-4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MM_DATA=${MM_DATA:-$here/../../feature_extract/fun_control/feature_data.json}
RECOMPUTE=${RECOMPUTE---recompute-granularity selective}
LOAD_BASE_MODEL=${LOAD_BASE_MODEL:-./weights/alibaba-pai/Wan2.1-Fun-1.3B-Control}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-fun-control-1.3b-lora}

source "$here/../../common.sh"
finetune_lora "$@"
