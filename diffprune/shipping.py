"""What a run hands over: the networks as files, and what they cost, measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

import export
import surgery
from diffprune.config import Config
from diffprune.data import Data
from diffprune.pipeline import Result

MEASURE_SECONDS = 8.0
"""Of interleaved rounds; enough for a 95 % interval of about 1 % on a network of some milliseconds."""


def save_dense(model: nn.Module, path: Path) -> None:
    """A plain state dict, to be given as weights to this or another run. Tied tensors are stored one by one."""
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    path.write_bytes(save(tensors))  # save_file would make a file that only its owner may read


def write_networks(
    folder: Path, config: Config, data: Data, labels: Sequence[str] | None, *, dense: nn.Module, result: Result
) -> dict[str, export.OnnxFile]:
    """dense.onnx, pruned.onnx and pruned.safetensors; each ONNX file has computed what its network computes."""
    about = {
        "source_model": config.model,
        "data": config.data.partition(":")[0],
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
        "input_shape": json.dumps(data.input_shape),
        "seed": str(config.seed),
    }
    kept = json.dumps({name: [int(flags.sum()), flags.numel()] for name, flags in result.keep.items()})
    example = next(iter(data.val))[0][:2]
    surgery.save(result.model, folder / "pruned.safetensors")
    return {
        name: export.to_onnx(model, example, folder / f"{name}.onnx", metadata={**about, **extra}, labels=labels)
        for name, model, extra in (("dense", dense, {}), ("pruned", result.model, {"kept": kept}))
    }


def measured(files: dict[str, export.OnnxFile], config: Config) -> export.Comparison:
    """Dense and pruned on the CPU, one image at a time."""
    return export.compare(
        files["dense"].path, files["pruned"].path, threads=config.threads, seconds=MEASURE_SECONDS, seed=config.seed
    )


def latency(comparison: export.Comparison, threads: int) -> dict[str, Any]:
    """The part of a comparison that belongs into report.json; latency.json has every sample."""
    noise = comparison.noise
    return {
        "dense_ms": comparison.dense.median,
        "pruned_ms": comparison.small.median,
        "speedup": comparison.speedup,
        "low": comparison.low,
        "high": comparison.high,
        "threads": threads,
        "batch": comparison.dense.batch,
        "samples": len(comparison.dense.samples),
        "verdict": comparison.verdict,
        "warnings": list(comparison.warnings),
        "noise": {"ratio": noise.value, "low": noise.low, "high": noise.high},
    }
