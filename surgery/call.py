"""One operator of a run, as its rule sees it: what comes in, what goes out, and where to note what the rule finds."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.capture import Restart, source_lines, tensors_in
from surgery.graph import OVER, SOURCE, Layer
from surgery.layers import MULTIPLYING
from surgery.names import NEUTRAL, dense, everywhere, varying, width
from surgery.observed import Axis, Doubt, State
from surgery.operators import RULES, WEIGHTED
from surgery.rules import CannotFollow

if TYPE_CHECKING:
    from surgery.observe import Run

ELEMENT_LIMIT = 1 << 22
"""Parameters used element by element are named per element up to this size; larger ones are pinned."""


class Call:
    """One operator of a run."""

    def __init__(self, run: "Run", func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
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
        return everywhere(NEUTRAL, self.shape)

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
            return everywhere(NEUTRAL, value.shape)
        long = [a for a, n in enumerate(value.shape) if n > 1]
        if len(long) == 1:
            shape = [-1 if a == long[0] else 1 for a in range(len(value.shape))]
            return self._axis(value, long[0], "carry").view(shape).expand(value.shape)
        if value.numel() > ELEMENT_LIMIT:
            raise CannotFollow(f"uses {value.name} element by element")
        if value.name not in self._seen.elements:
            self._seen.elements[value.name] = self.names.fresh(value.numel()).view(value.shape)
        return self._seen.elements[value.name]

    def of_parameter(self, names: Tensor) -> bool:
        """Whether `names` are those of single elements of one parameter."""
        found = dense(names)
        return any(((found >= own.min()) & (found <= own.max())).all() for own in self._seen.elements.values())

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
        if not isinstance(weight.value, nn.Parameter):
            raise CannotFollow(f"reads the channels through {weight.name}, a buffer, and gates sit on parameters")
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

    def remembered_list(self, sizes: list[int], parts: list[Tensor]) -> None:
        """The running module may remember the lengths of `parts` side by side, in a list of these `sizes`."""
        for attribute, value in vars(self._run.model.get_submodule(self.owner)).items():
            if isinstance(value, list | tuple) and list(value) == sizes and len(sizes) > 1:
                for index, names in enumerate(parts):
                    if (names != NEUTRAL).all():
                        self._note((f"{self.owner}.{attribute}[{index}]", 0), len(names), "size", names)

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

    def _count_whole(self) -> None:
        """Note the multiply-adds of a layer that is not followed: its weight is computed, or a black box runs it."""
        place = MULTIPLYING.get(self.name, len(self._args))
        if not self._run.counting or place >= len(self._args):
            return
        x, weight = self._args[0], self._args[place]
        state = self._run.states.get(id(weight))
        if state is None or state.name not in self._seen.layers:
            uses = x if self.name.startswith("conv_transpose") else self.result
            macs = weight.numel() * uses.numel() / weight.shape[0] / self._run.batch
            self._seen.fixed[self.where] = self._seen.fixed.get(self.where, 0.0) + macs

    # doubts

    def doubt(
        self, names: Tensor, text: str, sizes: tuple[int, ...] | None = None, *, of_values: bool = False
    ) -> None:
        """The channels in `names`, those of the result, are free only if a cut network proves it."""
        if not varying(names):
            return
        spelled = sizes or (-1,) * names.dim()
        key = f"{self.name} at {source_lines()}"
        text = f"{self.name} at {self.where} {text}"
        constants, given = (self.constants, ()) if of_values else ((), self._given_widths())
        self._seen.doubts.append(Doubt(key, text, names, spelled, self.owner, of_values, constants, given))

    def _given_widths(self) -> tuple[Tensor, ...]:
        """The widths that the module was called with, as names of shape (channels,)."""
        widths = (width(names) for names in self._run.given[self.owner])
        return tuple(names for names in widths if names is not None)

    @cached_property
    def constants(self) -> tuple[Tensor, ...]:
        """Numbers among the operands, and tensors in which no channel has a part; as float64 copies."""
        leaves = torch.utils._pytree.tree_leaves((self._args, dict(self._kwargs)))
        numbers = [torch.tensor(v, dtype=torch.float64) for v in leaves if type(v) in (int, float)]
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.numel() <= ELEMENT_LIMIT]
        neutral = [t for t in tensors if (dense(self._run.names_of(t)) == NEUTRAL).all()]
        constant = [t for t in neutral if id(t) not in self._run.states]
        return (*numbers, *(t.detach().to("cpu", torch.float64, copy=True) for t in constant))

    def became_python(self) -> None:
        self._run.became_python(self.raw(0), self.name)

    def _check_mutation(self, args: tuple[Any, ...], result: Any) -> None:
        """An in-place write of channels into a constant is lost to later readers of the constant."""
        if not (self.mutable and isinstance(result, Tensor) and args and isinstance(args[0], Tensor)):
            return
        if ((dense(args[0]) == NEUTRAL) & (dense(result) != NEUTRAL)).any():
            raise CannotFollow("writes channels into a constant in place")

    def _check_shapes(self, names: Any) -> None:
        asked = [t.shape for t in tensors_in(self.result)]
        if [t.shape for t in tensors_in(names)] != asked:
            raise CannotFollow("gives another shape than its rule expects")

    def pin_everything(self, reason: str) -> Any:
        """Pin all that goes in; what comes out carries one pinned name."""
        self._count_whole()
        for tensor in tensors_in((self._args, dict(self._kwargs))):
            value = self._state_or_names(tensor)
            if isinstance(value, State):
                self._seen.opaque.setdefault(value.name, reason)
            else:
                self.names.pin(value, reason)
        name = self.names.fresh(1)
        self.names.pin(name, reason)
        return [everywhere(name, t.shape) for t in tensors_in(self.result)]
