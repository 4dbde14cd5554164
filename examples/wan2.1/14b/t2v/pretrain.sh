#!/usr/bin/env bash
# Pretrains Wan2.1 T2V 14B on extracted features.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash pretrain.sh --lr 1e-5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

RECOMPUTE=${RECOMPUTE---recompute-granularity full --recompute-method uniform}
layerzero_config=${layerzero_config:-$here/zero_config.yaml}
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-t2v-14b}

source "$here/../../common.sh"
pretrain --layerzero --layerzero-config "$layerzero_config" "$@"
