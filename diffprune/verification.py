"""Does a finished run still hold, here? Its files, what they compute, where they come from, how fast they are."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import export
from diffprune.config import Config
from diffprune.errors import NotVerified
from diffprune.manifest import Manifest, read_manifest, versions
from diffprune.pruned import SAVED, Origin, baked, reloaded, require_reproducible, twin_of
from diffprune.quantized import PRECISIONS
from diffprune.shipping import LATENCY_FILES, measured, measured_networks
from diffprune.stored import TRAINED, dense_of, load_run
from diffprune.weights import named_weights
from export.drafts import sha256_of
from export.sessions import read_model
from export.statistics import ratio_interval, widened

REPEATS = 1.05
"""Two measurements of the same files agree when their intervals lie no further apart than this factor: on a shared
machine, interleaved runs of one pair came out up to 4.3 % apart."""

NETWORKS = (".onnx", ".onnx.data", ".safetensors")
"""Ends of names that somebody could take for a network of the run."""

SAME_MACHINE = {"cpu": ("cpu", "isa", "cores", "onnxruntime"), "cuda": ("gpu", "torch")}


@dataclass(frozen=True)
class Check:
    """One thing that was checked: what was found, or why it does not hold (what, where, effect, fix).

    What is `skipped` cannot be checked here; `found` says why.
    """

    name: str
    found: str = ""
    failure: str | None = None
    skipped: bool = False


class _Skipped(Exception):
    """Why something cannot be checked here."""


def verify(run: str | Path) -> Iterator[Check]:
    """Check after check of the folder of a run, each as soon as it is done; a failed one does not stop the others.

    Imports and runs the user's factory, if that is what the run's settings name: verify only runs that you trust.

    Raises:
        BadRun: no such run, or its manifest is damaged.
    """
    folder = Path(run)
    manifest = read_manifest(folder)
    config, origin = manifest.config, manifest.origin
    yield _check("files", partial(_unchanged, folder, manifest))
    try:
        network = reloaded(folder, config, origin)
    except Exception as error:  # as in _check
        yield _failed("network", error)
    else:
        yield Check("network", f"{SAVED} fits {config.model}")
        yield _check("parity, dense.onnx", partial(_dense_parity, folder, config, origin))
        for name, inside in baked(config, origin).items():
            for file in (folder / name, *([twin_of(folder / name)] if config.static_twin else [])):
                yield _check(f"parity, {file.name}", partial(_parity, file, network, origin, inside))
        yield _check("written again", partial(_again, network, manifest))
    for precision in PRECISIONS:
        if (folder / f"pruned-{precision}.onnx").is_file():
            yield _check(f"source, pruned-{precision}.onnx", partial(_source, folder, f"pruned-{precision}.onnx"))
    for device in ("cpu", "cuda") if config.latency_device == "cuda" else ("cpu",):
        where = "" if device == "cpu" else f", {device}"
        yield _check(f"report{where}", partial(_consistent, folder, manifest, device))
        yield _check(f"speed-up{where}", partial(_speed, folder, manifest, device))


def _check(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, check())
    except _Skipped as reason:
        return Check(name, str(reason), skipped=True)
    except Exception as error:  # files of a stranger's can fail in every way, and the next check still tells something
        return _failed(name, error)


def _failed(name: str, error: Exception) -> Check:
    return Check(name, failure=f"{type(error).__name__}: {error}")


def _unchanged(folder: Path, manifest: Manifest) -> str:
    """Every file is there with the bytes it had, and no network beside them or below."""
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    missing = [name for name in manifest.files if name not in there]
    changed = [name for name, digest in manifest.files.items() if name in there and sha256_of(there[name]) != digest]
    strange = [name for name in there if name.lower().endswith(NETWORKS) and name not in manifest.files]
    if missing or changed or strange:
        facts = {"missing": missing, "changed": changed, "not listed": strange}
        wrong, all_ = len(missing) + len(changed) + len(strange), len({*manifest.files, *strange})
        raise NotVerified(
            f"{wrong} of {all_} files are not those that were written",
            at="; ".join(f"{how}: {', '.join(names)}" for how, names in facts.items() if names),
            effect="what was measured and checked in the run says nothing about these files",
            fix="copy the run again from where it was made, or run diffprune compress with its config.toml",
        )
    return f"{len(manifest.files)} files have the sha256 that manifest.json lists"


def _parity(file: Path, network: nn.Module, origin: Origin, inside: export.Preprocessing | None) -> str:
    parity = export.check_parity(file, network, origin.example, preprocessing=inside)
    return f"at most {parity.worst:.1e} of the largest output away from the network"


def _dense_parity(folder: Path, config: Config, origin: Origin) -> str:
    if not (folder / TRAINED).is_file() and not named_weights(config.weights):
        raise _Skipped("its weights are not part of the run: what it computes cannot be told")
    return _parity(folder / "dense.onnx", dense_of(folder, config, origin), origin, None)


def _source(folder: Path, name: str) -> str:
    """A smaller file says which float32 file it was made from."""
    said = {entry.key: entry.value for entry in read_model(folder / name).metadata_props}
    made_from, files = said.get("float32_sha256"), [folder / "pruned.onnx"]
    files += [path for path in (folder / "pruned.onnx.data",) if path.is_file()]
    if made_from != sha256_of(*files):
        raise NotVerified(
            f"it says that it was made from a file with sha256 {str(made_from)[:12]}, which pruned.onnx has not",
            at=str(folder / name),
            effect="what was measured of it says nothing about this pruned network",
            fix="run diffprune quantize again",
        )
    return "made from pruned.onnx, as its own metadata say"


def _again(network: nn.Module, manifest: Manifest) -> str:
    here = versions()
    made = manifest.versions.items()
    other = [f"{name} {version} (here {here.get(name)})" for name, version in made if here.get(name) != version]
    known = f"they were written with {', '.join(other)}: install those versions and verify again" if other else ""
    count = require_reproducible(network, manifest.config, manifest.origin, manifest.files, known=known)
    return f"{count} ONNX file{'s' * (count > 1)} from {SAVED}, the same bytes"


def _consistent(folder: Path, manifest: Manifest, device: str = "cpu") -> str:
    """The latency in report.json is that of the file of samples, and both follow from these."""
    file = LATENCY_FILES[device]
    report, stored = (_json(folder / name) for name in ("report.json", file))
    try:
        dense, small = (np.array(stored[which]["samples"], np.float64) for which in ("dense", "small"))
        noise = export.Interval(*(stored["noise"][key] for key in ("value", "low", "high")))
        ratio = widened(ratio_interval(dense, small, seed=manifest.config.seed), noise)
        speed = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high}
        medians = {"dense_ms": float(np.median(dense)), "pruned_ms": float(np.median(small))}
        told = {"report.json": (report["latency"][device], speed | medians), file: (stored, speed)}
        wrong = [
            f"{name} says {key} {claim[key]:.6g}, the samples {value:.6g}"
            for name, (claim, numbers) in told.items()
            for key, value in numbers.items()
            if not np.isclose(claim[key], value, rtol=1e-6, atol=0)
        ]
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise _unreadable(folder, f"report.json and {file}", error) from error
    if wrong:
        raise NotVerified(
            f"{len(wrong)} numbers do not follow from the samples that were measured",
            at="; ".join(wrong),
            effect="the run claims what was not measured",
            fix=f"believe the samples in {file}, or measure again with diffprune bench",
        )
    return f"its latencies follow from the {len(dense)} samples of each network in {file}"


def _speed(folder: Path, manifest: Manifest, device: str = "cpu") -> str:
    """The claimed speed-up and the one measured here, now, agree; on another machine both are told."""
    file = LATENCY_FILES[device]
    stored = _json(folder / file)
    try:
        claim = export.Interval(*(float(stored[key]) for key in ("speedup", "low", "high")))
        made = {key: stored["machine"][key] for key in SAME_MACHINE[device]}
    except (LookupError, TypeError, ValueError) as error:
        raise _unreadable(folder, file, error) from error
    if device == "cuda" and not torch.cuda.is_available():
        raise _Skipped(f"claimed {_range(claim)} on {made['gpu']}; there is no GPU here to measure it on")
    found = measured(folder, manifest.config) if device == "cpu" else _measured_again(folder, manifest.config)
    here = found.machine.as_dict()
    told = f"claimed {_range(claim)}, here {_range(export.Interval(found.speedup, found.low, found.high))}"
    warned = "".join(f"\n        warning: {text}" for text in found.warnings)
    if any(here[key] != value for key, value in made.items()):
        elsewhere = f"{told}, on another machine: the claim was made on {', '.join(map(str, made.values()))}{warned}"
        if claim.low > 1 and found.low <= 1:
            raise NotVerified(
                f"the pruned network is not measurably faster here: {elsewhere}",
                at=f"{file}; the dense and the pruned network, {found.dense.setting}, {found.machine}",
                effect="on this machine pruning gained no time",
                fix="verify again while nothing else runs; if it stays so, compress for this machine",
            )
        return elsewhere
    if claim.low > found.high * REPEATS or found.low > claim.high * REPEATS:
        raise NotVerified(
            f"the speed-up does not come out again: {told}{warned}",
            at=f"{file}; the dense and the pruned network, {found.dense.setting}, {found.machine}",
            effect="the claim does not hold on the kind of machine that it was made on",
            fix="verify again while nothing else runs; if it stays so, report what is measured here",
        )
    return f"{told}{warned}"


def _measured_again(folder: Path, config: Config) -> export.Comparison:
    stored = load_run(folder)
    return measured_networks(stored.dense, stored.pruned, stored.example, config)


def _range(ratio: export.Interval) -> str:
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path.parent, path.name, error) from error


def _unreadable(folder: Path, names: str, error: Exception) -> NotVerified:
    return NotVerified(
        f"the claimed latency cannot be read from {names}: {type(error).__name__}: {error}",
        at=str(folder),
        effect="there is nothing that a measurement could be held against",
        fix="copy the run again from where it was made",
    )
