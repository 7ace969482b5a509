"""Stacks of convolutions of several widths, timed side by side: where the step of `alignment` is read off."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.alignment import WIDTHS, Step, decide
from export.candidates import Candidate
from export.clocks import clock_for
from export.errors import CannotMeasure
from export.files import file_candidate
from export.networks import network_candidate, torch_as_asked
from export.rounds import run_rounds
from export.settings import Settings

SIDE = 14
DEPTH = 4
# A GPU waits for its launches where a CPU computes: all widths and candidates are so many times as large there.
GPU_SCALE = 2
GPU_BATCH = 64
# What tensor cores ask of channels (NVIDIA, Deep Learning Performance: Convolutional Layers, "16 bytes").
TENSOR_CORES = {"fp32": 4, "tf32": 4, "fp16": 8}


def probe_step(
    *, device: str = "cpu", threads: int = 1, precision: str = "fp32", seconds_budget: float = 3.0, seed: int = 0
) -> Step:
    """Measure stacks of 3x3 convolutions of several widths in interleaved rounds, and find the step in their cost.

    On a CPU in onnxruntime, one image at a time, on a GPU in torch as CUDA graphs, GPU_BATCH images at once. Takes
    about `seconds_budget` plus two seconds of loading and warming up.

    Args:
        precision: "fp32"; on a GPU also "tf32" and "fp16".

    Raises:
        CannotMeasure: no threads, no time, or another precision.
        DeviceMissing: no such device here.
    """
    on_cpu = device == "cpu"
    if on_cpu and precision != "fp32":
        raise CannotMeasure(
            f"a step in {precision} was asked of the CPU", at="precision", effect="nothing was run",
            fix="use fp32, or device='cuda'",
        )
    batch, runtime, scale = (1, "onnx", 1) if on_cpu else (GPU_BATCH, "cuda-graph", GPU_SCALE)
    settings = Settings(device, threads, batch, seed, runtime, precision)
    widths = [scale * width for width in WIDTHS]
    with (_files if on_cpu else _networks)(widths, settings) as candidates:
        runs = [candidate.run for candidate in candidates]
        rounds = run_rounds(runs, seconds=seconds_budget, seed=seed, timer=clock_for(settings).timer)
    medians = np.median(rounds.milliseconds, axis=1)
    evidence = {width: float(median) for width, median in zip(widths, medians, strict=True)}
    return decide(evidence) if on_cpu else decide(evidence, scale, TENSOR_CORES[precision], "tensor cores")


@contextmanager
def _files(widths: Sequence[int], settings: Settings) -> Iterator[list[Candidate]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{width}.onnx" for width in widths]
        for width, path in zip(widths, paths, strict=True):
            onnx.save(_stack(width, settings.seed), str(path))
        yield [file_candidate(path, settings, None) for path in paths]


@contextmanager
def _networks(widths: Sequence[int], settings: Settings) -> Iterator[list[Candidate]]:
    with torch_as_asked(settings):
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # all of which a seed reaches
            torch.manual_seed(settings.seed)
            stacks = [(_network(width), torch.randn(1, width, SIDE, SIDE)) for width in widths]
        yield [network_candidate(network, image, settings) for network, image in stacks]


def _network(width: int) -> nn.Sequential:
    """`_stack` in torch."""
    layers = [layer for _ in range(DEPTH) for layer in (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU())]
    return nn.Sequential(*layers)


def _stack(width: int, seed: int) -> onnx.ModelProto:
    """DEPTH 3x3 convolutions with ReLU, `width` channels in and out, on maps of SIDE x SIDE, batch 1."""
    generator = np.random.default_rng(seed)
    nodes, weights, value = [], [], "input"
    for index in range(DEPTH):
        kernel = generator.standard_normal((width, width, 3, 3)) / np.sqrt(9 * width)
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"weight_{index}"))
        nodes.append(helper.make_node("Conv", [value, f"weight_{index}"], [f"conv_{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"conv_{index}"], [f"relu_{index}"]))
        value = f"relu_{index}"
    shape = [1, width, SIDE, SIDE]
    graph = helper.make_graph(
        nodes,
        f"stack_{width}",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        weights,
    )
    # Pinned: the newest ones that onnx writes by default are ahead of what onnxruntime reads.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
