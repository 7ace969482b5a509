"""Running a network on the names of its channels, beside its numbers."""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from surgery.capture import ExampleInputs, Listener, Restart, as_call, listen, source_line, zeros_as_from
from surgery.errors import CaptureFailed
from surgery.graph import OVER, SOURCE, Layer
from surgery.names import NEUTRAL, compact, dense, varying
from surgery.observed import Axis, Doubt, Node, Observed, State
from surgery.operators import RULES, WEIGHTED, CannotFollow

COSTLY = {
    "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::conv_transpose1d", "aten::conv_transpose2d",
    "aten::conv_transpose3d", "aten::linear", "aten::matmul", "aten::bmm", "aten::mm", "aten::addmm", "aten::baddbmm",
    "aten::einsum", "aten::scaled_dot_product_attention",
}
"""Operators of which only the shape matters here. What no channel has a part in is always computed."""

ELEMENT_LIMIT = 1 << 22
"""Parameters used element by element are named per element up to this size; larger ones are pinned."""


def observe(model: nn.Module, example_inputs: ExampleInputs, before: Observed | None = None) -> Observed:
    """Run `model` on names, in eval mode; if layers are left over, in training mode too. Raises CaptureFailed.

    The costly operators are not computed unless the forward fails without, or decides by values.
    A module whose forward decides by the values of tensors is a black box: all that passes through its own code is
    pinned, the modules that it calls are followed each by itself. `before`: what was seen of the network before a cut;
    where a rule depends on how many channels there are, it is the same again.
    """
    boxes: dict[str, str] = {}
    computing = False
    while True:
        try:
            return _Run(model, example_inputs, boxes, computing or bool(boxes), before or Observed()).run()
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


class _Run(Listener):
    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs, boxes: Mapping[str, str], computing: bool,
        before: Observed,
    ) -> None:
        super().__init__()
        self.model, self.example, self.boxes, self.computing = model, example_inputs, boxes, computing
        self.before = before
        self.seen, self.counting = Observed(computed=computing), True
        self.states = {id(state.value): state for state in _states(model)}
        self.known: Any = WeakTensorKeyDictionary()
        self.node_of: Any = WeakTensorKeyDictionary()
        self.used: set[str] = set()
        args, kwargs = as_call(example_inputs)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
        self.batch = tensors[0].shape[0] if tensors else 1

    def run(self) -> Observed:
        self._name_inputs()
        output = listen(self.model, self.example, self)
        self.seen.output = output
        self.seen.output_names = [dense(self.names_of(leaf)) for leaf in _tensors(output)]
        self.seen.ends = [self.node_of.get(leaf, -1) for leaf in _tensors(output)]
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
                self.known[leaf] = name.view([1] * leaf.dim()).expand(leaf.shape)
                self.node_of[leaf] = self._node([])

    def _pin_outputs(self, output: Any) -> None:
        for leaf in _tensors(output):
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
            return _expanded(NEUTRAL, tensor.shape)
        return found

    # what happens

    def stand_in(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.computing or func._schema.name not in COSTLY:
            return None
        if all((dense(self.names_of(t)) == NEUTRAL).all() for t in _tensors((args, dict(kwargs)))):
            return None  # constants are computed
        return zeros_as_from(func, args[:2] if func is torch.ops.aten.linear.default else args, kwargs)  # no bias: slow

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        call = Call(self, func, args, kwargs, result)
        sources = [self.node_of[t] for t in _tensors((args, dict(kwargs))) if t in self.node_of]
        if sources:
            call.node = self._node(sources)
        box = self.boxes.get(self.module)
        names = call.follow() if box is None else call.pin_everything(box)
        for tensor, name in zip(_tensors(result), _tensors(names), strict=True):
            if id(tensor) not in self.states:
                self.known[tensor] = compact(name)
                if sources:
                    self.node_of[tensor] = call.node

    def _node(self, sources: list[int]) -> int:
        self.seen.nodes.append(Node(tuple(sources)))
        return len(self.seen.nodes) - 1

    def entered(self, arguments: Any) -> None:
        if self.module in self.boxes:
            self._pin(arguments, self.boxes[self.module])

    def left(self, output: Any) -> None:
        if len(self.stack) > 1 and self.stack[-2] in self.boxes:
            self._pin(output, self.boxes[self.stack[-2]])
            if self.counting:
                values = [t.detach().clone() for t in _tensors(output) if t.is_floating_point()]
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
        for tensor in _tensors(values):
            self.seen.names.pin(self.names_of(tensor), reason)


class Call:
    """One operator of a run, as its rule sees it."""

    def __init__(self, run: _Run, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        self._run, self._func, self._args, self._kwargs, self.result = run, func, args, kwargs, result
        self.names, self._seen = run.seen.names, run.seen
        self.mutable = bool(func._schema.is_mutable)
        full: str = func._schema.name.split("::")[-1]
        self.name = full.removesuffix("_") if self.mutable else full
        self.owner = run.module
        self.node: int | None = None
        self.where = self.owner or "the model's forward"
        self.names.at = f"{self.name} at {self.where}"

    @property
    def shape(self) -> torch.Size:
        """Shape of the result; of the first one, if there are several."""
        first: Tensor = self.result if isinstance(self.result, Tensor) else self.result[0]
        return first.shape

    def keyword(self, name: str, default: Any) -> Any:
        return self._kwargs.get(name, default)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The operator itself, on names."""
        return self._func(*args, **kwargs)

    def follow(self) -> Any:
        """The names of the result, by the operator's rule; pinned where there is none."""
        rule = RULES.get(self.name)
        try:
            if rule is None:
                raise CannotFollow("has no rule")
            operands, named = self._operands(WEIGHTED.get(rule))
            names = rule(self, *operands, **named)
            self._check_mutation(operands, names)
            self._check_shapes(names)
            return names
        except CannotFollow as error:
            reason = str(error)
        except Restart:
            raise
        except Exception as error:  # names that do not fit the rule: a use that it does not cover
            reason = f"is used in a way that its rule does not cover ({type(error).__name__})"
        return self.pin_everything(f"{self.name} at {self.where} {reason}")

    # values

    def _operands(self, data: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with names in place of tensors; parameters stay States in a layer, except in argument `data`."""

        def convert(plain: Callable[[Any], Any], value: Any) -> Any:
            if isinstance(value, Tensor):
                return plain(value)
            return [convert(plain, v) for v in value] if isinstance(value, list | tuple) else value

        keep, name = partial(convert, self._state_or_names), partial(convert, self._named)
        args = tuple((keep if data is not None and i != data else name)(value) for i, value in enumerate(self._args))
        return args, {k: (keep if data is not None else name)(v) for k, v in self._kwargs.items()}

    def raw(self, index: int) -> Any:
        """An argument as the network gave it."""
        return self._args[index]

    def _state_or_names(self, tensor: Tensor) -> Any:
        state = self._run.states.get(id(tensor))
        if state is None:
            return self._run.names_of(tensor)
        self._run.used.add(state.name)
        return state

    def _named(self, tensor: Tensor) -> Tensor:
        value = self._state_or_names(tensor)
        return self.element_names(value) if isinstance(value, State) else value

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
        if small.shape[1] == 1:
            return small[:, 0].expand(x.shape[axis])
        names = torch.where((small == NEUTRAL).all(1), NEUTRAL, small.max(1).values)
        self.names.tie(small, names[:, None])
        return names.expand(x.shape[axis]) if names.numel() == 1 else names

    def element_names(self, value: State) -> Tensor:
        """The names tensor of a parameter that is used as a plain operand: one name per element."""
        if value.numel() <= 1 or not value.value.is_floating_point():
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

    def layer(self, weight: State) -> nn.Module:
        return self._run.model.get_submodule(weight.name.rpartition(".")[0])

    def was(self, name: str, axis: int = 0) -> str:
        """The role that an axis had before a cut; empty if there was none."""
        known = self._run.before.axes.get((name, axis))
        return known.role if known else ""

    def read(self, weight: State, axis: int, names: Tensor) -> None:
        if self.node is not None:
            self._seen.nodes[self.node].reads.append((weight.name, axis))
        self._axis(weight, axis, "read", names)

    def write(self, weight: State, axis: int, names: Tensor | None = None) -> Tensor:
        return self._axis(weight, axis, "write", names)

    def carry(self, vector: Any, axis: int, names: Tensor) -> None:
        if isinstance(vector, Tensor):
            self.names.tie(vector, names)
        elif vector is not None:
            self._axis(vector, axis, "carry", names)

    def _axis(self, state: State, axis: int, role: str, names: Tensor | None = None) -> Tensor:
        self._run.used.add(state.name)
        return self._note((state.name, axis), state.shape[axis], role, names)

    def remembered(self, attribute: str, names: Tensor) -> None:
        """The running module may remember the length of `names` in `attribute`."""
        if getattr(self._run.model.get_submodule(self.owner), attribute, None) == len(names):
            self.size(attribute, names)

    def size(self, attribute: str, names: Tensor, role: str = "size") -> None:
        """The running module remembers the length of `names`, shape (channels,), in `attribute`.

        With role "norm" it also takes statistics over these channels.
        """
        value = getattr(self._run.model.get_submodule(self.owner), attribute, None)
        if value not in (len(names), (len(names),), [len(names)]):
            raise CannotFollow(f"normalises {len(names)} channels outside of a norm layer")
        self._note((f"{self.owner}.{attribute}", 0), len(names), role, names)

    def order(self, index: Tensor, source: Tensor, result: Tensor) -> None:
        """A buffer `index` takes the channels called `result`, in this order, from those called `source`."""
        state = self._run.states.get(id(index))
        if state is not None:
            self._note((state.name, 0), len(result), "order", result)
            self._note((f"{state.name}{SOURCE}", 0), len(source), "source", source)

    def _note(self, key: tuple[str, int], length: int, role: str, names: Tensor | None) -> Tensor:
        """Note how an axis is used. One that was used before keeps its names, tied to the new ones."""
        known = self._seen.axes.get(key)
        if known is None:
            names = self.names.fresh(length) if names is None else names
            self._seen.axes[key] = Axis(role, names)
            return names
        if names is not None:
            self.names.tie(known.names, names)
            if ((known.names == NEUTRAL) != (names == NEUTRAL)).any():
                self.names.pin(torch.cat((known.names, names)), f"{key[0]} also meets constants")
        known.role = "read" if "read" in (role, known.role) else "write" if "write" in (role, known.role) else role
        return known.names

    def count(self, weight: State, outputs_per_channel: float, over: Tensor | None = None) -> None:
        """Note the multiply-adds: each weight element is used once per position and example.

        `over`, shape (channels,): positions that are channels themselves, so that there are fewer after a cut.
        """
        if not self._run.counting:
            return
        repeats = outputs_per_channel / self._run.batch
        if over is not None:
            repeats /= len(over)
            self._note((f"{weight.name}{OVER}", 0), len(over), "over", over)
        known = self._seen.layers.get(weight.name)
        owner, _, last = weight.name.rpartition(".")
        name = owner if last == "weight" and owner else weight.name
        self._seen.layers[weight.name] = Layer(name, weight.name, repeats + (known.repeats if known else 0.0))

    # doubts

    def doubt(
        self, names: Tensor, text: str, sizes: tuple[int, ...] | None = None, *, of_values: bool = False
    ) -> None:
        """The channels in `names`, those of the result, are free only if a cut network proves it."""
        if not varying(names):
            return
        spelled = sizes or (-1,) * names.dim()
        key = f"{self.name} at {source_line()}"
        text = f"{self.name} at {self.where} {text}"
        constants = tuple(self.constants()) if of_values else ()
        self._seen.doubts.append(Doubt(key, text, names, spelled, self.owner, of_values, constants))

    def constants(self) -> list[Tensor]:
        """Numbers among the operands, and tensors in which no channel has a part; as float64 copies."""
        leaves = torch.utils._pytree.tree_leaves((self._args, dict(self._kwargs)))
        numbers = [torch.tensor(v, dtype=torch.float64) for v in leaves if type(v) in (int, float)]
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.numel() <= ELEMENT_LIMIT]
        neutral = [t for t in tensors if (dense(self._run.names_of(t)) == NEUTRAL).all()]
        constant = [t for t in neutral if id(t) not in self._run.states]
        return numbers + [t.detach().to("cpu", torch.float64, copy=True) for t in constant]

    def became_python(self) -> None:
        self._run.became_python(self.raw(0), self.name)

    def _check_mutation(self, args: tuple[Any, ...], result: Any) -> None:
        """An in-place write of channels into a constant is lost to later readers of the constant."""
        if not (self.mutable and isinstance(result, Tensor) and args and isinstance(args[0], Tensor)):
            return
        if ((dense(args[0]) == NEUTRAL) & (dense(result) != NEUTRAL)).any():
            raise CannotFollow("writes channels into a constant in place")

    def _check_shapes(self, names: Any) -> None:
        asked = [t.shape for t in _tensors(self.result)]
        if [t.shape for t in _tensors(names)] != asked:
            raise CannotFollow("gives another shape than its rule expects")

    def pin_everything(self, reason: str) -> Any:
        """Pin all that goes in; what comes out carries one pinned name."""
        for tensor in _tensors((self._args, dict(self._kwargs))):
            value = self._state_or_names(tensor)
            if isinstance(value, State):
                self._seen.opaque.setdefault(value.name, reason)
            else:
                self.names.pin(value, reason)
        name = self.names.fresh(1)
        self.names.pin(name, reason)
        return [name.view([1] * t.dim()).expand(t.shape) for t in _tensors(self.result)]


def _states(model: nn.Module) -> list[State]:
    """Every parameter and buffer once, by its first name."""
    found: dict[int, State] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.setdefault(id(tensor), State(name, tensor.shape, tensor))
    return list(found.values())


def _expanded(value: int, shape: torch.Size) -> Tensor:
    return torch.full([1] * len(shape), value).expand(shape)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _parameter_names(model: nn.Module) -> Iterator[str]:
    """Names for positional inputs, as many as there may be."""
    parameters = inspect.signature(model.forward).parameters.values()
    yield from (p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    yield from (f"input {i}" for i in itertools.count())


def _step(step: Any) -> str:
    return str(getattr(step, "idx", getattr(step, "key", step)))
