"""One run: from settings to a folder with the small network, its ONNX file and every number measured on the way."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import export
import surgery
from diffprune import __version__
from diffprune.budget import Budget
from diffprune.config import Config, to_toml
from diffprune.data import Data, load_data
from diffprune.errors import BadConfig, BadData, DeviceMissing
from diffprune.models import load_model
from diffprune.pipeline import Result, compress
from diffprune.recover import accuracy
from diffprune.report import render
from diffprune.runfolder import RunFolder, create
from diffprune.training import Event, Recipe, endless, fit_

MEASURE_SECONDS = 8.0
"""Of interleaved rounds; enough for a 95 % interval of about 1 % on a network of some milliseconds."""


@dataclass(frozen=True)
class Finished:
    """Where a run lies, and its report."""

    folder: Path
    report: dict[str, Any]


def run(config: Config, *, on_event: Event | None = None, parent_lr: float = 0.05) -> Finished:
    """Everything `diffprune compress` does. `on_event` is told of each training step and finished stage.

    The folder gets its name only when the run is finished. Raises the errors of diffprune, surgery and export.
    """
    tell = on_event or (lambda event: None)
    started = time.perf_counter()
    budget = Budget(macs=config.macs, params=config.params, speedup=config.speedup)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing(
            "there is no CUDA device",
            at="device = cuda",
            effect="nothing was started",
            fix="use device = cpu, or a machine and a torch build with CUDA",
        )
    with create(config.output) as folder:
        torch.manual_seed(config.seed)
        data = load_data(config.data, image_size=config.image_size, batch=config.batch, seed=config.seed)
        model = load_model(config.model, weights=config.weights, num_classes=len(data.labels) or None)
        example = _example(model, data, config)
        config = _resolved(config)
        curve: list[dict[str, Any]] = []

        def record(event: dict[str, Any]) -> None:
            folder.log(event)
            if "loss" in event:
                curve.append({k: v for k, v in event.items() if k != "steps"})
            tell(event)

        if config.parent_epochs:
            _train_parent_(model, data, config, parent_lr, record)
        result = compress(
            model,
            data.train,
            data.val,
            budget=budget,
            example_inputs=example,
            epochs=config.epochs,
            recipe=Recipe(lr=config.lr),
            gate=config.gate,
            round_to=int(config.round_to),
            seed=config.seed,
            device=config.device,
            on_event=record,
        )
        report = _ship(folder, config, data, model.cpu(), result, example.cpu(), tell)
        report |= {"curve": curve, "seconds": time.perf_counter() - started}
        report["verdict"] = verdict(report)
        folder.write_json("report.json", report)
        folder.write_text("report.html", render(report))
        folder.write_text("config.toml", to_toml(config))
        tell({"phase": "finished"})
    return Finished(Path(config.output), report)


def verdict(report: dict[str, Any]) -> str:
    """One sentence that claims no more than was measured."""
    points = 100 * (report["accuracy"]["pruned"] - report["accuracy"]["dense"])
    latency = report["latency"]["cpu"]
    moved = f"{abs(points):.1f} points {'more' if points > 0 else 'less'} accurate"
    if latency["low"] > 1:
        speed = f"{latency['speedup']:.2f}x faster ({latency['low']:.2f} to {latency['high']:.2f})"
    elif latency["high"] < 1:
        speed = f"{1 / latency['speedup']:.2f}x slower"
    else:
        speed = "not measurably faster"
    saved = 1 - report["macs"]["pruned"] / report["macs"]["dense"]
    return f"The pruned network is {speed} on this CPU with {saved:.0%} fewer MACs, and {moved} than its parent."


def _resolved(config: Config) -> Config:
    """`config` with the alignment that was probed, so that running it again needs no probe."""
    if config.round_to != "auto":
        return config
    return config.model_copy(update={"round_to": export.probe_step(threads=config.threads).multiple})


def _example(model: nn.Module, data: Data, config: Config) -> Tensor:
    """Two validation images on the device, after a trial run of the network on them."""
    images: Tensor = next(iter(data.val))[0][:2]
    shape = tuple(images.shape[1:])
    try:
        with torch.no_grad(), surgery.evaluating(model):
            output = model(images)
    except Exception as error:
        raise BadData(
            f"the network does not take images of {shape}: {str(error).splitlines()[0]}",
            at=f"{config.model} on {config.data}",
            effect="nothing was started",
            fix="set image_size, or give data with the channels and size that the network was built for",
        ) from error
    classes = len(data.labels)
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < classes:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadConfig(
            f"the network answers with {found}; (N, {classes}) is asked, one logit per label",
            at=f"{config.model} on {config.data}",
            effect="nothing was started",
            fix="give a network that returns logits for these labels",
        )
    return images.to(config.device)


def _train_parent_(model: nn.Module, data: Data, config: Config, lr: float, record: Event) -> None:
    model.to(config.device)
    total = config.parent_epochs * len(data.train)
    fit_(
        model,
        endless(data.train),
        Recipe(lr=lr, distill=0.0),
        steps=range(total),
        total=total,
        phase="parent",
        on_event=record,
    )
    record({"phase": "parent done", "accuracy": accuracy(model, data.val)[0]})
    model.eval()


def _ship(
    folder: RunFolder, config: Config, data: Data, dense: nn.Module, result: Result, example: Tensor, tell: Event
) -> dict[str, Any]:
    """Write the networks, measure them, and complete the report."""
    small = result.model.cpu()
    tell({"phase": "export"})
    about = {
        "source_model": config.model,
        "data": config.data.partition(":")[0],
        "mean": str(list(data.mean)),
        "std": str(list(data.std)),
        "input_shape": str(list(data.input_shape)),
        "seed": str(config.seed),
    }
    kept = {name: f"{int(flags.sum())}/{flags.numel()}" for name, flags in result.keep.items()}
    files = {}
    for name, model, extra in (("dense", dense, {}), ("pruned", small, {"kept": str(kept)})):
        path = folder.path / f"{name}.onnx"
        files[name] = export.to_onnx(model, example, path, metadata={**about, **extra}, labels=data.labels)
    surgery.save(small, folder.path / "pruned.safetensors")
    tell({"phase": "measure"})
    measured = export.compare(
        files["dense"].path, files["pruned"].path, threads=config.threads, seconds=MEASURE_SECONDS, seed=config.seed
    )
    folder.write_json("latency.json", measured.as_dict())
    report = {**result.report, "model": config.model, "data": config.data, "version": __version__, "seed": config.seed}
    report["file_bytes"] = {name: file.size for name, file in files.items()}
    report["sha256"] = {name: file.sha256 for name, file in files.items()}
    report["equivalence"] |= {"cut_vs_onnx": files["pruned"].parity.worst}
    report["latency"] = {
        "cpu": {
            "dense_ms": measured.dense.median,
            "pruned_ms": measured.small.median,
            "speedup": measured.speedup,
            "low": measured.low,
            "high": measured.high,
            "threads": config.threads,
            "batch": measured.dense.batch,
            "samples": len(measured.dense.samples),
            "verdict": measured.verdict,
            "warnings": list(measured.warnings),
            "noise": {"ratio": measured.noise.value, "low": measured.noise.low, "high": measured.noise.high},
        }
    }
    report["machine"] = measured.machine.as_dict()
    report["warnings"] = [note for note in (report["budget"]["note"],) if note]
    return report
