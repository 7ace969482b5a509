"""What a run works on, tried before any work: data, network, whether they fit, whether the budget can be met."""

import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import export
import surgery
from diffprune.budget import Budget
from diffprune.config import Config
from diffprune.data import Data, load_data
from diffprune.errors import BadConfig, BadData
from diffprune.feeding import answered
from diffprune.gated import require_groups
from diffprune.landing import require_reachable
from diffprune.models import load_model
from diffprune.pruned import normalised
from diffprune.stopwatch import stopwatch
from diffprune.target import require_device, target
from diffprune.training import Event
from export import Settings

UNTRAINED = 0.1
"""Above guessing by less than this share of the way to 1, a parent looks untrained."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """`model` on the device and `example`, two validation images there, which it answers with (2, `logits`)."""

    data: Data
    model: nn.Module
    example: Tensor
    logits: int

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The name of each logit, if the data has them all."""
        return self.data.labels if len(self.data.labels) == self.logits else None


def prepare(config: Config) -> Prepared:
    """Load data and network and run the one on the other. Raises BadData, BadModel, BadWeights, BadConfig."""
    data = load_data(config.data, image_size=config.image_size, batch=config.batch, seed=config.seed)
    if config.preprocessing:
        _require_known_pixels(data, config)
    model = load_model(config.model, weights=config.weights, num_classes=len(data.labels) or None).to(config.device)
    example = next(iter(data.val))[0][:2].to(config.device)
    logits = answer(
        model,
        example,
        at=f"{config.model} on {config.data}",
        effect="nothing was started",
        fix="set image_size, or give data with the channels and size that the network was built for",
    )
    classes = len(data.labels)
    if classes == 1:
        raise BadData(
            f"all images are of one class, {data.labels[0]!r}",
            at=config.data,
            effect="nothing was started: every network is right about all of them",
            fix="give a folder for each class; the path may be one level too high or too deep",
        )
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < classes:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise BadConfig(
            f"the network answers {len(example)} images with {found}; one logit per label is asked: "
            f"{(len(example), classes)}",
            at=f"{config.model} on {config.data}",
            effect="nothing was started",
            fix="give a network that returns logits for these labels",
        )
    return Prepared(data, model, example, logits.shape[1])


def _require_known_pixels(data: Data, config: Config) -> None:
    if not normalised(data.mean, data.std):
        raise BadConfig(
            "the data does not say how its pixels were normalised, so an ONNX file cannot do it",
            at=f"preprocessing with {config.data}",
            effect="nothing was started",
            fix="give uint8 images or a diffprune.data.Data with mean and std, or leave preprocessing out",
        )


def answer(model: nn.Module, images: Tensor, *, at: str, effect: str, fix: str) -> object:
    """What the network says in eval mode; it comes back in the mode it had. Raises BadData."""
    with torch.no_grad(), surgery.evaluating(model):
        return answered(model, images, at=at, effect=effect, fix=fix)


def require_devices(config: Config) -> None:
    """Raises DeviceMissing."""
    for name in ("device", "latency_device"):
        require_device(getattr(config, name), name)


def target_of(config: Config) -> Settings:
    """Raises BadConfig."""
    return target(
        config.latency_device, threads=config.threads, batch=config.latency_batch, precision=config.latency_precision
    )


def require_possible(prepared: Prepared, budget: Budget, config: Config, tell: Event) -> None:
    """Refuse before the dense parent is trained what would be refused after: its weights change no latency.

    Raises NothingToCut, BudgetUnreachable.
    """
    graph, step = surgery.trace(prepared.model, prepared.example), int(config.round_to)
    require_groups(graph)
    size = surgery.SizeModel(graph)
    if budget.kind != "speedup":
        return require_reachable(budget, size, step)
    with TemporaryDirectory() as folder:
        place, model, example = Path(folder), alive(prepared.model), prepared.example
        watch = stopwatch(model, graph, example, place, step=step, settings=target_of(config), tell=tell)
        watch.require_reachable(budget, step)


def require_exportable(prepared: Prepared) -> None:
    """Refuse before any training a network that ONNX cannot take. Raises export.NotExportable."""
    with TemporaryDirectory() as folder:
        export.for_timing(alive(prepared.model), prepared.example, Path(folder) / "dense.onnx")


def alive(model: nn.Module) -> nn.Module:
    """A copy without parameters of zeros alone, with which some residual branches start and no ONNX file has them."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if not parameter.any():
                parameter.fill_(1)
    return copied


def looks_untrained(accuracy: float, classes: int) -> str | None:
    """A warning for a dense network that is hardly better than guessing."""
    guessing = 1 / classes
    if accuracy >= guessing + UNTRAINED * (1 - guessing):
        return None
    return (
        f"the dense network is right on {100 * accuracy:.1f} % of the held-out examples, guessing on "
        f"{100 * guessing:.1f} %: give weights that were trained on these labels, or (more) parent_epochs"
    )
