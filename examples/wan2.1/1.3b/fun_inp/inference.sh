#!/usr/bin/env bash
# Generates one clip for each prompt and its image with Wan2.1-Fun-V1.1-1.3B InP, as inference_model.json says.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash inference.sh --seed 7
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

NPUS_PER_NODE=${NPUS_PER_NODE:-1}   # TP x CP of them share a clip, the others make other clips
# What is known of a clip: an image, or VIDEO and its MASK, or nothing with IMAGE= and --text-only.
if [ -z "${VIDEO:-}" ]; then IMAGE=${IMAGE-./examples/wan2.1/samples_i2v_images.txt}; fi
LOAD_PATH=${LOAD_PATH:-./weights/alibaba-pai/Wan2.1-Fun-V1.1-1.3B-InP}

source "$here/../../common.sh"
inference "$@"
