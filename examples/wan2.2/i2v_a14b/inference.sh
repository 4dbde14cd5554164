#!/usr/bin/env bash
# Generates one clip for each prompt and its image with both experts of Wan2.2 I2V A14B, as inference_model.json says.
# common.sh says what else can be set; words are flags: SAVE_PATH=out bash inference.sh --seed 7
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

NPUS_PER_NODE=${NPUS_PER_NODE:-2}
TP=${TP:-2}   # of both experts a device holds half: 27 GiB
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.2-I2V-A14B-Diffusers/transformer}     # for much noise
LOW_NOISE=${LOW_NOISE:-./weights/Wan-AI/Wan2.2-I2V-A14B-Diffusers/transformer_2}   # for little

source "$here/../../wan2.1/common.sh"
inference "$@"
