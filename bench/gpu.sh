#!/usr/bin/env bash
# One call on a machine with a GPU: build, test every kernel against its reference on the device, bench; JSON in OUTDIR.
#   bench/gpu.sh OUTDIR [PYTHON]
# Needs torch, triton, numpy and a C++17 compiler. Wheels of anything else that is missing may lie in wheels/ (not tracked).
set -uo pipefail
out=${1:?usage: bench/gpu.sh OUTDIR [PYTHON]}
python=${2:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$out"
failed=0

step() { # NAME COMMAND...: run, log, time, remember failures
    local name=$1 begin=$SECONDS
    shift
    if "$@" >"$out/$name.log" 2>&1; then echo "ok      $name $((SECONDS - begin)) s"; else
        echo "FAILED  $name $((SECONDS - begin)) s"
        tail -n 15 "$out/$name.log"
        failed=1
    fi
}

[ -d wheels ] && step wheels "$python" -m pip install --no-index --find-links wheels \
    pytest hypothesis pybind11 ninja safetensors pillow typer rapidfuzz $(ls wheels | grep -o '^diffusers' || true)
step build env VIVACE_REQUIRE_EXT=1 "$python" setup.py -q build_ext --inplace
export PYTHONPATH=$PWD/python
step doctor "$python" -m vivace doctor --json
"$python" -m vivace doctor --json >"$out/doctor.json"
step kernels "$python" -m pytest -q tests/kernels -p no:cacheprovider
step bench "$python" -m vivace bench kernels --quick --out "$out"
if "$python" -c "import diffusers" 2>/dev/null; then
    step denoiser "$python" -m vivace bench denoiser --quick --out "$out"
else
    echo "left out denoiser: diffusers is not installed (its wheels and those of its needs may lie in wheels/)"
fi
step generate "$python" -m vivace generate "red heart" --n 4 --out "$out/heart.png"
exit $failed
