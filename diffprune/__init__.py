"""Learn which channels a trained network needs, cut the others out exactly, measure the speed-up."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Budget": "diffprune.budget",
    "GATES": "diffprune.gates",
    "GatedModel": "diffprune.gated",
    "HardConcrete": "diffprune.gates",
    "MeanCentred": "diffprune.gates",
    "Recipe": "diffprune.training",
    "Result": "diffprune.pipeline",
    "attach": "diffprune.gated",
    "branches": "diffprune.bundles",
    "compress": "diffprune.pipeline",
    "criterion_scores": "diffprune.criteria",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `diffprune --help` need not wait for torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'diffprune' has no attribute {name!r}")
