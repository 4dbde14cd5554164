#!/usr/bin/env bash
# Generates one clip for each prompt, its image and the path of its camera with Wan2.1-Fun-V1.1-1.3B Control-Camera, as inference_model.json says.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash inference.sh --seed 7
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

NPUS_PER_NODE=${NPUS_PER_NODE:-1}   # TP x CP of them share a clip, the others make other clips
LOAD_PATH=${LOAD_PATH:-./weights/alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera}

source "$here/../../common.sh"
inference "$@"
