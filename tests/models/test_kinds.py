"""What kind of network a backbone is seen to be."""

from __future__ import annotations

import pytest
import torch

from models.kinds import backbone_kind
from models.yolo import build_model


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [
        (None, None),
        ("resnet10t", "plain"),
        ("mobilenetv3_small_050", "depthwise"),
        ("convnext_atto", "depthwise"),
        ("MobileNetV4ConvSmall", "depthwise"),
        ("MobileNetV4HybridMedium", "attention"),
        ("mobilevit_xxs", "attention"),
        ("vit_tiny_patch16_224", "attention"),
        ("levit_128s", "attention"),
        ("EMO_1M", "attention"),
        ("mobileone_s0", "reparameterized"),
        ("repvgg_a0", "reparameterized"),
        ("revcol_tiny", "reversible"),
    ],
)
def test_a_backbone_is_of_the_kind_that_its_layers_are(backbone: str | None, kind: str | None):
    with torch.device("meta"):
        model = build_model("yolo11n", backbone=[backbone] if backbone else None, imgsz=(224, 224))
    assert backbone_kind(model) == kind


def test_blocks_of_a_yaml_may_say_their_kind():
    with torch.device("meta"):
        model = build_model("yolov9-c-mobileone", imgsz=(64, 64))
    assert backbone_kind(model) == "reparameterized"
