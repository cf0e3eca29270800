#!/usr/bin/env bash
# Tests and measurements on a machine with one CUDA device, in at most ten minutes:
#
#     [OUT=FOLDER] [PYTHON=PROGRAM] [WHEELS=FOLDER] benchmarks/gpu.sh [--device cpu --small]
#
# PYTHON is .venv's by default, or python3 where there is none.
#
# Each stage has its time limit and leaves OUT/STAGE.json (gpu.py names the stages), which says `"finished": false` where it
# was stopped; then the next begins. Returns 2 where nothing can be measured, else 1 if a stage did not finish.
#
# Nothing is downloaded. What the machine's Python lacks comes from WHEELS, which gpu_wheels.py fills on a machine with a
# package index. Without a CUDA device it ends at once; `--device cpu --small` rehearses the stages in seconds.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-build/gpu}
[ -x .venv/bin/python ] && venv=.venv/bin/python
PYTHON=${PYTHON:-${venv:-python3}}
WHEELS=${WHEELS:-build/gpu-wheels}
PACKAGES=build/gpu-packages
# stage:seconds
STAGES=${STAGES:-environment:30 checkpoint:80 proof:90 one_answer:90 graphs:90 decode:80 prefill:50 kernels:120 tests:90}

mkdir -p "$OUT" || exit
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  "$PYTHON" benchmarks/gpu_wheels.py install --wheels "$WHEELS" --into "$PACKAGES" || exit
  export PYTHONPATH="$PWD/$PACKAGES${PYTHONPATH:+:$PYTHONPATH}"
fi

failed=0
for stage in $STAGES; do
  name=${stage%:*}
  echo "--- $name (at most ${stage#*:} s)"
  case $name in
    figures-* | peers-*) program=gpu_figures.py ;;
    *) program=gpu.py ;;
  esac
  timeout --kill-after=10 "${stage#*:}" "$PYTHON" "benchmarks/$program" "$name" --out "$OUT" "$@"
  code=$?
  if [ "$code" -eq 0 ]; then
    cat "$OUT/$name.json"
    continue
  fi
  failed=$((failed + 1))
  [ "$code" -eq 124 ] && echo "$name: stopped at its limit"
  [ "$code" -eq 2 ] && exit 2  # refused: no later stage would do better
done
exit "$((failed > 0))"
