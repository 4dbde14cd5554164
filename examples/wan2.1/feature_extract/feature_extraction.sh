#!/usr/bin/env bash
# Encodes videos and captions to features, once, for training. Edit the values below and those of the machines in
# common.sh, give them as environment variables, or append flags: NPUS_PER_NODE=2 bash feature_extraction.sh --overwrite
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

TASK=${TASK:-t2v}                     # t2v, i2v or flf2v; the files of the last two are in folders of these names
case "$TASK" in
    t2v) files=$here ;;
    i2v | flf2v) files=$here/$TASK ;;
    *) echo "error ENV-005: TASK is $TASK. Fix: use t2v, i2v or flf2v." >&2; exit 64 ;;
esac
MM_DATA=${MM_DATA:-$files/data.json}
MM_MODEL=${MM_MODEL:-$files/model_wan.json}
MM_TOOL=${MM_TOOL:-$files/tools.json}
LOG_DIR=${LOG_DIR:-./logs}

source "$here/../common.sh"
log_to "$LOG_DIR/extract_$(date +%Y%m%d_%H%M%S)_node$NODE_RANK.log"
launch mm.cli.extract --mm-data "$MM_DATA" --mm-model "$MM_MODEL" --mm-tool "$MM_TOOL" "$@"
