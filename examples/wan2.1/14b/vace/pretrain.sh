#!/usr/bin/env bash
# Trains all weights of Wan2.1 VACE 14B on extracted features.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash pretrain.sh --lr 1e-5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MM_DATA=${MM_DATA:-$here/../../feature_extract/vace/feature_data.json}
CP=${CP:-2}   # ranks that share a clip: side blocks keep a stream beside the clip's
RECOMPUTE=${RECOMPUTE---recompute-granularity full --recompute-method uniform}
layerzero_config=${layerzero_config:-$here/../zero_config.yaml}
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.1-VACE-14B-diffusers/transformer}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-vace-14b}

source "$here/../../common.sh"
pretrain --layerzero --layerzero-config "$layerzero_config" "$@"
