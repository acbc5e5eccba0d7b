#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes, as one JSON: the device tests, then the training-speed benchmark
# (DINOv2-base geometry, random weights, bf16, batch 32).
#
#   tests/gpu.sh [OUT.json]                      python from .venv, or PYTHON=
#
# Needs torch with CUDA and the packages of pyproject.toml; nothing is downloaded. Exit code 1 if a test failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-gpu.json}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

# 250 + 300 seconds at most. What the time cut off is said in the JSON.
timeout 250 "$PYTHON" -m pytest -q -p no:xdist -p no:cacheprovider -m "not benchmark and not long" \
  tests/test_device.py tests/downstream/test_detectors_on_device.py tests/recipes/test_pretrain_on_device.py \
  2>&1 | tee "$LOGS/tests"
TESTS=$?
GPU_JSON="$LOGS/speed.json" timeout 300 "$PYTHON" -m pytest -q -s -p no:xdist -p no:cacheprovider -m benchmark \
  tests/benchmarks/test_training_speed.py -k gpu 2>&1 | tee "$LOGS/speed"
SPEED=$?

"$PYTHON" - "$OUT" "$LOGS" "$TESTS" "$SPEED" <<'PY'
import json, pathlib, subprocess, sys
import torch

out, logs, tests, speed = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
lines = (logs / "tests").read_text(errors="replace").splitlines()
measured = logs / "speed.json"
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
report = {
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
    "torch": torch.__version__,
    "commit": commit or None,
    "device_tests": {
        "exit_code": tests,
        "cut_off": tests == 124,
        "summary": lines[-1] if lines else "",
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    },
    "training_speed": {
        "exit_code": speed,
        "cut_off": speed == 124,
        **(json.loads(measured.read_text()) if measured.exists() else {}),
    },
}
pathlib.Path(out).write_text(json.dumps(report, indent=2) + "\n")
print(json.dumps(report, indent=2))
PY
[ "$TESTS" -eq 0 ] && [ "$SPEED" -eq 0 ]
