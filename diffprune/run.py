"""One run: from settings to a folder with the small network, its ONNX file and every number measured on the way."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import export
from diffprune import __version__
from diffprune.budget import Budget
from diffprune.calibration import length
from diffprune.card import model_card
from diffprune.config import Config, portable, to_toml
from diffprune.data import makes_batches
from diffprune.errors import BadConfig
from diffprune.feeding import endless
from diffprune.manifest import write_manifest
from diffprune.pipeline import Result, compress
from diffprune.preparation import (
    Prepared,
    looks_untrained,
    prepare,
    require_devices,
    require_exportable,
    require_possible,
    target_of,
)
from diffprune.pruned import Origin
from diffprune.report import render
from diffprune.runfolder import RunFolder, create
from diffprune.shipping import (
    LATENCY_FILES,
    latency,
    measured,
    measured_networks,
    origin_of,
    save_dense,
    write_networks,
)
from diffprune.stored import TRAINED
from diffprune.target import probe
from diffprune.training import Event, Recipe, fit_
from diffprune.verdict import missed, verdict


@dataclass(frozen=True)
class Finished:
    """Where a run lies, and its report."""

    folder: Path
    report: dict[str, Any]


class Diary:
    """Takes every event of a run to log.jsonl and to the listener; keeps the training curve and the warnings."""

    def __init__(self, folder: RunFolder, listener: Event, classes: int) -> None:
        self.curve: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._folder, self._listener, self._classes = folder, listener, classes

    def __call__(self, event: dict[str, Any]) -> None:
        self._folder.log(event)
        self._listener(event)
        if "loss" in event:
            self.curve.append({key: value for key, value in event.items() if key != "steps"})
        if event["phase"] == "dense" and (text := looks_untrained(event["accuracy"], self._classes)):
            self.warn(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self({"phase": "warning", "text": text})


def run(config: Config, *, on_event: Event = lambda event: None) -> Finished:
    """Everything `diffprune compress` does. `on_event` is told of each training step, finished stage and warning.

    The folder gets its name only when the run is finished. Raises the errors of diffprune, surgery and export.
    """
    started = time.perf_counter()
    budget = Budget(macs=config.macs, params=config.params, speedup=config.speedup)
    require_devices(config)
    asked_of = target_of(config)
    with create(config.output) as folder:
        torch.manual_seed(config.seed)
        prepared = prepare(config)
        diary = Diary(folder, on_event, prepared.logits)
        if prepared.labels is None:
            named = len(prepared.data.labels)
            diary.warn(f"the data names {named} of the {prepared.logits} logits, so the ONNX files carry no labels")
        if config.batch is not None and makes_batches(config.data):
            diary.warn(f"batches of {config.batch} images were asked for; {config.data} makes its own")
        if budget.kind != "speedup" and (config.parent_epochs or config.epochs):  # else the layers are measured first
            require_exportable(prepared)
        config, alignment = _resolved(config, asked_of, diary)
        if config.parent_epochs:
            require_possible(prepared, budget, config, diary)
            _train_parent_(prepared, config, diary)
            save_dense(prepared.model, folder.path / TRAINED)
            folder.keep()
        result = _compressed(prepared, config, budget, diary)
        origin = origin_of(config, prepared, result)
        report = _shipped(folder, prepared, config, origin, result, diary)
        report |= {"alignment": alignment, "seconds": time.perf_counter() - started}
        folder.write_json("report.json", report)
        folder.write_text("report.html", render(report))
        folder.write_text("MODEL_CARD.md", model_card(report, origin))
        folder.write_text("config.toml", to_toml(portable(config)))
        diary({"phase": "finished"})
        write_manifest(folder.path, config, origin)  # the last, since it lists all others
    return Finished(Path(config.output), report)


def _resolved(config: Config, asked_of: export.Settings, diary: Diary) -> tuple[Config, dict[str, Any]]:
    """`config` with the step that was probed, so that running it again needs no probe; and what was measured for it."""
    if config.round_to != "auto":
        return config, {}
    diary({"phase": "probe"})
    step = probe(asked_of)
    if step.doubt:
        diary.warn(step.doubt)
    return config.model_copy(update={"round_to": step.multiple}), step.as_dict()


def _train_parent_(prepared: Prepared, config: Config, tell: Event) -> None:
    if not any(p.requires_grad for p in prepared.model.parameters()):
        raise BadConfig(
            "every parameter of the network is frozen, so that its parent cannot be trained",
            at="parent_epochs", effect="nothing was started", fix="leave it out, or let parameters require gradients",
        )  # fmt: skip
    train = prepared.data.train
    total = config.parent_epochs * length(train)
    recipe = Recipe(lr=config.parent_lr, distill=0.0, precision=config.precision)
    fit_(prepared.model, endless(train), recipe, steps=range(total), total=total, phase="parent", on_event=tell)
    prepared.model.eval()


def _compressed(prepared: Prepared, config: Config, budget: Budget, tell: Event) -> Result:
    how: dict[str, Any] = {
        "threads": config.threads, "latency_batch": config.latency_batch, "latency_device": config.latency_device,
        "latency_precision": config.latency_precision,
    }  # fmt: skip
    return compress(
        prepared.model,
        prepared.data.train,
        prepared.data.val,
        budget=budget,
        example_inputs=prepared.example,
        epochs=config.epochs,
        recipe=Recipe(lr=config.lr, precision=config.precision),
        gate=config.gate,
        round_to=int(config.round_to),
        seed=config.seed,
        device=config.device,
        **(how if budget.kind == "speedup" else {}),
        on_event=tell,
    )


def _shipped(
    folder: RunFolder, prepared: Prepared, config: Config, origin: Origin, result: Result, diary: Diary
) -> dict[str, Any]:
    """Write the networks, measure them, and complete the report."""
    diary({"phase": "export"})
    prepared.model.cpu(), result.model.cpu()
    folder.keep()
    files = write_networks(folder.path, config, origin, dense=prepared.model, pruned=result.model)
    diary({"phase": "measure"})
    found = {"cpu": measured(folder.path, config)}
    if config.latency_device == "cuda":
        found["cuda"] = measured_networks(prepared.model, result.model, origin.example, config)
    for device, comparison in found.items():
        folder.write_json(LATENCY_FILES[device], comparison.as_dict())
    report = {
        **result.report,
        "model": config.model,
        "data": portable(config).data,
        "version": __version__,
        "seed": config.seed,
        "file_bytes": {name: file.size for name, file in files.items()},
        "sha256": {name: file.sha256 for name, file in files.items()},
        "equivalence": {**result.report["equivalence"], "cut_vs_onnx": files["pruned"].parity.worst},
        "parity": {name: file.parity.worst for name, file in files.items()},
        "latency": {device: latency(comparison, config.threads) for device, comparison in found.items()},
        "machine": found["cpu"].machine.as_dict(),
        "warnings": [*diary.warnings, *result.report["warnings"]],
        "curve": diary.curve,
    }
    return {**report, "warnings": [*report["warnings"], *missed(report)], "verdict": verdict(report)}
