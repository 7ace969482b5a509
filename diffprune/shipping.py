"""What a run hands over: the networks as files, and what they cost, measured."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

import export
import surgery
from diffprune.config import Config, portable
from diffprune.errors import NotReproducible
from diffprune.pipeline import Result
from diffprune.preparation import Prepared, target_of
from diffprune.pruned import SAVED, Origin, about, reloaded, require_reproducible, write_pruned
from export.drafts import sha256_of

LATENCY_FILES = {"cpu": "latency.json", "cuda": "latency-cuda.json"}
"""Every sample, by the device."""

MEASURE_SECONDS = 8.0
"""Of interleaved rounds; enough for a 95 % interval of about 1 % on a network of some milliseconds."""


def save_dense(model: nn.Module, path: Path) -> None:
    """A plain state dict, to be given as weights to this or another run. Tied tensors are stored one by one."""
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    path.write_bytes(save(tensors))  # save_file would make a file that only its owner may read


def origin_of(config: Config, prepared: Prepared, result: Result) -> Origin:
    """What the files of a run say of themselves, and what it takes to write them again."""
    data = prepared.data
    kept = {name: [int(flags.sum()), flags.numel()] for name, flags in result.keep.items()}
    metadata = about(config.model, portable(config).weights, config.license, data.input_shape) | {
        "data": config.data.partition(":")[0],
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
        "seed": str(config.seed),
        "kept": json.dumps(kept),
    }
    return Origin(len(data.labels) or None, prepared.labels, metadata)


def write_networks(
    folder: Path, config: Config, origin: Origin, *, dense: nn.Module, pruned: nn.Module
) -> dict[str, export.OnnxFile]:
    """pruned.safetensors, dense.onnx and the pruned ONNX files; each has computed what its network computes.

    The pruned files are made of what is saved, as anybody else would, and that is compared with what was trained. They
    are written twice: that costs seconds beside the minutes of a run, and later it would be found too late that a
    file cannot be traced back to its weights.

    Raises:
        NotReproducible: what is saved does not give the trained network, or not the same bytes twice.
    """
    about = {key: value for key, value in origin.metadata.items() if key != "kept"}
    surgery.save(pruned, folder / SAVED)  # first: what was trained is then safe, whatever comes
    file = export.to_onnx(dense, origin.example, folder / "dense.onnx", metadata=about, labels=origin.labels)
    network = reloaded(folder, config, origin)
    try:
        surgery.check_equal(pruned, network, origin.example)
    except surgery.NotEqual as error:
        raise NotReproducible(
            f"what {config.model} builds from {SAVED} is not the network that was trained",
            at=f"{type(network).__name__} on images of noise; the chained error says how far apart",
            effect="nothing was shipped: nobody could rebuild the network from its file",
            fix="give a factory that builds the same network every time; keep what it draws or counts in its buffers",
        ) from error
    files = write_pruned(folder, network, config, origin)
    hashes = {path.name: sha256_of(path) for path in folder.iterdir()}
    require_reproducible(reloaded(folder, config, origin), config, origin, hashes)
    return {"dense": file, **files}


def measured(folder: Path, config: Config) -> export.Comparison:
    """Dense and pruned on the CPU."""
    return measured_pair(folder / "dense.onnx", folder / "pruned.onnx", config)


def measured_pair(one: Path, other: Path, config: Config) -> export.Comparison:
    """Two files on the CPU, as the settings of the run say."""
    return export.compare(
        one, other, threads=config.threads, batch=config.latency_batch, seconds=MEASURE_SECONDS, seed=config.seed
    )


def measured_networks(
    dense: nn.Module, pruned: nn.Module, example: export.Examples, config: Config
) -> export.Comparison:
    """Both networks in torch, on the device that the settings of the run ask to be fast."""
    how = {**asdict(target_of(config)), "seed": config.seed}
    return export.compare_networks(dense, pruned, example, **how, seconds=MEASURE_SECONDS)


def latency(comparison: export.Comparison, threads: int) -> dict[str, Any]:
    """The part of a comparison that belongs into report.json; LATENCY_FILES have every sample."""
    noise = comparison.noise
    return {
        "dense_ms": comparison.dense.median,
        "pruned_ms": comparison.small.median,
        "speedup": comparison.speedup,
        "low": comparison.low,
        "high": comparison.high,
        "threads": threads,
        "batch": comparison.dense.batch,
        "clock": comparison.dense.clock,
        "samples": len(comparison.dense.samples),
        "verdict": comparison.verdict,
        "warnings": list(comparison.warnings),
        "noise": {"ratio": noise.value, "low": noise.low, "high": noise.high},
    }
