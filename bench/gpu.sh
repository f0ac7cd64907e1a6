#!/usr/bin/env bash
# One call on a machine with a GPU, under nine minutes: builds, tests every kernel against its reference on the device,
# tunes, benches; JSON in OUTDIR. docs/gpu.md says what each step writes.
#   bench/gpu.sh OUTDIR [PYTHON [WHEELS]]
#     PYTHON  has torch, triton, numpy, cmake and ninja (python3); WHEELS: a folder of what it lacks (wheels, or none)
#   ONLY="build denoiser" runs the steps it names, for several calls on one machine; LIMIT=seconds of everything (530)
#   DRY=1 prints the steps; TRAIN=1 trains the emoji model too (FONT: its font file)
set -euo pipefail
out=${1:?usage: bench/gpu.sh OUTDIR [PYTHON [WHEELS]]}
python=${2:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
mkdir -p "$out"
out=$(cd "$out" && pwd)
wheels=${3:-${WHEELS:-$(dirname "$0")/../wheels}}
[ -d "$wheels" ] && wheels=$(cd "$wheels" && pwd)
cd "$(dirname "$0")/.."
exec "$python" bench/gpu_steps.py "$out" "$python" "$wheels"
