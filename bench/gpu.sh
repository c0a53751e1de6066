#!/bin/bash
# Everything that needs a GPU, in one command and under ten minutes: build, GPU tests, tuning, the full benchmark.
#
#   bench/gpu.sh [FOLDER] [PART …]     FOLDER: default bench/results/gpu/NAME_OF_THE_GPU
#
# Resumable: a part that ended well leaves FOLDER/PART.done and is not run again; remove that file to repeat it.
# PYTHON names the interpreter (default python3); torch with CUDA, Triton and pytest are taken from there.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
if [ -z "$gpu" ]; then
  echo "bench/gpu.sh: torch finds no CUDA device" >&2
  exit 2
fi
slug=$(echo "$gpu" | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9' '-' | sed 's/-$//')
folder=${1:-bench/results/gpu/$slug}
shift $(($# ? 1 : 0))
parts=${*:-build tests sanitize kernels decode prefill merge multi train tune}
mkdir -p "$folder"
failed=0

run() {  # run PART SECONDS COMMAND …
  local part=$1 limit=$2
  shift 2
  case " $parts " in *" $part "*) ;; *) return ;; esac
  if [ -e "$folder/$part.done" ]; then
    echo "== $part: done before"
    return
  fi
  echo "== $part"
  if timeout "$limit" "$@" > >(tee "$folder/$part.log") 2>&1; then
    touch "$folder/$part.done"
  else
    echo "== $part: failed or out of time (exit $?)"
    failed=1
  fi
}

bench() { run "$1" "$2" "$PYTHON" -m lora_kernels.bench.gpu "$1" --out "$folder"; }

run build 90 env LORA_KERNELS_BUILD="${LORA_KERNELS_BUILD:-auto}" "$PYTHON" -m build_support
run tests 180 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  run sanitize 120 bench/sanitize.sh "$folder"
else
  echo "== sanitize: no compute-sanitizer on PATH, not run"
fi
run kernels 60 "$PYTHON" -m pytest tests/triton -q -p no:cacheprovider --ignore=tests/triton/test_static.py
bench decode 50
bench prefill 50
bench merge 25
bench multi 25
bench train 40
run tune 60 "$PYTHON" -m lora_kernels tune --tokens 1 16 64 512 8192 --rank 16 --out "$folder/tuned.json"
"$PYTHON" -m lora_kernels.bench.gpu report --out "$folder" | tee "$folder/report.txt"
exit $failed
