#!/usr/bin/env bash
# Makes a given video anew for each prompt, with Wan2.1 T2V 14B, as inference_model.json says.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash inference.sh --strength 0.5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

NPUS_PER_NODE=${NPUS_PER_NODE:-1}   # TP x CP of them share a clip, the others make other clips
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer}

source "$here/../../common.sh"
inference "$@"
