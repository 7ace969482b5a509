"""After a cut: the layers of the small network fitted to what they gave in the dense one, by least squares."""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.errors import BadData
from diffprune.readings import fixed_rows, linear_layers, listening, read_by, rows_given, rows_read
from diffprune.recover import tracking_norms
from diffprune.sums import Operators, Summand, Watch, same_operators
from surgery import ChannelGraph, evaluating
from surgery.twins import twinned

RIDGE = 0.01
"""Pull towards the old weights, as a share of the mean variance of what a layer reads."""

FAINT = 0.01
"""A channel that BatchNorm scales by less than this share of the largest scale cannot make up for errors of a sum."""

SANE = 10.0
"""Weights that a fit makes longer or shorter by more than this factor gave nothing before, or give nothing now."""


def compensate_(
    small: nn.Module, parent: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor], x: Tensor
) -> None:
    """Fit the weights of a cut network, layer by layer in the order of its forward, without labels or gradients.

        W = W0 + (Y - A W0^T)^T A (A^T A + l I)^-1     l = RIDGE * mean of the diagonal of A^T A

    A, shape (places, inputs), is what a layer of the cut network reads at sampled places of the images `x`, of shape
    (N, ...), Y, shape (places, outputs), what the same layer gives in `parent` there. Both are centred where a bias
    that may change or the BatchNorm behind the layer takes the mean. All happens
    in one forward of each network: when a layer of the cut one runs, those before it are fitted already, and its
    BatchNorm statistics are those of `x`. Plain linear layers and convolutions of one group are fitted; others, frozen
    ones, those that mix tokens, and weights that several modules share stay.

    A layer whose output is added to something, as in a residual stream, is fitted to what that sum should become:
    Y takes in how far the stream already is from that of `parent`. What a layer gives is fainter than Y by what it
    cannot explain; a BatchNorm after it would blow both up, so its scale is corrected by the change of deviation.
    A weight that only a BatchNorm follows is then brought back to the length that it had, which changes nothing but how
    fast it learns: of rate / |W|^2, and fitted ones are twice as long.

    Raises BadData for values that are not finite.

    Source: optimal brain surgeon in closed form for layers (Dong, Chen, Pan 2017, arXiv 1705.07565; structured in
    ZipLM, Kurtic et al. 2023, arXiv 2302.04089). The correction of sums and scales is ours (docs/method.md). How weight
    length sets the rate under normalisation: van Laarhoven 2017, arXiv 1706.05350.
    """
    owners = Counter(id(p) for module in small.modules() for p in module._parameters.values())
    layers = linear_layers(small, fixed_rows(graph))
    layers = {
        name: layer for name, layer in layers.items() if layer.weight.requires_grad and owners[id(layer.weight)] == 1
    }
    alive = graph.checked(keep)[1]
    with torch.no_grad(), evaluating(parent, small), twinned(parent), twinned(small):  # the same operators in both
        dense = _Dense(parent, linear_layers(parent, layers), alive, x)
        sums = dense.sums if same_operators(parent, small, x[:1]) else {}
        _Fit(small, layers, dense, sums).run(x)


class _Dense:
    """What the layers of the dense network give at sampled places, what that is added to, and their BatchNorms."""

    def __init__(
        self, parent: nn.Module, layers: Mapping[str, nn.Module], alive: Mapping[tuple[str, int], Tensor], x: Tensor
    ) -> None:
        self.given: dict[str, list[Tensor]] = {}
        self.sums: dict[str, tuple[int, Tensor]] = {}
        self.layers, self.alive = layers, alive
        self.watch = Watch(layers, self._entered)
        with self.watch.inside(parent), listening(layers, self._ran):
            parent(x)

    def _rows(self, name: str, value: Tensor) -> Tensor:
        rows = rows_given(name, self.layers[name], value)
        kept = self.alive.get((name, 0))
        return rows if kept is None else rows[:, kept.to(rows.device)]

    def _ran(self, name: str, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        with self.watch.operators.pause():
            self.given.setdefault(name, []).append(self._rows(name, outputs))

    def _entered(self, summand: Summand) -> None:
        if summand.operator is not None:
            self.sums[summand.layer] = summand.operator, self._rows(summand.layer, summand.other)


class _Fit:
    """The forward of the cut network in which its layers are fitted."""

    def __init__(
        self, small: nn.Module, layers: Mapping[str, nn.Module], dense: _Dense, sums: Mapping[str, tuple[int, Tensor]]
    ) -> None:
        self.small, self.layers, self.given, self.sums = small, layers, dense.given, sums
        self.normed, self.tracking = dense.watch.normed, tracking_norms(small)
        self.norms = {name: small.get_submodule(norm) for name, norm in dense.watch.norm_of.items()}
        self.shift: dict[nn.Module, Tensor] = {}  # mean errors of sums, which a BatchNorm's bias has to take
        self.longer: dict[nn.Module, Tensor] = {}  # what a BatchNorm reads was divided by this
        self.waiting = Counter(operator for operator, _ in sums.values())
        self.held: dict[int, Tensor] = {}
        self.operators = Operators(self._hold)

    def run(self, x: Tensor) -> None:
        with ExitStack() as hooks, self.operators:
            for name, layer in self.layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(partial(self._fit, name), with_kwargs=True))
            for norm in self.tracking:
                hooks.enter_context(norm.register_forward_pre_hook(self._restate, with_kwargs=True))
            self.small(x)

    def _hold(self, count: int, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if count in self.waiting:
            self.held[count] = result

    def _fit(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self.given.get(name, ())) != 1:  # a layer that runs twice has two targets
            return
        with self.operators.pause():
            read, given = rows_read(name, layer, read_by(args, kwargs)), self.given.pop(name)[0]
            old = layer.weight.clone()  # type: ignore[operator]
            if name in self.sums:
                given = given + self._missing(name, layer)
            if not (read.float().square().sum() + given.float().square().sum()).isfinite():
                raise BadData(
                    "the images give values that are not finite, or too large to be squared",
                    at=f"fitting {name.removesuffix('.weight')} after the cut",
                    effect="the run was stopped",
                    fix="look for such values in the data and in the weights",
                )
            _fit_(layer, read, given, normed=name in self.norms)
            if self.norms.get(name) in self.tracking:
                self.longer[self.norms[name]] = _as_long_as_(layer, old)

    def _missing(self, name: str, layer: nn.Module) -> Tensor:
        """What the output of the layer has to make up for in the sum that it enters, at the places of its rows."""
        operator, wanted = self.sums[name]
        error = wanted - rows_given(name, layer, self.held[operator])
        self.waiting[operator] -= 1
        if not self.waiting[operator]:
            del self.held[operator]
        if name not in self.normed:
            return error
        if name not in self.norms:
            return torch.zeros_like(error)
        norm: Any = self.norms[name]
        if not _scalable(norm):
            return torch.zeros_like(error)
        self.shift[norm] = error.mean(0)
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        return torch.where(slope.abs() > FAINT * slope.abs().max(), error / slope, 0.0)

    def _restate(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The statistics of `norm` are those of its input; behind a fitted layer it maps as it did in the parent."""
        with self.operators.pause():
            rows = read_by(args, kwargs).transpose(0, 1).flatten(1).float()
            variance = rows.var(1)
            if norm in self.norms.values() and _scalable(norm):
                longer = self.longer.pop(norm, torch.ones_like(variance))
                norm.weight.mul_(longer * ((variance + norm.eps) / (norm.running_var + norm.eps)).sqrt())
                norm.bias.add_(self.shift.pop(norm, torch.zeros_like(norm.bias)))
            norm.running_mean.copy_(rows.mean(1))
            norm.running_var.copy_(variance)


def _scalable(norm: Any) -> bool:
    known = norm.running_var is not None
    return bool(known and norm.affine and norm.weight.requires_grad and norm.bias.requires_grad)


def _fit_(layer: nn.Module, read: Tensor, wanted: Tensor, *, normed: bool) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    old = weight.flatten(1).double()
    read, wanted = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (read, wanted))
    if bias is not None and not bias.requires_grad:
        wanted, bias = wanted - bias, None
    mean, target = read.mean(0), wanted.mean(0)
    if bias is not None or normed:
        read, wanted = read - mean, wanted - target
    missing = wanted - read @ old.to(read).T
    ridge = RIDGE * read.square().mean(0).mean().clamp_min(1e-12).double() * len(read)
    # Products in float32 are enough with a ridge; the system is solved in double, for it may be near singular.
    if len(read) > read.shape[1]:
        step = _solved((read.T @ read).double(), ridge, (read.T @ missing).double())
    else:  # the same by the smaller matrix
        step = read.T.double() @ _solved((read @ read.T).double(), ridge, missing.double())
    new = old + step.T
    weight.copy_(new.view_as(weight))
    if bias is not None:
        bias.copy_(target - new @ mean.double())


def _as_long_as_(layer: Any, old: Tensor) -> Tensor:
    """Divide each output of `layer` so that its weights are as long as the `old` ones; by what, shape (outputs,)."""
    longer = layer.weight.flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)
    frozen = layer.bias is not None and not layer.bias.requires_grad
    longer = torch.where((longer > 1 / SANE) & (longer < SANE) & (not frozen), longer, 1.0)
    layer.weight.div_(longer.view(-1, *[1] * (old.dim() - 1)))
    if layer.bias is not None:
        layer.bias.div_(longer)
    return longer


def _solved(gram: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """(gram + ridge * I)^-1 right, for a positive gram, which is overwritten."""
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
