"""Which sums the outputs of layers enter, such as residual streams, seen in one forward."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from diffprune.readings import read_by

ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


class Operators(TorchFunctionMode):
    """Counts the operators of a forward and tells of each: its number, itself, all its arguments and its result.

    Two networks of the same code make the same numbers. What happens in a `pause` does not count.
    """

    def __init__(self, tell: Callable[[int, Any, tuple[Any, ...], Any], None]) -> None:
        super().__init__()
        self.tell, self.count, self.paused = tell, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            self.count += 1
            self.tell(self.count, func, args + tuple((kwargs or {}).values()), result)
        return result

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused, before = True, self.paused
        try:
            yield
        finally:
            self.paused = before


@dataclass(frozen=True, eq=False)
class Summand:
    """The output of a layer, as it is or through a BatchNorm, where it is added to `other`, of the same shape.

    `operator` is the number of the one that gave `other`, if it ran before the layer.
    """

    layer: str
    mine: Tensor
    other: Tensor
    operator: int | None


class Watch:
    """While a network runs `inside`, finds which BatchNorm alone reads a layer's output, and which sum this enters."""

    def __init__(self, layers: Mapping[str, nn.Module], entered: Callable[[Summand], None]) -> None:
        self.layers, self.entered = layers, entered
        self._norm_of: dict[str, str] = {}
        self._reads: Counter[str] = Counter()
        self._runs: Counter[str] = Counter()
        self._made: Any = WeakIdKeyDictionary()
        self._from: Any = WeakIdKeyDictionary()
        self._given: Any = WeakIdKeyDictionary()
        self._ran: dict[str, int] = {}
        self.operators = Operators(self._saw)

    @property
    def norm_of(self) -> dict[str, str]:
        """The name of the BatchNorm that reads what a layer gives, nothing else, and is its only reader."""
        return {name: norm for name, norm in self._norm_of.items() if self._reads[name] == self._runs[norm] == 1}

    @property
    def normed(self) -> set[str]:
        """The layers that a BatchNorm reads, whatever else it or they do."""
        return set(self._norm_of)

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks, self.operators:
            for name, layer in self.layers.items():
                hooks.enter_context(layer.register_forward_hook(self._layer(name)))
            for name, norm in model.named_modules():
                if isinstance(norm, _BatchNorm):
                    hooks.enter_context(norm.register_forward_hook(self._norm(name), with_kwargs=True))
            yield

    def _layer(self, name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]  # attention gives its weights as well
            with self.operators.pause():
                self._from[first], self._ran[name] = (name, first._version), self.operators.count
                self._given[first] = name

        return hook

    def _norm(self, norm: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            with self.operators.pause():
                read = read_by(args, kwargs)
                name = self._source(read)
                self._runs[norm] += 1
                if (
                    name is None
                    or name in self._norm_of
                    or (isinstance(self.layers[name], nn.Linear) and read.dim() > 2)
                ):
                    return  # of (N, tokens, outputs) BatchNorm normalises tokens
                self._norm_of[name], self._from[output] = norm, (name, output._version)

        return hook

    def _saw(self, count: int, func: Any, args: tuple[Any, ...], result: Any) -> None:
        name = getattr(func, "__name__", "")
        if name in ADDITIONS and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
            a, b = args
            if a.shape == b.shape:
                with self.operators.pause():
                    first = result - b if result is a else a  # in place, the sum lies where a was
                    self._added(self._source(a, changes=int(result is a)), first, b, b)
                    self._added(self._source(b), b, a, first)
        if isinstance(result, Tensor):
            self._made[result] = count
            self._reads.update(
                self._given[arg] for arg in tree_leaves(args) if isinstance(arg, Tensor) and arg in self._given
            )

    def _source(self, value: Tensor, changes: int = 0) -> str | None:
        """The layer that gave `value`, if it has not been written into since, but for so many `changes`."""
        name, version = self._from.get(value, (None, 0))
        return name if value._version == version + changes else None

    def _added(self, name: str | None, mine: Tensor, b: Tensor, other: Tensor) -> None:
        """`mine` is what the layer `name` gave, `other` the value that the tensor `b` had before they were added."""
        made = self._made.get(b)
        if name is not None:
            there = made if made is not None and made < self._ran[name] else None
            self.entered(Summand(name, mine, other, there))


def same_operators(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    """Do both networks compute the same sequence of operators from `x`?"""
    seen: list[list[Any]] = []
    for model in (a, b):
        seen.append([])
        with Operators(lambda count, func, args, result: seen[-1].append(func)):
            model(x)
    return seen[0] == seen[1]
