#!/usr/bin/env bash
# Trains all weights of one expert of Wan2.2 I2V A14B on extracted features.
# common.sh says what else can be set; words are flags: EXPERT=low bash pretrain.sh --lr 1e-5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

source "$here/../expert.sh"   # EXPERT=high or low
MM_DATA=${MM_DATA:-$here/../../wan2.1/feature_extract/wan22_i2v/feature_data.json}
RECOMPUTE=${RECOMPUTE---recompute-granularity full --recompute-method uniform}
layerzero_config=${layerzero_config:-$here/../../wan2.1/14b/zero_config.yaml}
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.2-I2V-A14B-Diffusers/$transformer}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.2-i2v-a14b-$EXPERT}

source "$here/../../wan2.1/common.sh"
pretrain --layerzero --layerzero-config "$layerzero_config" "$@"
