#!/usr/bin/env bash
# Make the digit scenes, train a recipe on them, test it and draw its predictions:
# demo_scenes.sh detection|segmentation [WORK_DIR]
#
# The last lines of the output are for scripts: the metrics, as test.py measures them, and the path
# of a picture. The scenes are generated in data/digit_scenes of the project, or in $DIGIT_SCENES,
# unless this folder exists. WORK_DIR defaults to work_dirs/demo_<task>. Environment variable
# PYTHON: the interpreter with the detection stack.
set -euo pipefail

usage() {
    echo "demo_scenes.sh: error: usage: demo_scenes.sh detection|segmentation [WORK_DIR]" >&2
    exit 2
}
TOOLS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname -- "$TOOLS")
case "$#:${1:-}" in
    [12]:detection)
        CONFIG=$ROOT/configs/detection/mask-rcnn_ddf-mul-r26_ddfup-fpn_digit-scenes.py
        METRICS="coco/bbox_mAP_50 coco/segm_mAP_50"
        ;;
    [12]:segmentation)
        CONFIG=$ROOT/configs/segmentation/fpn_ddf-mul-r26_ddfup-fpn_digit-scenes.py
        METRICS="mIoU"
        ;;
    *) usage ;;
esac
PYTHON=${PYTHON:-python}
WORK_DIR=${2:-$ROOT/work_dirs/demo_$1}
export DIGIT_SCENES=${DIGIT_SCENES:-$ROOT/data/digit_scenes}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

if [[ ! -d $DIGIT_SCENES ]]; then
    echo "== Making the scenes in $DIGIT_SCENES"
    "$PYTHON" "$TOOLS/make_digit_scenes.py" "$DIGIT_SCENES"
fi

echo "== Training"
"$PYTHON" "$TOOLS/train.py" "$CONFIG" --work-dir "$WORK_DIR"
CHECKPOINT=$(cat -- "$WORK_DIR/last_checkpoint")

echo "== Testing $CHECKPOINT"
"$PYTHON" "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --work-dir "$WORK_DIR" \
    --out "$WORK_DIR/metrics.json" --out-item metrics

echo "== Drawing"
PREDICTIONS=$WORK_DIR/predictions.png
"$PYTHON" "$TOOLS/analysis/draw_predictions.py" "$CONFIG" "$CHECKPOINT" \
    --out "$PREDICTIONS" > /dev/null

# shellcheck disable=SC2086  # the names of the metrics have no spaces
"$PYTHON" - "$WORK_DIR/metrics.json" $METRICS << 'END'
import json
import sys

with open(sys.argv[1]) as file:
    measured = json.load(file)
for name in sys.argv[2:]:
    print(f"{name}: {measured[name]}")
END
echo "predictions: $PREDICTIONS"
