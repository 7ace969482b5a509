"""Running a captured network on the names of its channels."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.capture import Captured
from surgery.errors import CaptureFailed
from surgery.graph import Layer
from surgery.names import NEUTRAL, Names, dense
from surgery.operators import LAYERS, RULES, CannotFollow

NODE_LIMIT = 50_000
SECONDS_LIMIT = 120.0
ELEMENT_LIMIT = 1 << 20
"""Parameters used element by element are named per element up to this size; larger ones are pinned."""

INLINED = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Higher-order operators that run a subgraph: at which argument it stands."""


@dataclass(frozen=True)
class State:
    """A parameter or buffer of the network, by qualified name. Tied ones share the name of the first."""

    name: str
    shape: torch.Size

    def numel(self) -> int:
        return self.shape.numel()


@dataclass
class Axis:
    """What a trace saw along one axis of a parameter: how it is used, and the name at each index."""

    role: str
    names: Tensor


@dataclass
class Observed:
    """Everything a trace saw."""

    names: Names = field(default_factory=Names)
    axes: dict[tuple[str, int], Axis] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    suspicions: list[tuple[Tensor, str]] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[torch.Size] = field(default_factory=list)


def observe(captured: Captured, model: nn.Module, pins: Mapping[str, str] | None = None) -> Observed:
    """Run `captured` on names. Each suspicion whose text is in `pins` is pinned for the reason given there.

    Raises CaptureFailed beyond NODE_LIMIT operators or SECONDS_LIMIT seconds.
    """
    return _Run(captured, model, pins or {}).run()


class _Run:
    def __init__(self, captured: Captured, model: nn.Module, pins: Mapping[str, str]) -> None:
        self.captured, self.model, self.pins = captured, model, pins
        self.seen = Observed()
        self.deadline = time.monotonic() + SECONDS_LIMIT
        first: dict[int, str] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.canonical = {name: first.setdefault(id(tensor), name) for name, tensor in named}

    def run(self) -> Observed:
        module, values = self.captured.graph, []
        for node in (n for n in module.graph.nodes if n.op == "placeholder"):
            values.append(self._placeholder(node))
        for result in self._subgraph(module, values):
            if isinstance(result, Tensor):
                self.seen.names.pin(result, "model output")
                self.seen.outputs.append(result.shape)
            elif isinstance(result, State):
                self.seen.opaque[result.name] = "model output"
        return self.seen

    def _placeholder(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        if node.name in self.captured.states:
            state = self.captured.states[node.name]
            return State(self.canonical.get(state, state), value.shape)
        if node.name not in self.captured.inputs:
            return _expanded(NEUTRAL, value.shape)  # a tensor constant of the forward
        name = self.seen.names.fresh(1)
        self.seen.inputs[node.name] = name
        self.seen.names.pin(name, "model input")
        return name.view([1] * value.dim()).expand(value.shape)

    def _subgraph(self, module: Any, values: list[Any]) -> list[Any]:
        """Interpret one graph; returns its outputs as a flat list."""
        env: dict[fx.Node, Any] = {}
        nodes = list(module.graph.nodes)
        if len(nodes) > NODE_LIMIT:
            raise _too_large(f"{len(nodes)} operators; the limit is {NODE_LIMIT}")
        arguments = iter(values)
        for node in nodes:
            if time.monotonic() > self.deadline:
                raise _too_large(f"not finished after {SECONDS_LIMIT:.0f} s")
            if node.op == "placeholder":
                env[node] = next(arguments)
            elif node.op == "get_attr":
                env[node] = _attribute(module, str(node.target))
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            elif node.op == "output":
                return _leaves(fx.node.map_arg(node.args, lambda n: env[n]))
        return []

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda n: env[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: env[n])
        call = Call(self, node, dict(kwargs))
        if call.name in INLINED:
            at = INLINED[call.name]
            return self._subgraph(args[at], list(args[at + 1 :]))
        try:
            rule = RULES.get(call.name)
            if rule is None:
                raise CannotFollow("has no rule")
            operands, named = call.operands(LAYERS.get(rule), args, kwargs)
            result = rule(call, *operands, **named)
            call.check_mutation(operands, result)
            return result
        except CannotFollow as error:
            reason = str(error)
        except Exception as error:  # names that do not fit the rule: a use that it does not cover
            reason = f"is used in a way that its rule does not cover ({type(error).__name__})"
        return call.pin_everything(_leaves((args, kwargs)), f"{call.name} at {call.where} {reason}")


class Call:
    """One operator of the graph, as its rule sees it."""

    def __init__(self, run: _Run, node: fx.Node, kwargs: Mapping[str, Any]) -> None:
        self._run, self._node, self._kwargs = run, node, kwargs
        self.names, self._seen = run.seen.names, run.seen
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        self.mutable = bool(schema is not None and schema.is_mutable)
        full = schema.name.split("::")[-1] if schema is not None else getattr(target, "__name__", str(target))
        self.name: str = full.removesuffix("_") if self.mutable else full
        stack = list(node.meta.get("nn_module_stack", {}).values())
        self.where: str = (stack[-1][0] if stack else "") or "the model's forward"

    @property
    def shape(self) -> torch.Size:
        """Shape of the result; of the first one, if there are several."""
        value = self._node.meta["val"]
        shape: torch.Size = (value if isinstance(value, Tensor) else value[0]).shape
        return shape

    def keyword(self, name: str, default: Any) -> Any:
        return self._kwargs.get(name, default)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The operator itself, on names."""
        target: Any = self._node.target
        return target(*args, **kwargs)

    # values

    def operands(self, data: int | None, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[Any, ...], Any]:
        """Arguments with names in place of parameters: in argument `data` of a layer, everywhere if that is None."""

        def named(value: Any) -> Any:
            return torch.utils._pytree.tree_map_only(State, self.element_names, value)

        if data is None:
            return named(args), named(kwargs)
        return (*args[:data], named(args[data]), *args[data + 1 :]), kwargs

    def neutral(self) -> Tensor:
        return _expanded(NEUTRAL, self.shape)

    def spread(self, names: Tensor, axis: int) -> Tensor:
        """The result whose channels lie on `axis` and are called `names`, shape (channels,)."""
        view = [1] * len(self.shape)
        view[axis] = -1
        return names.view(view).expand(self.shape)

    def vector(self, x: Tensor, axis: int) -> Tensor:
        """The names along `axis`, shape (channels,); names that share an index are tied."""
        small = dense(x).movedim(axis, 0).flatten(1)
        names = torch.where((small == NEUTRAL).all(1), NEUTRAL, small.max(1).values)
        self.names.tie(small, names[:, None])
        return names.expand(x.shape[axis]) if names.numel() == 1 else names

    def element_names(self, value: State) -> Tensor:
        """The names tensor of a parameter that is used as a plain operand: one name per element."""
        if value.numel() <= 1:
            return _expanded(NEUTRAL, value.shape)
        long = [a for a, n in enumerate(value.shape) if n > 1]
        if len(long) == 1:
            shape = [-1 if a == long[0] else 1 for a in range(len(value.shape))]
            return self._axis(value, long[0], "carry").view(shape).expand(value.shape)
        if value.numel() > ELEMENT_LIMIT:
            raise CannotFollow(f"uses {value.name} element by element")
        if value.name not in self._seen.elements:
            self._seen.elements[value.name] = self.names.fresh(value.numel()).view(value.shape)
        return self._seen.elements[value.name]

    # parameters

    def parameter(self, value: Any) -> State:
        if not isinstance(value, State):
            raise CannotFollow("has a weight that is itself computed; bake parametrizations in before tracing")
        return value

    def owner(self, weight: State) -> nn.Module:
        return self._run.model.get_submodule(weight.name.rpartition(".")[0])

    def read(self, weight: State, axis: int, names: Tensor) -> None:
        self._axis(weight, axis, "read", names)

    def write(self, weight: State, axis: int, names: Tensor | None = None) -> Tensor:
        return self._axis(weight, axis, "write", names)

    def carry(self, vector: Any, axis: int, names: Tensor) -> None:
        if vector is not None:
            self._axis(self.parameter(vector), axis, "carry", names)

    def _axis(self, state: State, axis: int, role: str, names: Tensor | None = None) -> Tensor:
        """Note how an axis is used. One that was used before keeps its names, tied to the new ones."""
        known = self._seen.axes.get((state.name, axis))
        if known is None:
            names = self.names.fresh(state.shape[axis]) if names is None else names
            self._seen.axes[state.name, axis] = Axis(role, names)
            return names
        if names is not None:
            self.names.tie(known.names, names)
            if ((known.names == NEUTRAL) != (names == NEUTRAL)).any():
                self.names.pin(torch.cat((known.names, names)), f"{state.name} also meets constants")
        known.role = "read" if "read" in (role, known.role) else "write" if "write" in (role, known.role) else role
        return known.names

    def count(self, weight: State, outputs_per_channel: float) -> None:
        """Note the multiply-adds: each weight element is used once per position and example."""
        repeats = outputs_per_channel / self._run.captured.batch
        known = self._seen.layers.get(weight.name)
        owner, _, last = weight.name.rpartition(".")
        name = owner if last == "weight" and owner else weight.name
        self._seen.layers[weight.name] = Layer(name, weight.name, repeats + (known.repeats if known else 0.0))

    # doubts

    def suspect(self, names: Tensor, doubt: str) -> None:
        """Unless a cut network proves otherwise, the channels `names` (any shape) are not free."""
        text = f"{self.name} at {self.where} {doubt}"
        if text in self._run.pins:
            self.names.pin(names, self._run.pins[text])
        self._seen.suspicions.append((torch.unique(dense(names)), text))

    def check_mutation(self, args: tuple[Any, ...], result: Any) -> None:
        """An in-place write of channels into a constant is lost to later readers of the constant."""
        if not (self.mutable and isinstance(result, Tensor) and isinstance(args[0], Tensor)):
            return
        if ((dense(args[0]) == NEUTRAL) & (dense(result) != NEUTRAL)).any():
            raise CannotFollow("writes channels into a constant in place")

    def pin_everything(self, values: list[Any], reason: str) -> Any:
        """Pin all that goes in; what comes out carries one pinned name."""
        for value in values:
            if isinstance(value, Tensor):
                self.names.pin(value, reason)
            elif isinstance(value, State):
                self._seen.opaque.setdefault(value.name, reason)
        name = self.names.fresh(1)
        self.names.pin(name, reason)
        value = self._node.meta.get("val")
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda t: name.view([1] * t.dim()).expand(t.shape), value, is_leaf=lambda t: isinstance(t, Tensor)
        )


def _expanded(value: int, shape: torch.Size) -> Tensor:
    return torch.full([1] * len(shape), value).expand(shape)


def _leaves(values: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(values)


def _attribute(module: nn.Module, path: str) -> Any:
    """A subgraph to be inlined, or a tensor constant of the forward."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return _expanded(NEUTRAL, value.shape) if isinstance(value, Tensor) else value


def _too_large(fact: str) -> CaptureFailed:
    return CaptureFailed(
        f"the trace was given up: {fact}",
        at="surgery.trace",
        effect="no graph; the model is unchanged",
        fix="trace the part of the network that is to be cut",
    )


