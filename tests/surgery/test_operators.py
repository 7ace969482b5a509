"""Every row of the table against a numeric probe: move one input channel, see which outputs move.

An element of the output must carry the name of every input channel that moves it (up to ties); a rule may tie or pin
more than that, never less.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import randomised

from surgery.names import NEUTRAL, Names
from surgery.observe import observe
from surgery.operators import RULES

Forward = Callable[..., Tensor]
CHANNELS = 8

UNARY: dict[str, Forward] = {
    **{
        function.__name__: function for function in (
            torch.abs, torch.ceil, torch.cos, torch.erf, torch.exp, torch.floor, torch.neg, torch.reciprocal,
            torch.round, torch.rsqrt, torch.sigmoid, torch.sign, torch.sin, torch.sqrt, torch.square, torch.tanh,
            torch.log1p, F.celu, F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid,
            F.mish, F.relu, F.relu6, F.selu, F.silu, F.softplus, F.softsign, F.alpha_dropout, F.feature_alpha_dropout,
        )
    },
    "dropout": lambda x: F.dropout(x, training=False) * 1,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clone": lambda x: x.clone().contiguous(),
    "compare": lambda x: x * (x > 0.2) + x * (x <= 0.1),
    "cumsum over space": lambda x: x.cumsum(3),
    "detach": lambda x: x.detach() * 1,
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.5),
    "pow": lambda x: x**2 + 2**x,
    "rsub": lambda x: 1 - x,
    "softmax over space": lambda x: x.flatten(2).softmax(2),
    "to": lambda x: x.to(torch.float32).type_as(x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "flatten": lambda x: x.flatten(1),
    "view of shape": lambda x: x.view(x.shape[0], x.shape[1], -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 3),
    "movedim": lambda x: x.movedim(1, -1),
    "squeeze": lambda x: x[:, :, :1].squeeze(2).unsqueeze(-1),
    "flip": lambda x: x.flip(1),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 5),
    "roll over space": lambda x: x.roll(1, 3),
    "slice of space": lambda x: x[:, :, 1:3, ::2],
    "select of space": lambda x: x[:, :, 0] + x.select(3, 1),
    "unbind over space": lambda x: sum(x.unbind(2)),  # type: ignore[arg-type, return-value]
    "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    "chunk of space": lambda x: x.chunk(2, 2)[0] - x.chunk(2, 2)[1],
    "split of space": lambda x: x.split([1, 3], 2)[1],
    "glu": lambda x: F.glu(x, 1),
    "tile": lambda x: x.tile(1, 3, 1, 1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "cat": lambda x: torch.cat([x, x * 2, x.flip(1)], 1),
    "cat over space": lambda x: torch.cat([x, x * 2], 3),
    "stack": lambda x: torch.stack([x, x * 2]).sum(0),
    "stack behind": lambda x: torch.stack([x, x * 2], 2).flatten(1, 2),
    "pad space": lambda x: F.pad(x, (1, 2, 0, 1)),
    "add": lambda x: x + x.roll(1, 2),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "maximum": lambda x: torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "reflected add": lambda x: x + x.flip(1),
    "squeeze and excite": lambda x: x * x.mean((2, 3), keepdim=True),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 2),
    "max_pool3d": lambda x: F.max_pool3d(x[:, :, None], (1, 2, 2)),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(5, 7), mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, size=(5, 7), mode="bicubic", antialias=False),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 2),
    "max_pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "max over space": lambda x: x.max(3).values + x.min(3, keepdim=True).values[..., 0],
    "max of two": lambda x: torch.max(x, 2 * x) - torch.min(x, x * x),
    "unflatten space": lambda x: x.unflatten(3, (2, 2)),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "amax": lambda x: x.amax((2, 3)),
    "var": lambda x: x.var((2, 3)),
    "logsumexp": lambda x: x.logsumexp(3),
    "normalize over space": lambda x: F.normalize(x, dim=2),
    "layer_norm over space": lambda x: F.layer_norm(x, (4, 4)),
    "instance_norm": lambda x: F.instance_norm(x),
    "einsum that permutes": lambda x: torch.einsum("nchw->nhwc", x),
    "einsum with dots": lambda x: torch.einsum("n...w,...w->n...", x, x),
    "einsum per head with dots": lambda x: torch.einsum("...cs,...ct->...st", *[x.flatten(2).unflatten(1, (4, 2))] * 2),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "unfold": lambda x: F.unfold(x, 2),
    "fold": lambda x: F.fold(x.flatten(2)[..., :1], 2, 2),
    "softmax of split channels": lambda x: x.unflatten(1, (4, 2)).softmax(2),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.flatten(2).unflatten(1, (4, 2)).mT] * 3),
    "matmul per head": lambda x: x.flatten(2).unflatten(1, (4, 2)).mT @ x.flatten(2).unflatten(1, (4, 2)),
    "einsum per head": lambda x: torch.einsum("nhcs,nhct->nhst", *[x.flatten(2).unflatten(1, (4, 2))] * 2),
    "matmul over space": lambda x: x @ torch.linspace(0, 1, 12, dtype=x.dtype).view(4, 3),
    "grid_sample": lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2, dtype=x.dtype) + 0.3, align_corners=False),
    "topmost": lambda x: x.argmax(3) * 1.0 + x.cummax(2).values[..., 0],
}
DOUBTED: dict[str, Forward] = {
    "slice": lambda x: x[:, 2:],
    "select": lambda x: x[:, 3],
    "split": lambda x: x.split([3, 5], 1)[0],
    "index": lambda x: x[:, [1, 0]],
    "unflatten": lambda x: x.unflatten(1, (2, 4)),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "constant factor": lambda x: x * torch.linspace(1, 2, CHANNELS, dtype=x.dtype).view(-1, 1, 1),
    "view": lambda x: x.view(-1, 8, 16),
    "number": lambda x: x * 0.3,
}
PINNED: dict[str, Forward] = {
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "mean over channels": lambda x: x.mean(1),
    "sum of all": lambda x: x.sum() + x[:, :, 0, 0],
    "normalize": lambda x: F.normalize(x, dim=1),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (CHANNELS,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "sort": lambda x: x.sort(1).values,
    "roll": lambda x: x.roll(1, 1),
    "matmul": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
    "max over channels": lambda x: x.max(1).values,
    "max of all": lambda x: x - x.max(),
    "argmax": lambda x: x.argmax(1) * 1.0,
    "cosine": lambda x: F.cosine_similarity(x, x + 1, dim=1),
    "local response norm": lambda x: F.local_response_norm(x, 3),
    "max_pool over channels": lambda x: F.max_pool2d(x.transpose(1, 3), 2),
    "lstm-like scan": lambda x: torch.cummax(x, 1).values,
}


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=1),
    "grouped": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS),
    "depthwise with multiplier": lambda: nn.Conv2d(CHANNELS, 3 * CHANNELS, 1, groups=CHANNELS),
    "conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(CHANNELS, 6, 3)),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(3, (2, 2)), nn.Conv3d(CHANNELS, 6, 1)),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 6, 2, stride=2),
    "transposed depthwise": lambda: nn.ConvTranspose2d(CHANNELS, 2 * CHANNELS, 2, groups=CHANNELS),
    "linear": lambda: nn.Sequential(Probe(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(CHANNELS, 6)),
    "linear on flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16 * CHANNELS, 6)),
    "batch_norm": lambda: nn.BatchNorm2d(CHANNELS),
    "instance_norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "prelu": lambda: nn.PReLU(CHANNELS),
}


class Probe(nn.Module):
    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Written(nn.Module):
    """`probe` behind a layer that writes the channels, so that they have names."""

    def __init__(self, probe: nn.Module) -> None:
        super().__init__()
        self.stem, self.probe = nn.Conv2d(3, CHANNELS, 1), probe

    def forward(self, x: Tensor) -> Tensor:
        return self.probe(self.stem(x))


@dataclass(frozen=True)
class Said:
    """What the rules say of a probe: classes of the stem's channels and of each output, and which are pinned."""

    stem: Tensor
    output: Tensor
    pinned: dict[int, str]
    axes: dict[tuple[str, int], tuple[str, Tensor]]
    doubts: list[str]


def said(probe: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Said:
    output: list[Tensor] = []
    pin = Names.pin

    def without_outputs(self: Names, names: Tensor, reason: str) -> None:
        if reason == "model output":
            output.append(names)
        else:
            pin(self, names, reason)

    model = Written(probe).double().eval()
    with monkeypatch.context() as patch:
        patch.setattr(Names, "pin", without_outputs)
        seen = observe(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    label = seen.names.classes()

    def classes(names: Tensor) -> Tensor:
        return torch.where(names == NEUTRAL, NEUTRAL, label[names.clamp_min(0)])

    axes = {key: (axis.role, classes(axis.names)) for key, axis in seen.axes.items()}
    doubts = [doubt.text for doubt in seen.doubts]
    return Said(axes["stem.weight", 0][1], classes(output[0]), seen.names.reasons(label), axes, doubts)


def moves(compute: Callable[[], Tensor], reference: Tensor) -> Tensor:
    return ~torch.isclose(compute(), reference, rtol=1e-12, atol=0, equal_nan=True)


def example(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, CHANNELS, 4, 4, generator=generator, dtype=torch.float64) * 6 - 3


def moved_by_channel(probe: nn.Module) -> Tensor:
    """Which outputs move with which input channel: booleans of shape (CHANNELS, *output)."""
    base = example().abs() + 0.1
    reference = probe(base)
    found = torch.zeros(CHANNELS, *reference.shape, dtype=torch.bool)
    for channel in range(CHANNELS):
        for seed in range(1, 7):
            x = base.clone()
            x[:, channel] = example(seed)[:, channel]
            found[channel] |= moves(lambda x=x: probe(x), reference)  # type: ignore[misc]
    return found


def unexplained(found: Tensor, said: Said) -> int:
    """Outputs that move with a channel whose name they do not carry, though it is not pinned."""
    return sum(
        int((found[channel] & (said.output != name)).sum())
        for channel, name in enumerate(said.stem.tolist()) if name not in said.pinned
    )


@pytest.mark.parametrize("function", UNARY.values(), ids=UNARY.keys())
def test_a_rule_follows_what_moves(function: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(function)
    found, names = moved_by_channel(probe), said(probe, monkeypatch)
    assert found.any()
    assert unexplained(found, names) == 0
    assert not set(names.stem.tolist()) & names.pinned.keys(), names.pinned
    assert len(names.stem.unique()) > 1, "all channels are tied"


@pytest.mark.parametrize("function", PINNED.values(), ids=PINNED.keys())
def test_what_mixes_or_counts_channels_is_pinned(function: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(function)
    names = said(probe, monkeypatch)
    assert set(names.stem.tolist()) <= names.pinned.keys()


@pytest.mark.parametrize("function", DOUBTED.values(), ids=DOUBTED.keys())
def test_what_may_not_follow_a_cut_is_followed_and_doubted(function: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(function)
    names = said(probe, monkeypatch)
    assert unexplained(moved_by_channel(probe), names) == 0
    assert not set(names.stem.tolist()) & names.pinned.keys(), names.pinned
    assert names.doubts


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_reads_and_writes_what_its_row_says(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = randomised(build()).double().eval()
    names, x = said(probe, monkeypatch), example()
    reference, tensors = probe(x).detach(), {**dict(probe.named_parameters()), **dict(probe.named_buffers())}
    rows = {(name[6:], axis): row for (name, axis), row in names.axes.items() if name.startswith("probe.")}
    assert {name for name, _ in rows} == {n for n, t in tensors.items() if t.is_floating_point()}
    assert not names.pinned.keys() & {*names.output.unique().tolist(), *names.stem.tolist()}
    assert set(names.stem.tolist()) <= {c for _, classes in rows.values() for c in classes.tolist()}
    for (name, axis), (role, classes) in rows.items():
        for value in classes.unique().tolist():
            changed = copy.deepcopy(probe)
            tensor = {**dict(changed.named_parameters()), **dict(changed.named_buffers())}[name]
            where = (classes == value).nonzero().squeeze(1)
            with torch.no_grad():
                part = tensor.index_select(axis, where)
                tensor.index_copy_(axis, where, 0 * part if role == "read" else 2 * part.abs() + 0.5)
            if role == "read":  # nothing is left of the channels that carry this name
                other = x.clone()
                other[:, names.stem == value] = example(1)[:, names.stem == value]
                assert not moves(lambda n=changed, o=other: n(o), changed(x)).any()  # type: ignore[misc]
                assert moves(lambda o=other: probe(o), reference).any()  # type: ignore[misc]
            else:  # what moves carries this name, and something does
                found = moves(lambda n=changed: n(x), reference)  # type: ignore[misc]
                assert found.any()
                assert (names.output[found] == value).all()


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "flip", lambda call, x, axes: x)
    probe = Probe(lambda x: x.flip(1))
    assert unexplained(moved_by_channel(probe), said(probe, monkeypatch)) > 0
