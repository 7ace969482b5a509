"""The demo's network: ResNet-18 for small grey images."""

from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18


def resnet18(num_classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 stride-1 stem and no max-pool: (N, 1, H, W) to (N, num_classes).

    The weights are fresh, drawn from torch's global generator.
    """
    model: nn.Module = torchvision_resnet18(num_classes=num_classes)
    stem = nn.Conv2d(1, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model
