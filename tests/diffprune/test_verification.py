"""A run is verified: what is as it was passes, and whatever was changed, damaged or claimed wrongly is found."""

import json
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from newcomer import MODULE, typed, working_in
from onnx import numpy_helper

import export
import surgery
from diffprune import shipping, verification
from diffprune.config import config_from
from diffprune.errors import BadRun
from diffprune.manifest import list_too, read_manifest, write_manifest
from diffprune.models import load_model
from diffprune.pruned import Origin
from diffprune.shipping import write_networks
from diffprune.verification import Check, verify
from export.statistics import ratio_interval, widened

ONNX = ("pruned", "pruned-static", "pruned-uint8", "pruned-uint8-static")
CHECKS = ["files", "network", *(f"parity, {name}.onnx" for name in ONNX), "written again", "report", "speed-up"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with working_in(tmp_path_factory.mktemp("newcomer")) as folder:
        yield folder


@pytest.fixture(scope="module")
def run(here: Path) -> Path:
    """A run with everything that can be asked for, started with absolute paths."""
    words = f"--model {MODULE}:colour --data npz:{here}/colour.npz --epochs 0 --macs 0.5 --round-to 1 --license mit"
    asked = f"compress {words} --static-twin --preprocessing --output {here}/runs/one"
    outcome = typed(*asked.split())
    assert outcome.code == 0, outcome.err
    return here / "runs/one"


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def quiet(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine measures what was claimed: what is measured on a busy one is no subject of a test."""
    told = json.loads((run / "latency.json").read_text())
    here = SimpleNamespace(**{key: told[key] for key in ("speedup", "low", "high")}, warnings=("busy",))
    here.machine = export.this_machine()
    monkeypatch.setattr(verification, "measured", lambda *_: here)


def test_the_claim_is_dense_over_pruned_as_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(export, "compare", lambda *files, **options: asked.append((files, options)))
    settings = {"model": "a:b", "data": "digits", "macs": 0.5, "output": "o", "threads": 3, "latency_batch": 8}
    shipping.measured(tmp_path, config_from(settings))
    ((files, options),) = asked
    assert [file.name for file in files] == ["dense.onnx", "pruned.onnx"]
    assert (options["threads"], options["batch"]) == (3, 8)


def edit(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def sealed_again(folder: Path) -> None:
    """As somebody would who wants to hide what was changed."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.config, manifest.origin)


def failed(checks: Iterator[Check]) -> dict[str, str]:
    return {check.name: check.failure for check in checks if check.failure is not None}


def test_an_untouched_run_passes(run: Path, quiet: None) -> None:
    outcome = typed("verify", run)
    assert outcome.code == 0, outcome.out
    assert [line[6:40].strip() for line in outcome.out.splitlines() if line.startswith("pass  ")] == CHECKS
    assert "FAIL" not in outcome.out
    assert "warning: busy" in outcome.out
    assert outcome.out.endswith("not checked: parity, dense.onnx\n\nall else holds\n"), "its weights lie elsewhere"


def test_every_changed_byte_is_found(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 13
    for name in names:
        content = (folder / name).read_bytes()
        for at in {0, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1}:
            (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            if name == "manifest.json":
                with pytest.raises(BadRun, match=r"manifest\.json is damaged"):
                    next(verify(folder))
            else:
                first = next(verify(folder))
                assert first.failure is not None
                assert f"changed: {name}" in first.failure
        (folder / name).write_bytes(content)
    assert next(verify(folder)) == Check("files", "12 files have the sha256 that manifest.json lists")


def test_a_missing_and_a_cut_file_are_named(folder: Path) -> None:
    (folder / "dense.onnx").unlink()
    (folder / "log.jsonl").write_bytes(b"")
    failure = next(verify(folder)).failure
    assert failure is not None
    assert [line.split()[0] for line in failure.splitlines()[1:]] == ["at", "effect", "fix"]
    assert "2 of 12 files" in failure
    assert "missing: dense.onnx; changed: log.jsonl" in failure


def test_a_file_of_another_network_is_found_even_with_a_new_manifest(folder: Path, quiet: None) -> None:
    model = onnx.load(folder / "pruned-static.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, folder / "pruned-static.onnx")
    sealed_again(folder)
    outcome = typed("verify", folder)
    assert outcome.code == 1
    assert "2 checks failed: parity, pruned-static.onnx, written again" in outcome.out
    assert "the file is wrong by" in outcome.out
    assert "at      pruned-static.onnx: sha256" in outcome.out


def test_damaged_files_do_not_stop_the_other_checks(
    folder: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "require_reproducible", lambda *_, known: 4)
    (folder / "pruned.onnx").write_bytes(b"no network")
    (folder / "report.json").write_text("[")
    found = failed(verify(folder))
    assert found.keys() == {"files", "parity, pruned.onnx", "report"}
    assert "cannot load the file" in found["parity, pruned.onnx"]
    assert "cannot be read from report.json" in found["report"]
    (folder / "dense.safetensors").write_bytes(b"cut off")
    found = failed(verify(folder))
    assert found.keys() == {"files", "parity, dense.onnx", "parity, pruned.onnx", "report"}
    assert found["parity, dense.onnx"].startswith("BadWeights: the file is damaged")
    (folder / "pruned.safetensors").write_bytes(b"no weights")
    found = failed(verify(folder))
    assert found.keys() == {"files", "network", "report"}


def test_files_that_are_none_and_noise_of_zero_fail_as_any_damage(folder: Path, quiet: None) -> None:
    (folder / "report.html").unlink()
    (folder / "report.html").symlink_to("gone")
    (folder / "pruned.onnx").unlink()
    (folder / "pruned.onnx").mkdir()
    edit(folder / "latency.json", lambda stored: stored["noise"].update(low=0))
    found = failed(verify(folder))
    assert {"files", "parity, pruned.onnx", "report"} <= found.keys()
    assert "missing: " in found["files"]
    assert "ZeroDivisionError" in found["report"]


@pytest.mark.parametrize("key", ["speedup", "low", "high", "dense_ms", "pruned_ms"])
def test_a_claim_that_does_not_follow_from_the_samples_is_found(folder: Path, key: str) -> None:
    edit(folder / "report.json", lambda report: report["latency"]["cpu"].update({key: 9.75}))
    manifest = read_manifest(folder)
    with pytest.raises(verification.NotVerified, match=rf"report\.json says {key} 9\.75, the samples"):
        verification._consistent(folder, manifest)


def test_a_claim_in_latency_json_is_held_against_its_samples_too(folder: Path) -> None:
    edit(folder / "latency.json", lambda stored: stored.update(speedup=9.75, high=10.0))
    with pytest.raises(verification.NotVerified, match=r"latency\.json says speedup 9\.75, the samples .*says high 10"):
        verification._consistent(folder, read_manifest(folder))


def test_a_claim_with_invented_samples_is_found_by_measuring(folder: Path) -> None:
    """Ten times the speed, without a contradiction anywhere in the folder."""

    def tenfold(stored: dict[str, Any]) -> None:
        stored["dense"]["samples"] = [10 * sample for sample in stored["dense"]["samples"]]
        dense, small = (np.array(stored[which]["samples"]) for which in ("dense", "small"))
        noise = export.Interval(*(stored["noise"][name] for name in ("value", "low", "high")))
        ratio = widened(ratio_interval(dense, small, seed=0), noise)
        claim = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high}
        stored.update(claim)
        edit(
            folder / "report.json",
            lambda report: report["latency"]["cpu"].update(claim, dense_ms=float(np.median(dense))),
        )

    edit(folder / "latency.json", tenfold)
    sealed_again(folder)
    manifest = read_manifest(folder)
    assert "follow from the" in verification._consistent(folder, manifest)
    with pytest.raises(verification.NotVerified, match=r"the speed-up does not come out again: claimed .*, here "):
        verification._speed(folder, manifest)


def test_on_another_machine_both_numbers_are_told(
    folder: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(stored: dict[str, Any]) -> None:
        stored["machine"]["cpu"] = "Example 9000"
        stored.update(speedup=99.0, low=98.0, high=100.0)

    edit(folder / "latency.json", elsewhere)
    here = verification.measured(folder, None)
    here.speedup, here.low, here.high, here.dense = 1.2, 1.1, 1.3, SimpleNamespace(setting="batch 1")
    monkeypatch.setattr(verification, "measured", lambda *_: here)
    told = verification._speed(folder, read_manifest(folder))
    assert "claimed 99.00x (98.00 to 100.00), here 1.20x (1.10 to 1.30)" in told
    assert "on another machine: the claim was made on Example 9000" in told
    here.low = 0.99
    with pytest.raises(verification.NotVerified, match="the pruned network is not measurably faster here"):
        verification._speed(folder, read_manifest(folder))


@pytest.mark.parametrize("name", ["dense.safetensors", "x.ONNX", "sub/x.onnx", "pruned.onnx.data"])
def test_whatever_could_be_taken_for_a_network_is_named(name: str, folder: Path) -> None:
    manifest = read_manifest(folder)
    assert name not in manifest.files
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"not ours")
    with pytest.raises(verification.NotVerified, match=f"not listed: {name}"):
        verification._unchanged(folder, manifest)


def test_a_network_that_nobody_listed_is_named(folder: Path) -> None:
    manifest = read_manifest(folder)
    shutil.copy(folder / "pruned.onnx", folder / "pruned-int8.onnx")
    with pytest.raises(verification.NotVerified, match=r"1 of \d+ files are not .*\n.*not listed: pruned-int8.onnx"):
        verification._unchanged(folder, manifest)
    list_too(folder, ["pruned-int8.onnx"])
    listed = read_manifest(folder)
    assert listed.files.items() - manifest.files.items() == {("pruned-int8.onnx", manifest.files["pruned.onnx"])}
    assert f"{len(manifest.files) + 1} files have the sha256" in verification._unchanged(folder, listed)
    (folder / "pruned-int8.onnx").write_bytes(b"damaged")
    with pytest.raises(verification.NotVerified, match=r"changed: pruned-int8.onnx"):
        verification._unchanged(folder, listed)


def test_other_versions_explain_other_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(folder)
    told: list[str] = []
    monkeypatch.setattr(verification, "require_reproducible", lambda *_, known: told.append(known) or 1)
    verification._again(torch.nn.Identity(), manifest)
    monkeypatch.setattr(verification, "versions", lambda: {**manifest.versions, "onnx": "0.1"})
    verification._again(torch.nn.Identity(), manifest)
    assert told[0] == ""
    assert f"written with onnx {manifest.versions['onnx']} (here 0.1): install those versions" in told[1]


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda folder: shutil.rmtree(folder), "cannot be read: No such file"),
        (lambda folder: (folder / "manifest.json").unlink(), "cannot be read: No such file"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"), "is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "is damaged: 'sha256'"),
        (lambda folder: edit(folder / "manifest.json", lambda m: m.update(format="x")), "is damaged: its format is"),
        (lambda folder: edit(folder / "manifest.json", lambda m: m.update(seed=9)), "is damaged: it was changed"),
    ],
)
def test_what_is_no_run_is_refused(folder: Path, damage: Callable[[Path], None], fact: str) -> None:
    damage(folder)
    outcome = typed("verify", folder)
    assert outcome.code == 2
    assert outcome.out == ""
    assert f"BadRun: manifest.json {fact}" in outcome.err
    assert [line.split()[0] for line in outcome.err.splitlines()[-3:]] == ["at", "effect", "fix"]


def test_a_run_that_cannot_be_reproduced_is_not_shipped(here: Path) -> None:
    """A number that is drawn when the network is built is nowhere in its weights."""
    words = f"compress --model {MODULE}:drawn --data npz:colour.npz --epochs 0 --macs 0.5 --round-to 1"
    outcome = typed(*words.split(), "--output", "runs/drawn")
    assert outcome.code == 2
    assert f"NotReproducible: what {MODULE}:drawn builds from pruned.safetensors is not the network" in outcome.err
    assert [line.split()[0] for line in outcome.err.splitlines()[-4:-1]] == ["at", "effect", "fix"]
    assert outcome.err.splitlines()[-1].startswith("what was trained is in runs/.drawn.unfinished-")
    assert not (here / "runs/drawn").exists()


def test_what_is_saved_is_what_is_exported(here: Path, tmp_path: Path) -> None:
    """Channels-last weights would give another graph, and they are contiguous once they are saved."""
    told = {"model": f"{MODULE}:last", "data": "npz:colour.npz", "macs": 0.5, "output": "out"}
    origin = Origin(3, None, {"input_shape": "[3, 8, 8]", "mean": "[0, 0, 0]", "std": "[1, 1, 1]"})
    dense = load_model(told["model"], num_classes=3).eval()
    graph = surgery.trace(dense, origin.example)
    pruned = surgery.cut(dense, graph, {})
    assert pruned[0].weight.is_contiguous(memory_format=torch.channels_last)
    write_networks(tmp_path, config_from(told), origin, dense=dense, pruned=pruned)
    again = export.to_onnx(pruned, origin.example, tmp_path / "again.onnx", metadata=origin.metadata)
    assert (tmp_path / "again.onnx").read_bytes() != (tmp_path / "pruned.onnx").read_bytes()
    assert again.parity.worst < 1e-5


def test_a_factory_that_has_changed_since_is_found(folder: Path, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = import_module(MODULE)
    monkeypatch.setattr(nets, "colour", nets.few)
    found = failed(verify(folder))
    assert found.keys() == {"network"}
    assert found["network"].startswith("BadFile: ")


def test_no_file_names_a_place_on_this_machine(here: Path, run: Path) -> None:
    """Although the run was started with absolute paths."""
    places = (run, here, Path.home(), Path(__file__).parents[2], Path(torch.__file__).parents[2])
    for path in run.iterdir():
        content = path.read_bytes()
        assert [place for place in places if str(place).encode() in content] == [], path.name


def test_unknown_normalisation_cannot_be_baked_in(here: Path) -> None:
    np.savez(
        here / "plain.npz",
        **{f"{side}_images": np.random.default_rng(0).random((8, 3, 8, 8), np.float32) for side in ("train", "val")},
        **{f"{side}_labels": np.arange(8) % 3 for side in ("train", "val")},
    )
    words = f"compress --model {MODULE}:colour --data npz:plain.npz --macs 0.5 --preprocessing --output p"
    outcome = typed(*words.split())
    assert outcome.code == 2
    assert "BadConfig: the data does not say how its pixels were normalised" in outcome.err
    assert not (here / "p").exists()
