#!/bin/bash
# Everything that needs a GPU, in one command and under ten minutes: build, GPU tests, tuning, the full benchmark.
#
#   bench/gpu.sh [--dry-run] [FOLDER] [PART …]     FOLDER: default bench/results/gpu/NAME_OF_THE_GPU
#
# Resumable: a part that ended well leaves FOLDER/PART.done and is not run again; remove that file to repeat it. A part
# that ran out of its time goes on where it can: kernels stay compiled, tune keeps the shapes that it measured.
# --dry-run prints each part, its limit in seconds and its command, and needs no GPU.
# PYTHON names the interpreter (default python3); torch with CUDA, Triton and pytest are taken from there.
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
known="build tests sanitize kernels decode prefill merge multi grouped train tune"
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
  timeout "$limit" "$@" > >(tee "$folder/$part.log") 2>&1
  local status=$?
  case $status in
    0) touch "$folder/$part.done" ;;
    124) echo "== $part: out of its $limit s; the same command goes on" ;;
    *) echo "== $part: failed (exit $status), see $folder/$part.log" ;;
  esac
  [ $status = 0 ] || failed=1
}

bench() { run "$1" "$2" "$PYTHON" -m lora_kernels.bench.gpu "$1" --out "$folder"; }

# The limits add up to ten minutes.
run build 90 env LORA_KERNELS_BUILD="${LORA_KERNELS_BUILD:-auto}" "$PYTHON" -m build_support
run tests 150 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider
if [ $dry = 1 ] || command -v compute-sanitizer >/dev/null; then
  run sanitize 60 bench/sanitize.sh "$folder"
else
  echo "== sanitize: no compute-sanitizer on PATH, not run"
fi
run kernels 60 "$PYTHON" -m pytest tests/triton -q -p no:cacheprovider --ignore=tests/triton/test_static.py
bench decode 45
bench prefill 50
bench merge 20
bench multi 20
bench grouped 20
bench train 35
run tune 50 "$PYTHON" -m lora_kernels tune --tokens 16 8192 --rank 16 --slots 8 --seconds 0.1 --budget 40 \
  --out "$folder/tuned.json"
[ $dry = 1 ] && exit 0
"$PYTHON" -m lora_kernels.bench.gpu report --out "$folder" | tee "$folder/report.txt"
exit $failed
