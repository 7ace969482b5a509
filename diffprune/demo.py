"""The demo's settings."""

from diffprune.config import Config, config_from


def demo_config(output: str) -> Config:
    """ResNet-18 on 8x8 digits shown at 16x16: a parent of a few epochs, then a third of its MACs."""
    return config_from(
        {
            "model": "digits:resnet18",
            "data": "digits",
            "macs": 0.35,
            "parent_epochs": 4,
            "parent_lr": 0.05,
            "epochs": 4.0,
            "batch": 64,
            "output": output,
        }
    )
