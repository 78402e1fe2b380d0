#!/usr/bin/env bash
# The main job on the built-in data: train, validate, detect, export, and detect with the exported file.
set -euo pipefail
PY=${PY:-python}
RUN=runs/demo
rm -rf "$RUN"
step() { printf '\n== %s\n' "$*"; "$@"; }

step "$PY" train.py --cfg yolo11n.yaml --data data/shapes.yaml --imgsz 160 --epochs 36 --batch-size 16 --cache --workers 2 --project "$RUN" --name train
BEST=$RUN/train/weights/best.pt
step "$PY" export.py --weights "$BEST" --imgsz 160 --include onnx
step "$PY" val.py --weights "$BEST" "${BEST%.pt}.onnx" --data data/shapes.yaml --task test --imgsz 160 --project "$RUN" --name val
step "$PY" detect.py --weights "${BEST%.pt}.onnx" --source datasets/shapes/images/test --imgsz 160 --project "$RUN" --name detect
"$PY" - "$RUN" <<'PY'
import csv, pathlib, sys
run = pathlib.Path(sys.argv[1])
rows = list(csv.DictReader((run / "train" / "results.csv").open()))
best = max((row for row in rows if row["metrics/mAP_0.5"]), key=lambda row: float(row["metrics/mAP_0.5:0.95"]))
pictures = [run / "train" / "val_batch0_pred.jpg", run / "train" / "results.png", run / "detect"]
print("\nLook at:")
for picture in pictures:
    print(f"  {picture}")
print(f"on the validation images: mAP50 {float(best['metrics/mAP_0.5']):.3f}, mAP50-95 {float(best['metrics/mAP_0.5:0.95']):.3f}")
PY
