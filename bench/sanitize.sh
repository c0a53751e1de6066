#!/bin/bash
# The CUDA kernels under compute-sanitizer (memcheck, racecheck) at small sizes, on a GPU: a few minutes. A tool that found
# nothing leaves FOLDER/TOOL.done and is not run again.
#
#   bench/sanitize.sh [FOLDER]     FOLDER: where the logs go, default bench/results/gpu/sanitize
#
# PYTHON names the interpreter (default python3); compute-sanitizer comes with the CUDA toolkit. Fails on any finding.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
folder=${1:-bench/results/gpu/sanitize}
if ! command -v compute-sanitizer >/dev/null; then
  echo "bench/sanitize.sh: no compute-sanitizer on PATH (it is in the CUDA toolkit)" >&2
  exit 2
fi
"$PYTHON" -c 'import sys; from lora_kernels.ops import dispatch; sys.exit(dispatch.unavailable("cuda"))' || exit 2
mkdir -p "$folder"
failed=0
# torch's allocator would hide accesses beyond a tensor.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
small='test_golden or test_odd_sizes and 33 or test_gradient and 33 or test_few_rows and 33 or test_few_rows_of'
small+=' or test_linear and 300 or test_gradient_of_x and 300 or test_several_adapters and 300'
for tool in memcheck racecheck; do
  if [ -e "$folder/$tool.done" ]; then
    echo "== $tool: done before"
    continue
  fi
  echo "== $tool"
  if compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$folder/$tool.log" \
    "$PYTHON" -m pytest tests/gpu/test_gpu_cuda.py tests/gpu/test_gpu_sm90.py -q -p no:cacheprovider -k "$small"; then
    touch "$folder/$tool.done"
  else
    echo "== $tool: failed, see $folder/$tool.log"
    failed=1
  fi
done
exit $failed
