#!/bin/bash
# Everything that needs a GPU, in one command and under ten minutes: build, GPU tests, tuning, the full benchmark.
#
#   bench/gpu.sh [--dry-run] [FOLDER] [PART …]     FOLDER: default bench/results/gpu/NAME_OF_THE_GPU
#
# Resumable: a part that ended well leaves FOLDER/PART.done and is not run again; remove that file to repeat it. A part
# that ran out of its time goes on where it can: kernels stay compiled, tests that passed are not run again, a benchmark
# keeps its cases and tune its shapes.
# A part that fails stops no other; the exit status is 1 then. A build that ends well makes all other parts run again.
# A kernel that hangs or takes the GPU with it costs its own test or its own time, and is named (lora_kernels/bench/
# watched.py; pytest-timeout and pytest-xdist, where they are there).
# --dry-run prints each part, its limit in seconds and its command, and needs no GPU.
# PYTHON names the interpreter (default python3); torch with CUDA, Triton and pytest are taken from there, and
# pytest-xdist where it is there: most of the time of the tests is that of compiling kernels.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
dry=0
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi

missing() {
  echo "bench/gpu.sh: $1" >&2
  echo "bench/gpu.sh: nothing was run. It needs a GPU from sm_80 on, and in $PYTHON (set PYTHON=…) a torch with CUDA," >&2
  echo "bench/gpu.sh: Triton >= 3.6 and pytest; --dry-run prints what would run." >&2
  exit 2
}

if [ $dry = 1 ]; then
  gpu=no-gpu
else
  command -v "$PYTHON" >/dev/null || missing "no interpreter $PYTHON"
  "$PYTHON" -c 'import torch' 2>/dev/null || missing "$PYTHON has no torch"
  gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
  [ -n "$gpu" ] || missing "torch finds no CUDA device"
  for module in triton pytest; do
    "$PYTHON" -c "import $module" 2>/dev/null || missing "$PYTHON has no $module"
  done
fi
slug=$(echo "$gpu" | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9' '-' | sed 's/-$//')
folder=${1:-bench/results/gpu/$slug}
shift $(($# ? 1 : 0))
known="build tests kernels decode prefill train merge multi grouped tune sanitize"
parts=${*:-$known}
for part in $parts; do
  case " $known " in
    *" $part "*) ;;
    *)
      echo "bench/gpu.sh: no part '$part'; there are: $known" >&2
      exit 2
      ;;
  esac
done
[ $dry = 1 ] || mkdir -p "$folder"
failed=0

run() {  # run PART SECONDS COMMAND …
  local part=$1 limit=$2
  shift 2
  case " $parts " in *" $part "*) ;; *) return ;; esac
  if [ $dry = 1 ]; then
    echo "$part $limit $*"
    return
  fi
  if [ -e "$folder/$part.done" ]; then
    echo "== $part: done before"
    return
  fi
  echo "== $part"
  # Interrupted, pytest says what has failed so far.
  timeout --signal=INT --kill-after=15 "$limit" "$@" > >(tee "$folder/$part.log") 2>&1
  local status=$?
  case $status in
    0)
      [ "$part" != build ] || rm -f "$folder"/*.done "$folder"/*.passed*
      touch "$folder/$part.done"
      ;;
    124 | 137) echo "== $part: out of its $limit s; the same command goes on" ;;
    *) echo "== $part: failed (exit $status), see $folder/$part.log" ;;
  esac
  [ $status = 0 ] || failed=1
}

bench() { run "$1" "$2" "$PYTHON" -m lora_kernels.bench.gpu "$1" --out "$folder"; }

workers=
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  cores=$(nproc)
  workers="-n $((cores < 8 ? cores : 8)) --dist worksteal"
fi
if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then
  workers+=" --timeout=60 --timeout-method=thread"
fi
# $workers is several words. -rfEs: what was skipped is said, with the reason.
tests() {
  local passed=$folder/$1.passed
  [ ! -e "$passed" ] || cp "$passed" "$passed.before"
  LORA_KERNELS_PASSED=$passed run "$1" "$2" "$PYTHON" -m pytest $workers -q -rfEs -p no:cacheprovider "${@:3}"
}

# The limits add up to ten minutes.
run build 150 env LORA_KERNELS_BUILD="${LORA_KERNELS_BUILD:-auto}" "$PYTHON" -m build_support
tests tests 150 tests/gpu
tests kernels 62 tests/triton_kernels --ignore=tests/triton_kernels/test_static.py --ignore=tests/triton_kernels/test_launch.py
bench decode 35
bench prefill 48
bench train 33
bench merge 20
bench multi 17
bench grouped 15
# Shows that tuning works here; `lora_kernels tune` alone measures every shape and takes its time to compile them.
run tune 35 "$PYTHON" -m lora_kernels tune --op merge_ input_gradient lora_linear --shape 4096x4096 --tokens 8192 \
  --rank 16 --slots 8 --group --seconds 0.1 --budget 20 --out "$folder/tuned.json"
if [ $dry = 1 ] || command -v compute-sanitizer >/dev/null; then
  left=$((dry ? 35 : 590 - SECONDS)) # the last part, and the slowest, has what the others left
  run sanitize $((left < 35 ? 35 : left)) bash bench/sanitize.sh "$folder"
else
  echo "== sanitize: no compute-sanitizer on PATH, not run"
fi
[ $dry = 1 ] && exit 0
"$PYTHON" -m lora_kernels.bench.gpu report --out "$folder" | tee "$folder/report.txt"
exit $failed
