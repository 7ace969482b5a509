"""Listening to a forward: every ATen operator of an eager run, before autograd and decomposition, with its place.

The operators are those that torch.export captures (linear, batch_norm, matmul stay whole), at a tenth of its time:
nothing is compiled, the network just runs once.
"""

import contextlib
import functools
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.errors import CaptureFailed, SurgeryError, first_line

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One tensor, positional inputs, or keyword inputs."""

NODE_LIMIT = 50_000
SECONDS_LIMIT = 120.0


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as the positional and keyword arguments of a forward."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def evaluating(*models: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Eval mode inside; every submodule's own mode afterwards."""
    return _mode(False, *models)


@contextlib.contextmanager
def _mode(training: bool, *models: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.train(training)
        yield
    finally:
        for module, was in before:
            module.training = was


@contextlib.contextmanager
def own_random_state(model: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside, on the CPU or where the model lives, the random state is as before afterwards."""
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(gpus)):
        yield


@contextlib.contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Buffers that the forward counts or averages in, and inputs that it writes into, have their values again
    afterwards."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):  # what was not written into may not be writable
                    tensor.copy_(value)


class Listener:
    """What `listen` tells of a run. `stack` holds the names of the modules that are running, innermost last."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self._thinking = False

    @contextlib.contextmanager
    def thinking(self) -> Iterator[None]:
        """What the listener computes itself, outside of `operator`, is no part of the run."""
        self._thinking = True
        try:
            yield
        finally:
            self._thinking = False

    def stand_in(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What an operator shall give instead of being run; None: it is run."""

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """After an operator ran."""

    def entered(self, arguments: Any) -> None:
        """Before the forward of the module `stack[-1]`."""

    def left(self, output: Any) -> None:
        """After the forward of the module `stack[-1]`."""

    def became_python(self, tensor: Tensor, func: str) -> None:
        """The forward turns a tensor into python or numpy values, which nobody can follow."""


def listen(model: nn.Module, example_inputs: ExampleInputs, listener: Listener, *, training: bool = False) -> Any:
    """Run `model` on `example_inputs`, tell `listener` all that happens, return the output. The model is unchanged.

    Raises CaptureFailed if the forward raises, and beyond NODE_LIMIT operators or SECONDS_LIMIT seconds.
    """
    args, kwargs = as_call(example_inputs)
    try:
        with (
            _mode(training, model), own_random_state(model), torch.no_grad(),
            restored([*model.buffers(), *tensors_in((args, kwargs))]),
            _module_stack(model, listener), _PythonValues(listener), enable_python_dispatcher(), _Operators(listener),
        ):
            return model(*args, **kwargs)
    except (SurgeryError, Restart):
        raise
    except Exception as error:
        raise CaptureFailed(
            f"the forward of {type(model).__name__} does not run: {first_line(error)}",
            at=_source_line(error),
            effect="no graph; the model is unchanged",
            fix="give example inputs with which the model runs in eval mode",
        ) from error


def zeros_as_from(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Zeros in place of what an operator would compute."""
    device = tensors_in((args, dict(kwargs)))[0].device
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), (args, dict(kwargs)))
    empty: Tensor = func(*args, **kwargs)
    return torch.empty_strided(empty.shape, empty.stride(), dtype=empty.dtype, device=device).zero_()


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors of nested lists, tuples, dicts, dataclasses and namespaces, and of kinds derived from them."""
    found: list[Tensor] = []
    for leaf in torch.utils._pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        else:
            found += tensors_in(_inside(leaf))
    return found


def _inside(leaf: Any) -> list[Any]:
    """What is in a container that torch does not know."""
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, list | tuple):
        return list(leaf)
    if isinstance(leaf, SimpleNamespace) or (is_dataclass(leaf) and not isinstance(leaf, type)):
        return list(getattr(leaf, "__dict__", {}).values())
    return []


class Restart(Exception):
    """A listener has learnt something that it needs from the start of the run."""


class _Operators(SchemaCheckMode):
    """The only kind of mode that torch lets users put before autograd; of its own checks nothing is left."""

    def __init__(self, listener: Listener) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self.listener, self.count = listener, 0
        self.deadline = time.monotonic() + SECONDS_LIMIT

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.listener._thinking:
            return func(*args, **(kwargs or {}))
        with no_python_dispatcher():  # the listener's own operators go the short way
            result = self.listener.stand_in(func, args, kwargs or {})
        if result is None:
            result = func(*args, **(kwargs or {}))
        self.count += 1
        if self.count > NODE_LIMIT:
            raise _too_large(f"more than {NODE_LIMIT} operators")
        if time.monotonic() > self.deadline:
            raise _too_large(f"not finished after {SECONDS_LIMIT:.0f} s")
        with no_python_dispatcher():
            self.listener.operator(func, args, kwargs or {}, result)
        return result


class _PythonValues(TorchFunctionMode):
    """The ways out of torch that are no operators."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__") and isinstance(args[0], Tensor):
            with self.listener.thinking():
                self.listener.became_python(args[0], func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _module_stack(model: nn.Module, listener: Listener) -> Iterator[None]:
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            listener.stack.append(names[module])
            with listener.thinking():
                listener.entered(args)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        if module in names and listener.stack:
            with listener.thinking():
                listener.left(output)
            listener.stack.pop()

    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True):
        try:
            yield
        finally:
            listener.stack.clear()


def source_line() -> str:
    """The line of the network's code that is running."""
    return _place(traceback.walk_stack(sys._getframe(1)))


def source_lines() -> str:
    """The line of the network's code that is running and those that called it, up to the forward of its module."""
    lines = []
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        if not _foreign(frame.f_code.co_filename):
            lines.append(f"{frame.f_code.co_qualname}, line {line} of {frame.f_code.co_filename}")
            if frame.f_code.co_name == "forward":
                break
    return ", called by ".join(lines)


def _source_line(error: Exception) -> str:
    """The innermost line of the traceback that is the network's."""
    return _place(reversed([*traceback.walk_tb(error.__traceback__)]))


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first line that is neither torch's nor the standard library's nor ours."""
    for frame, line in frames:
        code = frame.f_code
        if not _foreign(code.co_filename):
            return f"{code.co_qualname}, line {line} of {os.path.basename(code.co_filename)}"
    return "the forward of the model"


@functools.cache
def _foreign(file: str) -> bool:
    ours = file.startswith(os.path.dirname(__file__)) and os.path.basename(file) != "twins.py"
    library = file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file
    return ours or library or file.startswith(("<", *torch.__path__))


def _too_large(fact: str) -> CaptureFailed:
    return CaptureFailed(
        f"the trace was given up: {fact}",
        at="surgery.trace",
        effect="no graph; the model is unchanged",
        fix="trace the part of the network that is to be cut",
    )
