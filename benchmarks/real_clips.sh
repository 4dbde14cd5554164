#!/usr/bin/env bash
# Real clips through extraction and 20 training steps at 480x832 with the tiny model of the embedded default.
#   bash benchmarks/real_clips.sh FOLDER [FRAMES]      FOLDER holds data.json and the videos; FRAMES is 4k+1, default 49
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
clips=$(cd "$1" && pwd)
frames=${2:-49}
out=${WORKSPACE:-$root/workspace-real-clips}
bash "$root/tools/setup_env.sh"
export PATH=$root/.venv/bin:$PATH VIRTUAL_ENV=$root/.venv NPUS_PER_NODE=1
mm demo --out "$out/demo"
configs=$out/demo/configs

# the files of the embedded default, with the real clips and their size
python - "$configs" "$clips" "$frames" "$out" <<'PY'
import json, sys
from pathlib import Path
configs, clips, frames, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
for name in ("data.json", "feature_data.json"):
    content = json.loads((configs / name).read_text())
    content["dataset_param"]["preprocess_parameters"] |= {"num_frames": frames, "max_height": 480, "max_width": 832}
    (configs / name).write_text(json.dumps(content))
(configs / "data.txt").write_text(f"{clips},data.json\n")
(configs / "tools.json").write_text(json.dumps({"sorafeature": {"save_path": f"{out}/features"}, "task": "t2v"}))
(configs / "feature_data.txt").write_text(f"{out}/features\n")
PY

measured() { /usr/bin/env python - "$@" <<'PY'
import resource, subprocess, sys, time
started = time.monotonic()
code = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
print(f"### {time.monotonic() - started:.0f} s, peak {peak:.2f} GB", flush=True)
sys.exit(code)
PY
}
MM_DATA=$configs/data.json MM_MODEL=$configs/model_wan.json MM_TOOL=$configs/tools.json LOG_DIR=$out/logs \
    measured bash "$root/examples/wan2.1/feature_extract/feature_extraction.sh"
MM_DATA=$configs/feature_data.json MM_MODEL=$configs/pretrain_model.json PRECISION=fp32 \
    LOAD_PATH=$out/demo/weights/Wan2.1-T2V-Tiny-Diffusers/transformer SAVE_PATH=$out/checkpoints \
    measured bash "$root/examples/wan2.1/1.3b/t2v/pretrain.sh" --train-iters 20 --lr 1e-3
