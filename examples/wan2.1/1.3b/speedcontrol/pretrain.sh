#!/usr/bin/env bash
# Trains all weights of Wan2.1 SpeedControl 1.3B on extracted features.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash pretrain.sh --lr 1e-5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MM_DATA=${MM_DATA:-$here/../../feature_extract/speedcontrol/feature_data.json}
RECOMPUTE=${RECOMPUTE---recompute-granularity selective}
# The motion controller is published alone; docs/tasks.md shows how it is put to the weights of T2V.
LOAD_PATH=${LOAD_PATH:-./weights/speedcontrol-1.3b.safetensors}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-speedcontrol-1.3b}

source "$here/../../common.sh"
pretrain --overlap-param-gather "$@"
