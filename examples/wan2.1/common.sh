# What the example scripts share; they source it after setting what differs between them. Not run by itself.
set -euo pipefail

# Values that a script has not set. Give others in the environment, write them into the script, or change them here.
# Machines:
NPUS_PER_NODE=${NPUS_PER_NODE:-8}   # processes of a node, one for each NPU or GPU
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
# Layout: processes that share the model's width, its blocks (in VP chunks each), a clip. The others are replicas.
TP=${TP:-1}
PP=${PP:-1}
VP=${VP:-1}
CP=${CP:-1}
MBS=${MBS:-1}                       # samples, or prompts, in one forward
# Training:
GRAD_ACC_STEP=${GRAD_ACC_STEP:-1}
PRECISION=${PRECISION:-bf16}        # bf16 or fp32
RECOMPUTE=${RECOMPUTE:-}            # flags; empty keeps everything, which is fastest where it fits
# Files: MM_DATA and MM_MODEL are those that the script names, or those beside it.
LOAD_PATH=${LOAD_PATH:-}            # HF, native or MM weights; of finetune_lora.sh an adapter to start from, with
                                    # LOAD_BASE_MODEL below it; of inference.sh weights or a training run
SAVE_PATH=${SAVE_PATH:-}            # checkpoints and train.log, where the same command goes on; or clips
# Generation: text files, a line for each clip. What is empty is as MM_MODEL says, SAVE_PATH too.
PROMPT=${PROMPT:-}
IMAGE=${IMAGE:-}                    # an image, or "first, last" for flf2v
VIDEO=${VIDEO:-}
CONTROL=${CONTROL:-}                # a video that the clip follows
REFERENCE=${REFERENCE:-}            # an image of what is to be seen; of VACE several, with commas between
CAMERA=${CAMERA:-}                  # a pose file, or a direction and a speed
MASK=${MASK:-}                      # a video or image, white where VIDEO is made anew
LOW_NOISE=${LOW_NOISE:-}            # weights of the second of two experts; LOAD_PATH is the one for much noise
# DRY_RUN=1, DOCTOR=1 or PARITY=1 say what training would cost, whether it will work, whether its layout computes right.

# This checkout's `mm`, with the environment that is active, else with the checkout's own.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -x "$root/.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ]; then PATH=$root/.venv/bin:$PATH; fi
# An empty or relative word means the current folder, whose files Python would take for its own modules.
words=${PYTHONPATH:-}: PYTHONPATH=
while [ -n "$words" ]; do
    case "$words" in /*) PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}${words%%:*} ;; esac
    words=${words#*:}
done
export PYTHONPATH
# The memory pool grows in place, which leaves less of it in unusable pieces. An older name of the variable is heard.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
# Read by torch_npu and HCCL alone; docs/npu.md says what they do.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}              # seconds; NPU clusters start slowly
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
export COMBINED_ENABLE=${COMBINED_ENABLE:-1}

# Replaces the script by a module of this checkout. A signal that is sent to the script's process is one to the program
# then, also where that is the first process of a container; a shell in between would keep it to itself.
become() { # module, words...
    exec python "$root/mm/isolated.py" "$@"
}

# mm.cli.launch is torchrun, which also takes its flags, with the job's own exit code and last line; one process needs
# none, and starts faster without.
launch() { # module, words...
    local module=$1
    shift
    if [ "$((NPUS_PER_NODE * NNODES))" -eq 1 ]; then become "$module" "$@"; fi
    become mm.cli.launch --nproc_per_node "$NPUS_PER_NODE" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
        --max_restarts "${MAX_RESTARTS:-0}" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -m "$module" "$@"
}

# The program writes what it says to a log file as well, without progress bars. A terminal or a pipe that goes away does
# not end it then. All of its output goes to standard output.
log_to() { # file
    mkdir -p -- "$(dirname -- "$1")" ||
        { echo "error ENV-006: the folder of $1 cannot be made. Fix: name another folder, or free its disk." >&2; exit 74; }
    export MM_LOG_FILE=$1
    [ -e /dev/fd/1 ] || exec >/dev/null   # whoever started this has closed it
    exec 2>&1
}

run_training() { # flags...
    local world=$((NPUS_PER_NODE * NNODES))
    local dp=$((world / (TP * PP * CP)))
    local precision_args=""
    local virtual_args=""
    case "$PRECISION" in
        bf16) precision_args="--bf16" ;;
        fp32) ;;
        *) echo "error ENV-004: PRECISION is $PRECISION. Fix: use bf16 or fp32." >&2; exit 64 ;;
    esac
    if [ "$VP" -gt 1 ]; then virtual_args="--virtual-pipeline-model-parallel-size $VP"; fi
    set -- --mm-data "$MM_DATA" --mm-model "$MM_MODEL" ${LOAD_PATH:+--load "$LOAD_PATH"} --save "$SAVE_PATH" --save-on-signal \
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP" \
        --micro-batch-size "$MBS" --global-batch-size "$((MBS * GRAD_ACC_STEP * (dp > 0 ? dp : 1)))" \
        $precision_args $virtual_args "$@"
    if [ -n "${DRY_RUN:-}" ]; then   # says what the job costs, in one process; --rank and --latent-size may be appended
        become mm.cli.doctor --dry-run --world-size "$world" "$@"
    fi
    if [ -n "${DOCTOR:-}" ]; then    # says whether the job will work, from all its processes and nodes
        launch mm.cli.doctor "$@"
    fi
    if [ -n "${PARITY:-}" ]; then    # says whether its layout computes what one device does, on all its processes
        launch mm.cli.doctor parity "$@"
    fi
    log_to "$SAVE_PATH/train.log"
    launch mm.cli.train "$@"
}

run_generation() { # flags...
    launch mm.cli.generate --mm-model "$MM_MODEL" --load "$LOAD_PATH" --micro-batch-size "$MBS" \
        --tensor-model-parallel-size "$TP" --context-parallel-size "$CP" \
        ${SAVE_PATH:+--save-path "$SAVE_PATH"} ${PROMPT:+--prompt "$PROMPT"} \
        ${IMAGE:+--image "$IMAGE"} ${VIDEO:+--video "$VIDEO"} ${CONTROL:+--control "$CONTROL"} \
        ${REFERENCE:+--reference "$REFERENCE"} ${CAMERA:+--camera "$CAMERA"} ${MASK:+--mask "$MASK"} \
        ${LOW_NOISE:+--low-noise "$LOW_NOISE"} "$@"
}

TRAINING="
    --lr-decay-style constant --weight-decay 1e-2 --clip-grad 1.0
    --train-iters 5000 --log-interval 1 --save-interval 500 --use-distributed-optimizer --overlap-grad-reduce
"

pretrain() { # flags...
    MM_DATA=${MM_DATA:-$here/feature_data.json}
    MM_MODEL=${MM_MODEL:-$here/pretrain_model.json}
    run_training --lr 1e-5 --min-lr 1e-5 $TRAINING $RECOMPUTE "$@"
}

# Every checkpoint has the adapter as pytorch_lora_weights.safetensors too, which diffusers loads, and as
# lora_comfyui.safetensors for ComfyUI, DiffSynth-Studio and VideoX-Fun.
finetune_lora() { # flags...
    MM_DATA=${MM_DATA:-$here/feature_data.json}
    MM_MODEL=${MM_MODEL:-$here/pretrain_model.json}
    run_training --load-base-model "$LOAD_BASE_MODEL" --lora-r 16 --lora-alpha 16 \
        --lora-target-modules proj_q proj_k proj_v proj_out \
        --lr 1e-4 --min-lr 1e-4 $TRAINING --overlap-param-gather $RECOMPUTE "$@"
}

inference() { # flags...
    MM_MODEL=${MM_MODEL:-$here/inference_model.json}
    run_generation "$@"
}
