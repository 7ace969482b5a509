"""Turning a network into a graph of ATen operators whose parameters carry their qualified names."""

import contextlib
import io
import logging
import os
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.errors import CaptureFailed

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One tensor, positional inputs, or keyword inputs."""


@dataclass(frozen=True)
class Captured:
    """`states` gives the qualified name behind a placeholder, `inputs` the placeholders of the user's own inputs."""

    graph: fx.GraphModule
    states: Mapping[str, str]
    inputs: tuple[str, ...]
    batch: int


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as the positional and keyword arguments of a forward."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; every submodule's own mode afterwards."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def own_random_state(model: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside, on the CPU or where the model lives, the random state is as before afterwards."""
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(gpus)):
        yield


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Captured:
    """The graph of `model` in eval mode, by torch.export. Raises CaptureFailed with the exporter's own reason."""
    args, kwargs = as_call(example_inputs)
    try:
        with evaluating(model), own_random_state(model), _quiet():
            program = torch.export.export(model, args, kwargs, strict=False)
            module = program.graph_module
    except Exception as error:
        raise CaptureFailed(
            f"torch.export could not capture {type(model).__name__}: {_first_line(error)}",
            at=_source_line(error),
            effect="no graph; the model is unchanged",
            fix="make the forward a fixed sequence of tensor operations: move data-dependent branches and python "
            "numbers taken from tensors outside, and trace the part that is left",
        ) from error
    signature = program.graph_signature
    states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    return Captured(
        graph=module,
        states=states,
        inputs=tuple(str(name) for name in signature.user_inputs),
        batch=tensors[0].shape[0] if tensors else 1,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, log and listing of a graph that it gives up: its exception says it all."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _source_line(error: Exception) -> str:
    """The innermost line of the traceback that is neither torch's nor the standard library's nor ours."""
    place, trace = "the forward of the model", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not _foreign(code.co_filename):
            place = f"{code.co_qualname}, line {trace.tb_lineno} of {os.path.basename(code.co_filename)}"
        trace = trace.tb_next
    return place


def _foreign(file: str) -> bool:
    library = file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file
    return library or file == "<string>" or file.startswith((*torch.__path__, os.path.dirname(__file__)))
