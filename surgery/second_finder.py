"""A second opinion: the groups of torch-pruning's DependencyGraph as a channel graph.

torch-pruning takes operators that it does not know for element-wise ones, and on some networks its search for groups
never ends. So it runs under an alarm, and what it says is proven on a cut network before it is handed out.
"""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from surgery.capture import ExampleInputs, as_call, evaluating, own_random_state
from surgery.check import check_equal
from surgery.cut import cut, mask
from surgery.errors import FinderFailed
from surgery.graph import ChannelGraph
from surgery.observed import Axis, Observed
from surgery.rebuilding import copied, states
from surgery.units import AxisKey, build, layer_name, resolve

SECONDS_LIMIT = 60.0
"""For building the dependency graph and finding all groups."""


def second_graph(model: nn.Module, example_inputs: ExampleInputs, graph: ChannelGraph) -> ChannelGraph:
    """The channel graph of `model` by torch-pruning. What is pinned, sizes and shapes are those of `graph`.

    Runs in the main thread only, because only there a signal (SIGALRM) can interrupt a search that does not end; a
    handler and an alarm set before are set again afterwards. The model is unchanged. Raises FinderFailed.
    """
    try:
        with _limited(SECONDS_LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _find(model, example_inputs)
        second = _with_pins(found, model, graph)
        _prove(model, example_inputs, second)
        return second
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise FinderFailed(
            f"torch-pruning gives no usable groups: {type(error).__name__}: {line}",
            at=f"surgery.trace of {type(model).__name__} with finder='torch-pruning'",
            effect="no graph; the model is unchanged",
            fix="use the default finder, which does not depend on torch-pruning",
        ) from error


@dataclass
class Found:
    """Names along the axes that torch-pruning would cut, and which positions any of its groups reaches."""

    seen: Observed = field(default_factory=Observed)
    reached: dict[AxisKey, Tensor] = field(default_factory=dict)

    def note(self, key: AxisKey, role: str, positions: Tensor, size: int, names: Tensor) -> None:
        """`positions`, shape (n, k), of an axis of length `size` belong to `names`, shape (n,)."""
        if key not in self.seen.axes:
            self.seen.axes[key] = Axis(role, self.seen.names.fresh(size))
            self.reached[key] = torch.zeros(size, dtype=torch.bool)
        self.seen.names.tie(self.seen.axes[key].names[positions], names[:, None])
        self.reached[key][positions] = True


def _find(model: nn.Module, example_inputs: ExampleInputs) -> Found:
    """Every item of every group as names. Works on a copy that autograd follows everywhere, in frozen parts too."""
    network = copied(model).requires_grad_(True)
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, _leaf, as_call(example_inputs))
    tensors = {id(tensor): name for name, tensor in states(network).items()}
    found = Found()
    with evaluating(network), torch.enable_grad(), own_random_state(network):
        dependencies = tp.DependencyGraph()
        dependencies.build_dependency(network, args, forward_fn=lambda net, _: net(*args, **kwargs), verbose=False)
        for group in dependencies.get_all_groups(ignored_layers=[]):
            names = found.seen.names.fresh(len(group[0].idxs))
            for item in group.items:
                _note(found, item, names, tensors)
    return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _note(found: Found, item: Any, names: Tensor, tensors: Mapping[int, str]) -> None:
    """Tie what an item of a group cuts to `names`, those of the root's channels."""
    node = item.dep.target
    if node.type in MOVEMENTS:
        return
    row = LAYERS.get(node.type)
    if row is None or None in item.root_idxs:
        found.seen.names.pin(names, f"torch-pruning's {item.dep.handler.__qualname__} is not followed")
        return
    members = names[torch.tensor(item.root_idxs)]
    for tensor, axis, role, positions in row(node, torch.tensor(item.idxs), item.dep.handler in INWARD):
        if tensor is not None and id(tensor) in tensors:
            found.note((tensors[id(tensor)], axis % tensor.dim()), role, positions, tensor.shape[axis], members)
        elif tensor is not None:
            found.seen.names.pin(names, f"{node.name} has a weight that is itself computed")


def _with_pins(found: Found, model: nn.Module, first: ChannelGraph) -> ChannelGraph:
    """The groups in the order of the layers. What the first finder pins, and what no group reaches, is pinned."""
    layers = {layer.weight: layer for layer in first.layers}
    names, axes = found.seen.names, found.seen.axes
    for key, axis in axes.items():
        names.pin(axis.names[~found.reached[key]], "torch-pruning has no group for it")
        for pinned in first.pinned:
            if axis.role == "write" and layer_name(key[0], layers) == pinned.where:
                names.pin(axis.names[list(pinned.channels)], pinned.reason)
    resolved, reasons = resolve(found.seen, names, names.classes())
    order = {weight: i for i, weight in enumerate(layers)}
    keys = sorted(resolved, key=lambda key: (order.get(key[0], len(order)), resolved[key].role == "read"))
    return replace(build({key: resolved[key] for key in keys}, reasons, layers, model), fixed=first.fixed)


def _prove(model: nn.Module, example_inputs: ExampleInputs, graph: ChannelGraph) -> None:
    """Without every third unit, the cut network computes what the masked one does. Raises NotEqual or any error."""
    keep = {group.name: torch.arange(group.units) % 3 != 1 for group in graph.groups}
    check_equal(mask(model, graph, keep), cut(model, graph, keep), example_inputs)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside after `seconds`, and every second from then on, should the first be swallowed."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("it can only be stopped in the main thread, so it does not start in another")

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


# -- what each kind of layer loses: rows of (tensor, axis, role, positions of shape (channels, k)) ---------------------

Cut = tuple[Tensor | None, int, str, Tensor]


def _convolution(node: Any, channels: Tensor, inward: bool) -> list[Cut]:
    """Groups must lose the same pattern each: a channel stands for its position in every one of them."""
    conv = node.module
    reads, writes = (0, 1) if conv.transposed else (1, 0)
    if conv.groups > 1 and conv.weight.shape[1] == 1:
        return _depthwise(conv, channels, inward)
    if conv.groups > 1 and conv.transposed:
        raise NotImplementedError("grouped transposed convolution")
    if inward:
        return [(conv.weight, reads, "read", channels[:, None] % conv.weight.shape[reads])]
    period = conv.out_channels // conv.groups
    positions = channels[:, None] % period + period * torch.arange(conv.groups)
    return [(conv.weight, writes, "write", positions), (conv.bias, 0, "carry", positions)]


def _depthwise(conv: Any, channels: Tensor, inward: bool) -> list[Cut]:
    """Axis 0 of the weight is the channel itself, each input repeated for every output made of it."""
    repeats = conv.out_channels // conv.in_channels if inward else 1
    positions = channels[:, None] * repeats + torch.arange(repeats)
    return [(conv.weight, 0, "carry", positions), (conv.bias, 0, "carry", positions)]


def _linear(node: Any, channels: Tensor, inward: bool) -> list[Cut]:
    weight, bias = node.module.weight, node.module.bias
    if inward:
        return [(weight, 1, "read", channels[:, None])]
    return [(weight, 0, "write", channels[:, None]), (bias, 0, "carry", channels[:, None])]


def _norm(node: Any, channels: Tensor, inward: bool) -> list[Cut]:
    norm = node.module
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [(vector, 0, "carry", channels[:, None]) for vector in vectors]


def _prelu(node: Any, channels: Tensor, inward: bool) -> list[Cut]:
    return [(node.module.weight, 0, "carry", channels[:, None])] if node.module.num_parameters > 1 else []


def _embedding(node: Any, channels: Tensor, inward: bool) -> list[Cut]:
    return [(node.module.weight, 1, "write", channels[:, None])]


def _parameter(node: Any, channels: Tensor, inward: bool) -> list[Cut]:
    return [(node.module, node.pruning_dim, "carry", channels[:, None])]


LAYERS: dict[OPTYPE, Callable[[Any, Tensor, bool], list[Cut]]] = {
    OPTYPE.CONV: _convolution,
    OPTYPE.DEPTHWISE_CONV: _convolution,
    OPTYPE.LINEAR: _linear,
    OPTYPE.BN: _norm,
    OPTYPE.IN: _norm,
    OPTYPE.PRELU: _prelu,
    OPTYPE.EMBED: _embedding,
    OPTYPE.PARAMETER: _parameter,
}
MOVEMENTS = {
    OPTYPE.CONCAT,
    OPTYPE.SPLIT,
    OPTYPE.ELEMENTWISE,
    OPTYPE.RESHAPE,
    OPTYPE.UNBIND,
    OPTYPE.EXPAND,
    OPTYPE.SLICE,
    OPTYPE.OUTPUT,
}
INWARD = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
