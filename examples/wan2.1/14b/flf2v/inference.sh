#!/usr/bin/env bash
# Generates one clip for each prompt and its first and last image with Wan2.1 FLF2V 14B. Edit the values below and
# inference_model.json, give them as environment variables, or append flags: LOAD_PATH=out bash inference.sh
# --num-inference-steps 30 --seed 7
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

NPUS_PER_NODE=${NPUS_PER_NODE:-1}       # TP x CP of them share a clip, the others make other clips
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

TP=${TP:-1}
CP=${CP:-1}
MBS=${MBS:-1}                           # prompts in one forward

MM_MODEL=${MM_MODEL:-$here/inference_model.json}
LOAD_PATH=${LOAD_PATH:-./weights/Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers/transformer}   # HF, native or MM weights, or a training run
SAVE_PATH=${SAVE_PATH:-}                # folder for the clips; empty: save_path of MM_MODEL
PROMPT=${PROMPT:-}                      # text file, one prompt a line; empty: prompt of MM_MODEL
IMAGE=${IMAGE:-}                        # text file, "first, last" a line for each prompt; empty: image of MM_MODEL

source "$here/../../common.sh"
run_generation "$@"
