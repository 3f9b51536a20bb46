#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes:
#   benchmarks/gpu.sh [-o FOLDER] [STAGE ...]     stages: build info test repeat sanitize bench plot
# Builds without a network into the current environment (torch, triton, pytest, pytest-benchmark and
# ninja must be there). Each stage reports, the next one runs in any case; JSON, logs and figures lie
# in FOLDER. The exit status is the number of stages that failed.
set -uo pipefail
cd "$(dirname "$0")/.."

out=benchmarks/results/gpu
if [ "${1:-}" = "-o" ]; then
  out=$2
  shift 2
fi
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build info test repeat sanitize bench plot)
mkdir -p "$out"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python -c \
  'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}

stage_build() { pip install --no-build-isolation --no-deps --force-reinstall -v .; }

stage_info() {
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
  python -m dynmm_kernels info && DYNMM_BACKEND=cuda python -m dynmm_kernels info --json >"$out/info.json"
  python -m dynmm_kernels check
}

stage_repeat() { python -m pytest -q -p no:cacheprovider tests/ops/test_gpu.py -k "same_bits"; }

stage_test() { python -m pytest -q -p no:cacheprovider tests/ops/test_gpu.py -k "not same_bits"; }

# A reduced set: one size of each kind, without the loops that last long under instrumentation.
stage_sanitize() {
  local failed=0 some=()
  for case in "route[cuda-33-8]" "route[cuda-16385-8]" "faults[cuda-1025]" \
    "route_argmax[cuda-1025-dtype1]" "sizes[cuda-33-1024]" "arithmetic[cuda-dtype1-64]" \
    "arithmetic[cuda-dtype1-70000]"; do
    some+=("tests/ops/test_gpu.py::test_$case")
  done
  for tool in memcheck racecheck initcheck synccheck; do
    timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python -m pytest -q -x -p no:cacheprovider "${some[@]}" || { echo "$tool: failed"; failed=1; }
  done
  return $failed
}

stage_bench() {
  timeout 240 python -m pytest benchmarks/ --benchmark-only -q -p no:cacheprovider \
    --benchmark-json "$out/results.json"
}

stage_plot() { python -m dynmm_kernels plot "$out/results.json" -o "$out/speedup.png"; }

failures=0
summary=""
for stage in "${stages[@]}"; do
  began=$SECONDS
  printf '\n=== %s\n' "$stage"
  if "stage_$stage" 2>&1 | tee "$out/$stage.log"; then
    state=ok
  else
    state=FAILED
    failures=$((failures + 1))
  fi
  summary+=$(printf '%-10s %-7s %4d s' "$stage" "$state" $((SECONDS - began)))$'\n'
done
printf '\n%s' "$summary" | tee "$out/summary.txt"
exit $failures
