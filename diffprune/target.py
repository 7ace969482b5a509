"""Where a network is to be fast: what a speed-up is asked of, and measured on."""

import torch

import export
from diffprune.errors import BadConfig, DeviceMissing, first_line
from export import Settings


def require_device(device: str | torch.device, option: str) -> None:
    """Raises DeviceMissing, and BadConfig for what is no device. `option` is what asked for it."""
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise BadConfig(
            first_line(error),
            at=f"{option} = {device}",
            effect="nothing was started",
            fix=f"use {option} = cpu or cuda",
        ) from error
    if asked.type == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing(
            "there is no CUDA device",
            at=f"{option} = {device}",
            effect="nothing was started",
            fix=f"use {option} = cpu, or a machine and a torch build with CUDA",
        )


def target(device: str = "cpu", *, threads: int = 1, batch: int = 1, precision: str = "fp32") -> Settings:
    """onnxruntime on a CPU; on a GPU torch, replayed as a CUDA graph, where single layers can be timed.

    Raises:
        BadConfig: another precision than fp32 of a CPU.
        export.CannotMeasure: an unknown device or precision, or a count below 1.
    """
    if device == "cpu" and precision != "fp32":
        raise BadConfig(
            f"a latency in {precision} was asked of the CPU",
            at="latency_precision",
            effect="nothing was started",
            fix="use latency_device = cuda, or fp32; diffprune quantize makes files for smaller types",
        )
    return Settings(device, threads, batch, 0, "onnx" if device == "cpu" else "cuda-graph", precision)


def probe(asked_of: Settings) -> export.Step:
    """The step of widths there, measured."""
    return export.probe_step(device=asked_of.device, threads=asked_of.threads, precision=asked_of.precision)
