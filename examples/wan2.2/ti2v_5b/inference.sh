#!/usr/bin/env bash
# Generates one clip for each prompt, from its image where it has one, with Wan2.2 TI2V 5B, as inference_model.json says.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash inference.sh --seed 7
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

NPUS_PER_NODE=${NPUS_PER_NODE:-1}   # TP x CP of them share a clip, the others make other clips
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.2-TI2V-5B-Diffusers/transformer}

source "$here/../../wan2.1/common.sh"
inference "$@"
