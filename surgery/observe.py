"""Running a network on the names of its channels, beside its numbers."""

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from surgery.call import Call
from surgery.capture import (
    ExampleInputs,
    Listener,
    Restart,
    as_call,
    listen,
    source_line,
    tensors_in,
    zeros_as_from,
)
from surgery.errors import CaptureFailed
from surgery.names import NEUTRAL, compact, dense, everywhere
from surgery.observed import Node, Observed, State
from surgery.rebuilding import copied

COSTLY = {
    "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::conv_transpose1d", "aten::conv_transpose2d",
    "aten::conv_transpose3d", "aten::linear", "aten::matmul", "aten::bmm", "aten::mm", "aten::addmm", "aten::baddbmm",
    "aten::einsum", "aten::scaled_dot_product_attention",
}
"""Operators of which only the shape matters here. What no channel has a part in is always computed."""


def observe(
    model: nn.Module, example_inputs: ExampleInputs, before: Observed | None = None, *, spent: bool = False
) -> Observed:
    """Run `model` on names, in eval mode; if layers are left over, in training mode too. Raises CaptureFailed.

    The costly operators are not computed unless the forward fails without, or decides by values.
    A module whose forward decides by the values of tensors is a black box: all that passes through its own code is
    pinned, the modules that it calls are followed each by itself. `before`: what was seen of the network before a cut;
    where a rule depends on how many channels there are, it is the same again. Each run has a copy of its own, so that
    nothing that a forward remembers, such as a cache, goes from one into another or stays in `model`; unless that is
    `spent`, and nobody runs it afterwards.
    """
    boxes: dict[str, str] = {}
    computing = False
    while True:
        try:
            network = model if spent else copied(model, {id(p): p for p in model.parameters()})
            return Run(model, network, example_inputs, boxes, computing or bool(boxes), before or Observed()).run()
        except _BlackBox as found:
            boxes[found.module] = found.reason
        except CaptureFailed as failed:
            if computing or boxes or failed.__cause__ is None:  # without a cause: a limit
                raise
            computing = True


class _BlackBox(Restart):
    def __init__(self, module: str, reason: str) -> None:
        super().__init__(module)
        self.module, self.reason = module, reason


class Run(Listener):
    def __init__(
        self, original: nn.Module, model: nn.Module, example_inputs: ExampleInputs, boxes: Mapping[str, str],
        computing: bool, before: Observed,
    ) -> None:
        super().__init__()
        self.model, self.example, self.boxes, self.computing = model, example_inputs, boxes, computing
        self.before = before
        self.seen, self.counting = Observed(computed=computing), True
        self.states = {id(state.value): state for network in (original, model) for state in _states(network)}
        self.seen.owned = frozenset(id(state.value) for state in _states(original))
        self.foreign = before.owned - self.states.keys()
        self.known: Any = WeakTensorKeyDictionary()
        self.node_of: Any = WeakTensorKeyDictionary()
        self.used: set[str] = set()
        self.given: dict[str, list[Tensor]] = {}
        args, kwargs = as_call(example_inputs)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
        self.batch = tensors[0].shape[0] if tensors else 1

    def run(self) -> Observed:
        self._name_inputs()
        output = listen(self.model, self.example, self)
        self.seen.output = output
        self.seen.output_names = [dense(self.names_of(leaf)) for leaf in tensors_in(output)]
        self.seen.ends = [self.node_of.get(leaf, -1) for leaf in tensors_in(output)]
        self._pin_outputs(output)
        if self._unseen():
            self.counting = False
            with contextlib.suppress(CaptureFailed):  # then the layers stay unseen, and are listed as such
                self._pin_outputs(listen(self.model, self.example, self, training=True))
        self.seen.unseen = self._unseen()
        return self.seen

    def _name_inputs(self) -> None:
        args, kwargs = as_call(self.example)
        given = dict(zip(_parameter_names(self.model), args, strict=False)) | kwargs
        for path, leaf in torch.utils._pytree.tree_flatten_with_path(given)[0]:
            if isinstance(leaf, Tensor):
                name = self.seen.names.fresh(1)
                self.seen.inputs[".".join(_step(step) for step in path)] = name
                self.seen.names.pin(name, "model input")
                self.known[leaf] = everywhere(name, leaf.shape)
                self.node_of[leaf] = self._node([])

    def _pin_outputs(self, output: Any) -> None:
        for leaf in tensors_in(output):
            state = self.states.get(id(leaf))
            if state is not None:
                self.seen.opaque[state.name] = "model output"
            else:
                self.seen.names.pin(self.names_of(leaf), "model output")

    def _unseen(self) -> list[str]:
        """Modules with parameters that no operator has met."""
        owners = [n.rpartition(".")[0] for n, _ in self.model.named_parameters() if n not in self.used]
        return list(dict.fromkeys(owners))

    def names_of(self, tensor: Tensor) -> Tensor:
        found: Tensor | None = self.known.get(tensor)
        if found is None or found.shape != tensor.shape:
            return everywhere(NEUTRAL, tensor.shape)
        return found

    # what happens

    def stand_in(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.computing or func._schema.name not in COSTLY:
            return None
        if all((dense(self.names_of(t)) == NEUTRAL).all() for t in tensors_in((args, dict(kwargs)))):
            return None  # constants are computed
        return zeros_as_from(func, args[:2] if func is torch.ops.aten.linear.default else args, kwargs)  # no bias: slow

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        given = tensors_in((args, dict(kwargs)))
        if any(id(tensor) in self.foreign for tensor in given):
            raise _foreign_tensor(type(self.model).__name__)
        call = Call(self, func, args, kwargs, result)
        self.seen.mutated |= call.mutable
        sources = [self.node_of[t] for t in given if t in self.node_of]
        if sources:
            call.node = self._node(sources)
        box = self.boxes.get(self.module)
        names = call.follow() if box is None else call.pin_everything(box)
        for tensor, name in zip(tensors_in(result), tensors_in(names), strict=True):
            if id(tensor) not in self.states:
                self.known[tensor] = compact(name)
                if sources:
                    self.node_of[tensor] = call.node

    def _node(self, sources: list[int]) -> int:
        self.seen.nodes.append(Node(tuple(sources)))
        return len(self.seen.nodes) - 1

    def entered(self, arguments: Any) -> None:
        self.given[self.module] = [self.names_of(tensor) for tensor in tensors_in(arguments)]
        if self.module in self.boxes:
            self._pin(arguments, self.boxes[self.module])

    def left(self, output: Any) -> None:
        if len(self.stack) > 1 and self.stack[-2] in self.boxes:
            self._pin(output, self.boxes[self.stack[-2]])
            if self.counting:
                values = [t.detach().clone() for t in tensors_in(output) if t.is_floating_point()]
                self.seen.boxed += [(self.module, value) for value in values]

    def became_python(self, tensor: Tensor, func: str) -> None:
        if (dense(self.names_of(tensor)) != NEUTRAL).any() and self.module not in self.boxes:
            raise _BlackBox(
                self.module, f"{source_line()} decides by values ({func} of a tensor), so nothing it touches may change"
            )

    @property
    def module(self) -> str:
        return self.stack[-1] if self.stack else ""

    def _pin(self, values: Any, reason: str) -> None:
        for tensor in tensors_in(values):
            self.seen.names.pin(self.names_of(tensor), reason)


def _states(model: nn.Module) -> list[State]:
    """Every parameter and buffer once, by its first name."""
    found: dict[int, State] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.setdefault(id(tensor), State(name, tensor.shape, tensor))
    return list(found.values())


def _parameter_names(model: nn.Module) -> Iterator[str]:
    """Names for positional inputs, as many as there may be."""
    parameters = inspect.signature(model.forward).parameters.values()
    yield from (p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    yield from (f"input {i}" for i in itertools.count())


def _foreign_tensor(name: str) -> CaptureFailed:
    return CaptureFailed(
        f"a copy of {name} still computes with tensors of the original, which a lambda or a hook of it holds",
        at=source_line(),
        effect="what is cut there would not be trained, saved and loaded with the rest",
        fix="use a method of the module, or functools.partial of one, in place of the lambda",
    )


def _step(step: Any) -> str:
    return str(getattr(step, "idx", getattr(step, "key", step)))
