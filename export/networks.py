"""Networks as candidates: eager, compiled, or replayed as a CUDA graph."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from export.candidates import Candidate
from export.errors import CannotMeasure, DeviceMissing, one_line
from export.feeds import InputSpec
from export.rounds import Run
from export.settings import Settings
from export.tensors import Examples, example_tuple, repeat_to, resting_copy

Inputs = tuple[Tensor, ...]

CXX = {"Darwin": "clang++", "Windows": "cl"}
# Before a CUDA graph is captured: libraries choose their kernels and take their memory in the first runs.
RUNS_BEFORE_CAPTURE = 3


@contextmanager
def torch_as_asked(settings: Settings) -> Iterator[None]:
    """torch with the threads and, on a GPU, the TF32 asked for: both belong to the process, and come back afterwards.

    Raises:
        CannotMeasure: onnxruntime is asked for, or torch.compile without a C++ compiler.
        DeviceMissing: no such device here.
    """
    _require_possible(settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with tf32(settings.precision == "tf32") if settings.device == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 in matrix products and convolutions, or not. By torch's older switches: torch.compile reads those.

    They set the newer ones, but cannot be read where somebody has set only some of these.
    """
    backends: Any = torch.backends
    kinds = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    before, older = [kind.fp32_precision for kind in kinds], [_allowed(backends.cuda.matmul), _allowed(backends.cudnn)]
    product = _product_precision()
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        if product is not None:
            torch.set_float32_matmul_precision(product)
        for backend, value in zip((backends.cuda.matmul, backends.cudnn), older, strict=True):
            if value is not None:
                backend.allow_tf32 = value
        for kind, precision in zip(kinds, before, strict=True):
            if kind.fp32_precision != precision:
                kind.fp32_precision = precision


def _allowed(backend: Any) -> bool | None:
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:
        return None


def _product_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def network_candidate(model: nn.Module, example_inputs: Examples, settings: Settings) -> Candidate:
    """A copy of the network in eval mode on the device, in the precision asked for, tried once; `model` stays as it is.

    Raises:
        NotExportable: no usable example inputs, or a network that cannot be copied.
        CannotMeasure: the runtime does not run the network; nothing else is measured in its place.
    """
    dtype = torch.float16 if settings.precision == "fp16" else torch.float32
    examples = [repeat_to(example, settings.batch) for example in example_tuple(example_inputs)]
    inputs = tuple(x.to(settings.device, dtype if x.is_floating_point() else x.dtype) for x in examples)
    network = resting_copy(model).to(settings.device, dtype)
    specs = tuple(InputSpec(f"input_{i}", tuple(x.shape), str(x.dtype)) for i, x in enumerate(inputs))
    try:
        run = PREPARED[settings.runtime](network, inputs)
        run()
    except CannotMeasure:
        raise
    except Exception as error:
        raise CannotMeasure(
            f"the network does not run as {settings.runtime}: {type(error).__name__}: {one_line(error)}",
            at=f"{type(model).__name__} with {', '.join(map(str, specs))} on {settings.device}",
            effect="nothing was measured", fix="see the chained error; or choose another runtime, device or precision",
        ) from error
    return Candidate(run, specs, settings.precision)


def _eager(forward: Callable[..., object], inputs: Inputs) -> Run:
    def run() -> object:
        with torch.inference_mode():
            return forward(*inputs)

    return run


def _compiled(network: nn.Module, inputs: Inputs) -> Run:
    """As a whole, for these shapes: a graph break or a free shape would measure something else."""
    graphs = []

    def inductor(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        graphs.append(graph)
        return torch._inductor.compile(graph, examples)

    def forward(*given: Tensor) -> object:
        return network(*given)

    # A code object of its own: torch.compile files its results under it, and would try the other candidates' first.
    forward.__code__ = forward.__code__.replace()
    run = _eager(torch.compile(forward, backend=inductor, fullgraph=True, dynamic=False), inputs)
    run()
    if len(graphs) != 1:
        raise CannotMeasure(
            f"torch.compile compiled {len(graphs)} graphs of the network; one was expected",
            at=type(network).__name__, effect="nothing was measured",
            fix="unset TORCHDYNAMO_DISABLE and torch._dynamo.config.disable",
        )
    return run


def _captured(network: nn.Module, inputs: Inputs) -> Run:
    run = _eager(network, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(RUNS_BEFORE_CAPTURE):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> object:
        graph.replay()
        return run, output  # named here to stay alive: the graph reads the weights of the one and writes the other

    return replay


PREPARED: Mapping[str, Callable[[nn.Module, Inputs], Run]] = {
    "eager": _eager, "compile": _compiled, "cuda-graph": _captured,
}


def _require_possible(settings: Settings) -> None:
    if settings.runtime not in PREPARED:
        raise CannotMeasure(
            f"runtime {settings.runtime!r} does not run a network", at="runtime", effect="nothing was run",
            fix=f"use one of {', '.join(map(repr, PREPARED))}, or export.to_onnx and measure the file",
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing(
            f"torch {torch.__version__} finds no CUDA device", at="device", effect="nothing was run",
            fix="use device='cpu', or a machine and a torch build with CUDA",
        )
    compiler = os.environ.get("CXX") or CXX.get(platform.system(), "g++")
    if settings.runtime == "compile" and settings.device == "cpu" and not shutil.which(compiler):
        raise CannotMeasure(
            f"torch.compile needs a C++ compiler; there is no {compiler}", at="runtime 'compile'",
            effect="nothing was run; there is no fallback to eager", fix="install one, or name another one in CXX",
        )
