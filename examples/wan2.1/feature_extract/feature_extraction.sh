#!/usr/bin/env bash
# Encodes videos and captions to features, once, for training. Edit the values below and those of the machines in
# common.sh, give them as environment variables, or append flags: NPUS_PER_NODE=2 bash feature_extraction.sh --overwrite
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

TASK=${TASK:-t2v}                     # the files of another one are in the folder of its name; without a data.json, t2v's
tasks="t2v i2v flf2v speedcontrol fun_inp fun_control fun_control_ref fun_camera vace wan22_i2v ti2v"
case " $tasks " in
    *" $TASK "*) files=$here/$TASK ;;
    *) echo "error ENV-005: TASK is $TASK. Fix: use one of $tasks." >&2; exit 64 ;;
esac
if [ "$TASK" = t2v ]; then files=$here; fi
data=$files/data.json
if [ ! -f "$data" ]; then data=$here/data.json; fi
MM_DATA=${MM_DATA:-$data}
MM_MODEL=${MM_MODEL:-$files/model_wan.json}
MM_TOOL=${MM_TOOL:-$files/tools.json}
LOG_DIR=${LOG_DIR:-./logs}

source "$here/../common.sh"
log_to "$LOG_DIR/extract_$(date +%Y%m%d_%H%M%S)_node$NODE_RANK.log"
launch mm.cli.extract --mm-data "$MM_DATA" --mm-model "$MM_MODEL" --mm-tool "$MM_TOOL" "$@"
