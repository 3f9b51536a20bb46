#!/usr/bin/env bash
# All that needs a GPU, in ten minutes, what is worth most first:
#   benchmarks/gpu.sh [--rehearse] [-o FOLDER] [-t SECONDS] [STAGE ...]
# Stages: build smoke correct kernels roofs host models sanitize triton. Each has its own limit and
# appends to FOLDER/harvest.jsonl and FOLDER/harvest.log as it works; in the end all of it and the
# libraries are packed into FOLDER/harvest.tgz, and a table is printed. Once a result is wrong,
# nothing is timed any more: only the sanitizer still runs, over the ops that are wrong. A later
# run that finds the libraries of an earlier one in dynmm_kernels/ does not build again.
# --rehearse runs every stage without a GPU: small, in a copy of the sources, with stubs for ncu and
# compute-sanitizer. The exit status is the number of stages that did not end well.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

usage() { sed -n '2,4p' benchmarks/gpu.sh >&2; exit 2; }

python=${PYTHON:-python3} out='' total=570 rehearse=() stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=(--rehearse) ;;
    -o | -t) [ $# -gt 1 ] || usage; [ "$1" = -o ] && out=$2 || total=$2; shift ;;
    build | smoke | correct | kernels | roofs | host | models | sanitize | triton) stages+=("$1") ;;
    *) usage ;;
  esac
  shift
done
[ ${#stages[@]} -gt 0 ] ||
  stages=(build smoke correct kernels roofs host models sanitize triton)
declare -A limit=([build]=150 [smoke]=60 [correct]=90 [kernels]=70 [roofs]=60 [host]=40
  [models]=140 [sanitize]=90 [triton]=150)

[ -n "$out" ] || { [ ${#rehearse[@]} -gt 0 ] && out=build/rehearsal || out=benchmarks/results/gpu; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
rm -f "$out"/harvest.* "$out"/table.txt "$out"/results.json
log=$out/harvest.log
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
echo "{\"stage\": \"build\", \"commit\": \"$commit\"}" >"$out/harvest.jsonl"

if [ ${#rehearse[@]} -gt 0 ]; then
  copy=$(mktemp -d)
  trap 'rm -rf "$copy"' EXIT
  cp -r benchmarks csrc dynmm_kernels tests setup.py pyproject.toml README.md "$copy"
  rm -f "$copy"/dynmm_kernels/*.so
  cd "$copy" || exit 1
  export OMP_NUM_THREADS=1 # nothing here is large enough for more
  for stage in "${!limit[@]}"; do limit[$stage]=$((2 * limit[$stage])); done
fi

export PYTHONUNBUFFERED=1
failures=0 stop='' only=''
told() { # stage, state, seconds
  echo "{\"stage\": \"$1\", \"state\": \"$2\", \"seconds\": $3}" >>"$out/harvest.jsonl"
  printf '%-9s %-8s %4d s\n' "$1" "$2" "$3"
}

for stage in "${stages[@]}"; do
  began=$SECONDS left=$((total - SECONDS - 15))
  module=benchmarks.gpu.$stage extra=()
  case $stage in
    correct | triton) module=benchmarks.gpu.suite extra=("$stage") ;;
    sanitize) extra=(--only "$only") ;;
  esac
  if [ "$stop" = build ] || { [ "$stop" = wrong ] && [ "$stage" != sanitize ]; }; then
    told "$stage" skipped 0
    continue
  elif [ "$left" -lt 5 ]; then
    told "$stage" 'no time' 0
    failures=$((failures + 1))
    continue
  fi
  seconds=$((left < limit[$stage] ? left : limit[$stage]))
  printf '\n=== %s, at most %d s\n' "$stage" "$seconds" >>"$log"
  timeout -s INT -k 15 "$seconds" "$python" -m "$module" "${extra[@]}" "$out" "${rehearse[@]}" \
    >>"$log" 2>&1
  status=$?
  state=ok
  case $status in
    0) ;;
    3) state=WRONG ;;
    124 | 137) state=cut ;;
    *) state=FAILED ;;
  esac
  told "$stage" "$state" $((SECONDS - began))
  [ "$status" = 0 ] && continue
  failures=$((failures + 1))
  tail -n 4 "$log" | cut -c1-200
  if [ "$stage" = build ]; then
    stop=build
  elif [ "$state" = WRONG ]; then
    stop=wrong only=$("$python" -m benchmarks.gpu.report "$out" --wrong)
  fi
done

"$python" -m benchmarks.gpu.report "$out"
mapfile -t found < <(cd "$out" && ls)
mapfile -t libraries < <(cd dynmm_kernels && ls ./*.so 2>/dev/null)
tar czf "$out/harvest.tgz" -C "$out" "${found[@]}" -C "$PWD/dynmm_kernels" "${libraries[@]}"
exit "$failures"
