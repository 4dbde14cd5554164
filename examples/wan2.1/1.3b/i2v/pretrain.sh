#!/usr/bin/env bash
# Pretrains Wan2.1 I2V 1.3B on extracted features.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash pretrain.sh --lr 1e-5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

RECOMPUTE=${RECOMPUTE---recompute-granularity selective}
# Wan released no I2V weights of this size; Wan2.1-Fun-1.3B-InP has their shape.
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.1-I2V-1.3B-Diffusers/transformer}
SAVE_PATH=${SAVE_PATH:-./save_ckpt/wan2.1-i2v-1.3b}

source "$here/../../common.sh"
pretrain --overlap-param-gather "$@"
