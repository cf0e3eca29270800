#!/usr/bin/env bash
# Tests and measurements on a machine with one CUDA device, in at most seven minutes; with STAGES=more what is left of
# them, with STAGES=operations each kernel's rate beside its ceiling and what promise P1 costs, and with STAGES=train
# training's, in as many again:
#
#     [OUT=FOLDER] [PYTHON=PROGRAM] [WHEELS=FOLDER] [STAGES=...] benchmarks/gpu.sh [--device cpu --small]
#
# PYTHON is .venv's by default, or python3 where there is none.
#
# Stages come in the order of their worth. Each has its time limit and leaves OUT/STAGE.json (gpu.py, gpu_figures.py,
# gpu_operations.py, gpu_costs.py and gpu_training.py name them), which says `"finished": false` where it was stopped;
# then the next begins. Returns 2 where nothing can be measured, else 1 if a stage did not finish.
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
STAGES=${STAGES:-environment:25 checkpoint:50 proof:60 one_answer:70 figures-gpt-oss-20b:75 figures-m2:55 kernels:85}
[ "$STAGES" = more ] && STAGES="figures-qwen3-30b:120 host-qwen3-30b:70 graphs:80 peers-m2:60 tests:60"
[ "$STAGES" = operations ] && STAGES="environment:25 operations:190 costs:160 tiles:45"
[ "$STAGES" = train ] && STAGES="environment:25 training:150 grouped:60 claim-2:180"

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
    figures-* | host-* | peers-*) program=gpu_figures.py ;;
    operations) program=gpu_operations.py ;;
    costs) program=gpu_costs.py ;;
    training | grouped | claim-*) program=gpu_training.py ;;
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
