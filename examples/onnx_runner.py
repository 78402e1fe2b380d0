"""Objects in pictures by an exported ONNX file: `python onnx_runner.py best.onnx a.jpg [b.jpg ...]`.

Needs numpy, opencv-python and onnxruntime only: copy the file. Takes every layout of export.py's;
prints `path class score x1 y1 x2 y2` in pixels of the picture.
"""

import ast
import sys

import cv2
import numpy as np
import onnxruntime


def load(path):
    """The network and what it says of itself."""
    network = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = network.get_modelmeta().custom_metadata_map
    return network, {
        **about,
        "names": ast.literal_eval(about["names"]),
        "size": tuple(ast.literal_eval(about["imgsz"])),
        "batch": 1 if about["dynamic"] else int(about["batch"]),
        "white": float(about.get("white", 65535)),
    }


def read(path, white):
    """A picture as BGR bytes; of one that is deeper, `white` becomes 255."""
    image = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        sys.exit(f"{path}: cannot be read as a picture")
    scale = 1 if image.dtype == np.uint8 else 255 / white
    return np.rint((image * scale).clip(0, 255)).astype(np.uint8)


def prepare(image, size):
    """BGR picture -> (1, 3, H, W) in [0, 1], centred on grey; scales and offsets to go back."""
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    new = [min(max(round(side * scale), 1), most) for side, most in zip((height, width), size)]
    method = cv2.INTER_AREA if new[0] < height else cv2.INTER_LINEAR
    image = cv2.resize(image, (new[1], new[0]), interpolation=method)
    top, left = (size[0] - new[0]) // 2, (size[1] - new[1]) // 2
    ground = np.full((*size, 3), 114, np.uint8)
    ground[top : top + new[0], left : left + new[1]] = image
    pixels = ground[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 255
    return pixels, np.array([new[1] / width, new[0] / height] * 2), np.array([left, top] * 2)


def corners(boxes):
    """Centre and size -> corners."""
    centre, half = boxes[:, :2], boxes[:, 2:4] / 2
    return np.concatenate((centre - half, centre + half), 1)


def decode(output, layout, size):
    """One image's output -> boxes (A, 4) in pixels of the network's image, class scores (A, C)."""
    if layout == "anchors":
        return corners(output), output[:, 5:] * output[:, 4:5]
    if layout == "channels":
        return corners(output.T), output.T[:, 4:]
    if layout == "queries":
        return corners(output) * np.array([size[1], size[0]] * 2, np.float32), output[:, 4:]
    raise SystemExit(f"layout {layout!r} cannot be decoded here")


def suppress(boxes, scores, labels, iou_thres):
    """Indices that NMS keeps, best first; boxes suppress others of their class."""
    sides = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1)
    kept = cv2.dnn.NMSBoxesBatched(sides.tolist(), scores.tolist(), labels.tolist(), 0.0, iou_thres)
    return np.array(kept, int)


def detect(network, about, image, conf_thres=0.25, iou_thres=0.45, max_det=1000):
    """Boxes (K, 4) in pixels of `image`, scores (K,), class indices (K,)."""
    pixels, scale, offset = prepare(image, about["size"])
    images = {network.get_inputs()[0].name: np.repeat(pixels, about["batch"], 0)}
    output = network.run(None, images)[0][0]
    if about["layout"] == "end2end":
        output = output[output[:, 4] > conf_thres][:max_det]
        boxes, scores, labels = output[:, :4], output[:, 4], output[:, 5].astype(int)
    else:
        boxes, scores = decode(output, about["layout"], about["size"])
        likely = scores.max(1) > conf_thres
        boxes, labels, scores = boxes[likely], scores[likely].argmax(1), scores[likely].max(1)
        kept = suppress(boxes, scores, labels, iou_thres if about["postprocess"] == "nms" else 2)
        boxes, scores, labels = (values[kept[:max_det]] for values in (boxes, scores, labels))
    return ((boxes - offset) / scale).clip(0, image.shape[1::-1] * 2), scores, labels


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python onnx_runner.py best.onnx a.jpg [b.jpg ...]")
    network, about = load(sys.argv[1])
    for path in sys.argv[2:]:
        image = read(path, about["white"])
        for box, score, label in zip(*detect(network, about, image)):
            print(path, about["names"][label], f"{score:.4f}", *(f"{value:.2f}" for value in box))
