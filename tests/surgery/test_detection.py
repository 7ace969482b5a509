"""Detectors: what is a tensor program in them is cut exactly; what decides by values is pinned, and says so."""

from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import random_keep
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.resnet import BasicBlock, ResNet

import surgery

SMALL = {"min_size": 96, "max_size": 128}


def pyramid() -> nn.Module:
    """Of a ResNet with one block a stage: what takes time is the number of layers."""
    body = ResNet(BasicBlock, [1, 1, 1, 1])
    stages = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    return BackboneWithFPN(body, stages, [64, 128, 256, 512], 256)


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "faster r-cnn": lambda: detection.FasterRCNN(
        pyramid(), box_head=TwoMLPHead(256 * 49, 64), box_predictor=FastRCNNPredictor(64, 5), **SMALL
    ),
    "retinanet": lambda: detection.RetinaNet(pyramid(), 5, **SMALL),
}
FREE = {"faster r-cnn": 11, "retinanet": 17}
"""How many groups each has at least."""


def features_and_heads(detector: nn.Module, image: Tensor) -> Iterator[Tensor]:
    """What the tensor programs of a detector compute: a pyramid of features, and the heads on all of it."""
    features = list(detector.backbone(image).values())
    yield from features
    if isinstance(detector, detection.FasterRCNN):
        scores, boxes = detector.rpn.head(features)
        yield from (*scores, *boxes)
        regions = torch.nn.functional.adaptive_avg_pool2d(features[0], 7)
        yield from detector.roi_heads.box_predictor(detector.roi_heads.box_head(regions))
    else:
        yield from detector.head(features).values()


@pytest.mark.parametrize("name", [pytest.param("faster r-cnn", marks=pytest.mark.soak), "retinanet"])
def test_backbone_and_heads_of_a_detector_are_cut_exactly(name: str) -> None:
    torch.manual_seed(0)
    detector = DETECTORS[name]().eval()
    image = torch.rand(3, 96, 128)
    graph = surgery.trace(detector, ([image],))
    assert len(graph.groups) >= FREE[name]
    reasons = {pin.reason for pin in graph.pinned} - {"model input", "model output"}
    assert all("decides by values" in reason for reason in reasons), reasons
    assert any("detection" in reason or "anchor" in reason or "rcnn" in reason for reason in reasons), reasons

    keep = random_keep(graph, 0)
    masked, small = surgery.mask(detector, graph, keep), surgery.cut(detector, graph, keep)
    with torch.no_grad():
        pairs = list(zip(*(features_and_heads(d, image[None]) for d in (masked, small)), strict=True))
        assert len(pairs) > 5
        for expected, found in pairs:
            assert expected.std() > 0
            assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
        assert set(small([image])[0]) == set(detector([image])[0])
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in detector.parameters())
