#!/usr/bin/env bash
# Train, evaluate and draw the digits recipe: demo.sh [WORK_DIR [OPTION OF train.py]...]
#
# The last three lines of the output are for scripts: the top-1 accuracy on the held-out digits, as
# test.py measures it, and the paths of two pictures. WORK_DIR defaults to work_dirs/demo in the
# project. Environment variable PYTHON: the interpreter with the classification stack.
set -euo pipefail

if [[ ${1:-} == -* || $# -gt 1 && $2 != -* ]]; then
    echo "demo.sh: error: usage: demo.sh [WORK_DIR [OPTION OF train.py]...]" >&2
    exit 2
fi
TOOLS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname -- "$TOOLS")
PYTHON=${PYTHON:-python}
WORK_DIR=${1:-$ROOT/work_dirs/demo}
CONFIG=$ROOT/configs/classification/ddf-mul-resnet26_digits.py
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

echo "== Training on 1,437 scanned digits"
"$PYTHON" "$TOOLS/train.py" "$CONFIG" --work-dir "$WORK_DIR" "${@:2}"
CHECKPOINT=$(cat -- "$WORK_DIR/last_checkpoint")

echo "== Evaluating $CHECKPOINT on 360 held-out digits"
METRICS=$WORK_DIR/metrics.json
"$PYTHON" "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --work-dir "$WORK_DIR" \
    --out "$METRICS" --out-item metrics

echo "== Drawing"
CURVE=$WORK_DIR/curve.png
FILTERS=$WORK_DIR/filters.png
"$PYTHON" "$TOOLS/analysis/plot_curves.py" "$WORK_DIR" --out "$CURVE" \
    --metrics accuracy/top1 --title "DDF-ResNet-26 on digits" > /dev/null
"$PYTHON" "$TOOLS/analysis/visualize_filters.py" "$CONFIG" "$CHECKPOINT" dataset:3 \
    --out "$FILTERS" > /dev/null

"$PYTHON" - "$METRICS" << 'END'
import json
import sys

with open(sys.argv[1]) as file:
    print(f"accuracy/top1: {json.load(file)['accuracy/top1']:.2f}")
END
echo "curve: $CURVE"
echo "filters: $FILTERS"
