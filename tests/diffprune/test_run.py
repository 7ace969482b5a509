"""One real run, as it is typed, and everything that is promised of its folder."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from newcomer import MODULE, Outcome, typed, working_in
from safetensors.torch import load_file
from torch import nn

import export
import surgery
from diffprune.config import load_config
from diffprune.data import load_data
from diffprune.manifest import read_manifest
from diffprune.models import load_model
from diffprune.pruned import about, built
from diffprune.recover import accuracy
from diffprune.report import count, milliseconds, percent
from diffprune.stored import load_run
from export.clocks import clock_for
from export.drafts import sha256_of
from export.settings import Settings

FILES = {
    "MODEL_CARD.md",
    "config.toml",
    "dense.onnx",
    "dense.safetensors",
    "latency.json",
    "log.jsonl",
    "manifest.json",
    "pruned.onnx",
    "pruned.safetensors",
    "report.html",
    "report.json",
}
KEYS = (
    *(f"{what}.{which}" for what in ("accuracy", "macs", "params") for which in ("dense", "pruned")),
    *(f"latency.cpu.{what}" for what in ("dense_ms", "pruned_ms", "speedup", "low", "high")),
    *("equivalence.masked_vs_cut", "equivalence.cut_vs_onnx", "parity.dense", "budget.asked", "budget.reached"),
    *("machine.cpu", "machine.cores", "machine.onnxruntime"),
)
COMMAND = (
    f"compress --model {MODULE}:factory --data digits --image-size 8 --batch 32 --parent-epochs 1 --parent-lr 0.2 "
    "--epochs 1 --macs 0.5 --lr 0.05 --seed 3 --output runs/one"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with working_in(tmp_path_factory.mktemp("newcomer")) as folder:
        yield folder


@pytest.fixture(scope="module")
def first(here: Path) -> Outcome:
    """The run, whose alignment is probed: 4 is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "probe_step", lambda **how: export.Step(4, {64: 1.0}, {4: 0.0}, "probe"))
        outcome = typed(*COMMAND.split())
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def folder(first: Outcome, here: Path) -> Path:
    return here / "runs/one"


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def at(report: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        report = report[part]
    return report


def dense_network() -> torch.nn.Module:
    return load_model(f"{MODULE}:factory", num_classes=10)


def test_the_folder_holds_the_files_and_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parent.iterdir()} == {"one"}


def test_the_report_has_every_key(report: dict[str, Any]) -> None:
    for key in KEYS:
        assert at(report, key) is not None, key
    assert report["budget"]["asked"] == 0.5
    assert report["budget"]["round_to"] == 4
    assert report["budget"]["reopened"] >= 0
    assert report["alignment"] == {"multiple": 4, "source": "probe", "evidence": {"64": 1.0}, "misfit": {"4": 0.0}}
    assert 0 < report["budget"]["reached"] <= 0.5
    assert report["budget"]["reached"] > 0.49 or report["budget"]["note"] in report["warnings"]
    assert report["macs"]["pruned"] <= 0.5 * report["macs"]["dense"]
    assert report["latency"]["cpu"]["low"] <= report["latency"]["cpu"]["speedup"] <= report["latency"]["cpu"]["high"]
    one = clock_for(Settings("cpu", 1, 1, 0)).name
    assert (report["latency"]["cpu"]["clock"], report["latency"]["cpu"]["batch"]) == (one, 1)
    assert all(group["kept"] % 4 == 0 for group in report["groups"])


def test_the_onnx_files_compute_what_the_networks_compute(folder: Path) -> None:
    images = next(iter(load_data("digits", image_size=8).val))[0][:9]
    small = surgery.load(folder / "pruned.safetensors", dense_network).eval()
    dense = load_model(f"{MODULE}:factory", weights=str(folder / "dense.safetensors"), num_classes=10).eval()
    for name, network in (("pruned", small), ("dense", dense)):
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"input": images.numpy()})
        with torch.no_grad():
            expected = network(images).numpy()
        assert np.abs(expected).max() > 0.1
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_accuracies_are_those_of_the_saved_networks(folder: Path, report: dict[str, Any]) -> None:
    held_out = load_data("digits", image_size=8).val
    small = surgery.load(folder / "pruned.safetensors", dense_network)
    dense = load_model(f"{MODULE}:factory", weights=str(folder / "dense.safetensors"), num_classes=10)
    assert report["accuracy"]["pruned"] == accuracy(small, held_out)[0]
    assert report["accuracy"]["dense"] == accuracy(dense, held_out)[0]
    assert report["accuracy"]["dense"] > 0.3, "the parent has learned, with its own learning rate"
    assert report["params"]["pruned"] == sum(p.numel() for p in small.parameters())


def test_the_onnx_file_says_what_it_is(folder: Path, report: dict[str, Any]) -> None:
    found = {entry.key: entry.value for entry in onnx.load(folder / "pruned.onnx").metadata_props}
    assert json.loads(found["labels"]) == [str(digit) for digit in range(10)]
    assert json.loads(found["kept"]) == {g["name"]: [g["kept"], g["units"]] for g in report["groups"]}
    assert json.loads(found["input_shape"]) == [1, 8, 8]
    assert found["source_model"] == found["base_model"] == f"{MODULE}:factory"
    assert found["license"] == "unknown"
    assert len(json.loads(found["mean"])) == len(json.loads(found["std"])) == 1
    dense = {entry.key for entry in onnx.load(folder / "dense.onnx").metadata_props}
    assert "kept" not in dense
    assert "labels" in dense


class Page(HTMLParser):
    """The text of a page; every tag has to be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_the_numbers_and_needs_nothing_else(folder: Path, report: dict[str, Any]) -> None:
    page = (folder / "report.html").read_text()
    text = Page(page).text
    latency = report["latency"]["cpu"]
    for part in (
        report["verdict"],
        percent(report["accuracy"]["pruned"]),
        count(report["macs"]["pruned"]),
        milliseconds(latency["pruned_ms"]),
        f"[{latency['low']:.2f}, {latency['high']:.2f}]",
        *(group["name"] for group in report["groups"]),
    ):
        assert part in text
    assert "http" not in page
    assert '<path class="loss"' in page, "the training curve"


def test_the_log_has_every_step_and_stage(folder: Path, report: dict[str, Any]) -> None:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    assert [{k: v for k, v in step.items() if k != "steps"} for step in steps] == report["curve"]
    stages = [event["phase"] for event in events if "loss" not in event]
    said = [event["text"] for event in events if event["phase"] == "warning"]
    assert said == [text for text in report["warnings"] if text in said]
    stages = [stage for stage in stages if stage != "warning"]
    assert stages == ["probe", "dense", "cut", "recalibrate", "done", "export", "measure", "finished"]
    assert list(dict.fromkeys(event["phase"] for event in steps)) == ["parent", "search", "recover"]


def test_every_file_may_be_read_by_others(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if not path.stat().st_mode & 0o044] == []


def test_the_code_on_the_card_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"^```python\n(.*?)^```", (folder / "MODEL_CARD.md").read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(block, "MODEL_CARD.md", "exec"), {})


def test_the_terminal_shows_the_table_and_each_warning_once(first: Outcome, report: dict[str, Any]) -> None:
    assert "training the dense parent: step" in first.err
    assert "searching: step" in first.err
    assert report["verdict"] in first.out
    assert "runs/one/report.html" in first.out
    table = first.out.splitlines()[: first.out.splitlines().index(report["verdict"])]
    assert max(map(len, table)) <= 80
    for word in ("Parameters", "MACs", "File size", "Accuracy", "Latency, cpu", "450 held-out examples"):
        assert any(word in line for line in table)
    warnings = [line for line in (first.out + first.err).splitlines() if line.startswith("warning")]
    asked = report["warnings"] + report["latency"]["cpu"]["warnings"]
    assert sorted(warnings) == sorted(f"warning: {text}" for text in asked)


def test_the_settings_in_another_process_give_the_same_bytes(folder: Path, here: Path, report: dict[str, Any]) -> None:
    settings = load_config(folder / "config.toml")
    assert settings.round_to == 4
    assert settings.parent_lr == 0.2
    quick = f"import runpy; runpy.run_path({str(Path(__file__).parents[1] / 'conftest.py')!r})"
    code = f"{quick}; from diffprune import cli, shipping; shipping.MEASURE_SECONDS = 0.2; cli.main()"
    words = ("compress", "--config", "runs/one/config.toml", "--output", "runs/two")
    subprocess.run([sys.executable, "-c", code, *words], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    again = here / "runs/two"
    for name in ("dense.safetensors", "pruned.safetensors", "dense.onnx", "pruned.onnx"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    repeated = json.loads((again / "report.json").read_text())
    for key in ("accuracy", "macs", "params", "budget", "groups", "curve", "equivalence"):
        assert repeated[key] == report[key], key
    assert load_config(again / "config.toml") == settings.model_copy(update={"output": "runs/two"})


def test_a_network_with_more_logits_than_labels_ships_without_names(here: Path, first: Outcome) -> None:
    """And its parent's weights are taken from a file, so that no second dense file is written."""
    torch.manual_seed(0)
    words = f"--model {MODULE}:many --data digits --image-size 8 --epochs 0 --macs 0.6 --round-to 1".split()
    outcome = typed("compress", *words, "--output", "runs/many")
    assert outcome.code == 0, outcome.err
    assert "the data names 10 of the 12 logits" in outcome.err
    assert "guessing" in outcome.err, "a network that nobody trained is called that"
    assert "guessing" not in outcome.out, "once is enough"
    assert not (here / "runs/many/dense.safetensors").exists()
    found = {entry.key for entry in onnx.load(here / "runs/many/pruned.onnx").metadata_props}
    assert "labels" not in found


def test_the_saved_network_is_exported_again(here: Path, folder: Path) -> None:
    outcome = typed(
        "export",
        "runs/one/pruned.safetensors",
        "--model",
        f"{MODULE}:factory",
        "--input",
        "1,8,8",
        "--output",
        "e.onnx",
    )
    assert outcome.code == 0, outcome.err
    assert "largest relative difference" in outcome.out
    old, new = (onnx.load(path).graph for path in (folder / "pruned.onnx", here / "e.onnx"))
    assert [node.op_type for node in old.node] == [node.op_type for node in new.node]
    assert sorted(path.name for path in here.glob("e*")) == ["e.card.md", "e.manifest.json", "e.onnx"]


NORMALISED = ["--mean", "0.25", "--std", "0.5"]


@pytest.mark.parametrize("baked", [[*NORMALISED, "--no-preprocessing"], NORMALISED], ids=["said", "pixels"])
def test_an_exported_file_has_a_card_whose_code_runs_and_a_manifest(
    here: Path, folder: Path, baked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    (here / "names.txt").write_text("".join(f"digit {i}\n" for i in range(10)))
    words = f"--model {MODULE}:factory --input 1,8,8 --labels names.txt --license mit --static-twin --output f.onnx"
    outcome = typed("export", "runs/one/pruned.safetensors", *words.split(), *baked)
    assert outcome.code == 0, outcome.err
    listed = json.loads((here / "f.manifest.json").read_text())
    assert listed["files"].keys() == {"f.onnx", "f-static.onnx", "f.card.md"}
    for name, entry in listed["files"].items():
        assert entry == {"sha256": sha256_of(here / name), "bytes": (here / name).stat().st_size}
    assert listed["saved"] == {"name": "pruned.safetensors", "sha256": sha256_of(folder / "pruned.safetensors")}
    assert listed["versions"]["torch"] == torch.__version__
    inside = {entry.key: entry.value for entry in onnx.load(here / "f.onnx").metadata_props}
    assert json.loads(inside["labels"])[9] == "digit 9"
    card = (here / "f.card.md").read_text()
    assert 'license: "mit"' in card
    assert "`digit 9`" in card
    assert ("uint8 (batch, height, width, channels), normalised inside" in card) == (baked == NORMALISED)
    assert ("inside this file" in inside.get("preprocessing", "")) == (baked == NORMALISED)
    assert json.loads(inside["mean"]) == [0.25]
    assert "mean = [0.25]" in card
    (block,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    exec(compile(block, "f.card.md", "exec"), {})
    assert int(capsys.readouterr().out.strip("[]\n")) in range(10)
    for path in here.glob("f*"):
        path.unlink()


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ("--output f.onnx --mean nan,0.5 --std 1,1 --no-preprocessing", "do not normalise 1 channels"),
        ("--output f.onnx --mean 0.5 --std 0 --no-preprocessing", "do not normalise 1 channels"),
        ("--output runs/one/pruned.safetensors", "name a file that ends in .onnx"),
    ],
)
def test_an_export_that_would_say_or_destroy_the_wrong_thing(here: Path, folder: Path, words: str, fact: str) -> None:
    before = sha256_of(folder / "pruned.safetensors")
    outcome = typed("export", "runs/one/pruned.safetensors", *f"--model {MODULE}:factory --input 1,8,8 {words}".split())
    assert outcome.code == 2
    assert fact in outcome.err
    assert not list(here.glob("f.*"))
    assert sha256_of(folder / "pruned.safetensors") == before


def test_an_absolute_path_of_weights_stays_here() -> None:
    assert about("a:b", "/home/me/w.safetensors", "mit", (1, 8, 8))["base_weights"] == "w.safetensors"
    assert about("a:b", "w/w.safetensors", "mit", (1, 8, 8))["base_weights"] == "w/w.safetensors"


def test_a_file_that_comes_out_otherwise_the_second_time_is_not_shipped(
    here: Path, folder: Path
) -> None:
    words = f"--model {MODULE}:restless --input 1,8,8 --output r.onnx".split()
    outcome = typed("export", "runs/one/pruned.safetensors", *words)
    assert outcome.code == 2, outcome.out
    assert "NotReproducible: 1 of 1 files come out with other bytes" in outcome.err
    assert list(here.glob("*r.onnx*")) == []


def test_a_network_that_began_with_named_weights_is_exported_with_them(
    here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's GoogLeNet and Inception compute something else with them, whatever weights they are given then."""
    asked = []

    def load(spec: str, *, weights: str | None, num_classes: int | None) -> nn.Module:
        asked.append((spec, weights, num_classes))
        return dense_network()

    monkeypatch.setattr("diffprune.models.load_model", load)
    monkeypatch.setattr("diffprune.pruned.load_model", load)
    words = "--model torchvision:googlenet --weights DEFAULT --input 1,8,8 --output g.onnx"
    assert typed("export", "runs/one/pruned.safetensors", *words.split()).code == 0
    manifest = read_manifest(folder)
    built(manifest.config.model_copy(update={"weights": "DEFAULT"}), manifest.origin)
    built(manifest.config.model_copy(update={"weights": "trained.safetensors"}), manifest.origin)
    model, classes = manifest.config.model, manifest.origin.classes
    assert list(dict.fromkeys(asked)) == [
        ("torchvision:googlenet", "DEFAULT", None), (model, "DEFAULT", classes), (model, None, classes)
    ]


def test_the_dense_weights_start_another_run(folder: Path) -> None:
    stored = load_file(folder / "dense.safetensors")
    assert stored.keys() == dense_network().state_dict().keys()


@pytest.mark.parametrize("pair", [True, False])
def test_bench_prints_medians_with_intervals(folder: Path, here: Path, pair: bool) -> None:
    files = ["runs/one/dense.onnx", *(["runs/one/pruned.onnx"] if pair else [])]
    outcome = typed("bench", *files, "--seconds", "0.2", "--json", "bench.json")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    for word in ("median", "95 % interval"):
        assert word in outcome.out
    column = "".join(line.partition(" ")[0] for line in lines)  # a name is folded where the numbers beside it are long
    for file in files:
        assert file in column
    assert max(map(len, lines[:4])) <= 80
    stored = json.loads((here / "bench.json").read_text())
    shown = stored["dense"] if pair else stored
    assert milliseconds(shown["median"]) in outcome.out
    assert len({line for line in lines if line.startswith("warning")}) == outcome.out.count("warning:")
    assert ("compared with" in outcome.out) == pair


def test_bench_has_a_row_for_each_setting(folder: Path, here: Path) -> None:
    words = "bench runs/one/dense.onnx --batch 1,2 --threads 1,2 --seconds 0.1 --json several.json"
    outcome = typed(*words.split())
    assert outcome.code == 0, outcome.err
    rows = [line.split()[:2] for line in outcome.out.splitlines() if " ms " in line]
    assert rows == [["1", "1"], ["1", "2"], ["2", "1"], ["2", "2"]]
    results = json.loads((here / "several.json").read_text())["results"]
    assert [[str(result["threads"]), str(result["batch"])] for result in results] == rows
    assert all(len(result["samples"]) >= 30 for result in results)
    assert "fed: input (2, 1, 8, 8) tensor(float), standard normal" in outcome.out
    assert "measuring 4 of 4: device cpu, threads 2, batch 2" in outcome.err


def test_bench_compares_the_networks_of_a_run_in_torch_too(folder: Path, here: Path) -> None:
    words = "bench runs/one --runtime onnx,eager --batch 3 --seconds 0.1 --json run.json"
    outcome = typed(*words.split())
    assert outcome.code == 0, outcome.err
    assert "dense against pruned" in outcome.out
    first, second = json.loads((here / "run.json").read_text())["results"]
    assert (first["dense"]["runtime"], second["dense"]["runtime"]) == ("onnx", "eager")
    assert second["small"]["inputs"][0]["shape"] == [3, 1, 8, 8]


def test_the_networks_of_a_run_are_those_of_its_files(folder: Path) -> None:
    stored = load_run(folder)
    for model, name in ((stored.dense, "dense"), (stored.pruned, "pruned")):
        assert export.check_parity(folder / f"{name}.onnx", model, stored.example).worst < 1e-4
    assert sum(p.numel() for p in stored.pruned.parameters()) < sum(p.numel() for p in stored.dense.parameters())


def test_the_run_reads_nothing_but_its_settings() -> None:
    """What is not in the settings cannot be in config.toml."""
    tree = ast.parse((Path(__file__).parents[2] / "diffprune/run.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    assert names == ["config", "on_event"]


def test_what_was_trained_outlives_an_error_in_shipping_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise export.ParityFailed("no luck", at="here", effect="nothing", fix="none")

    monkeypatch.setattr("diffprune.shipping.reloaded", full)
    words = f"--model {MODULE}:factory --data digits --image-size 8 --epochs 0 --macs 0.6 --round-to 1".split()
    outcome = typed("compress", *words, "--output", "unlucky/one")
    assert outcome.code == 2
    assert "ParityFailed: no luck" in outcome.err
    (left,) = (here / "unlucky").iterdir()
    assert outcome.err.splitlines()[-1] == f"what was trained is in {left.relative_to(here)}"
    surgery.load(left / "pruned.safetensors", dense_network)


def test_a_trained_parent_outlives_an_error_in_the_search(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*_: object, **__: object) -> None:
        raise export.CannotMeasure("too noisy", at="here", effect="nothing", fix="none")

    monkeypatch.setattr("diffprune.run.compress", noisy)
    words = f"--model {MODULE}:factory --data digits --image-size 8 --epochs 0 --macs 0.6 --round-to 1".split()
    outcome = typed("compress", *words, "--parent-epochs", 1, "--output", "noisy/one")
    assert outcome.code == 2
    (left,) = (here / "noisy").iterdir()
    assert outcome.err.splitlines()[-1] == f"what was trained is in {left.relative_to(here)}"
    load_model(f"{MODULE}:factory", weights=str(left / "dense.safetensors"))


def test_a_frozen_network_has_no_parent_to_train(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.preparation.load_model", lambda *a, **k: load_model(*a, **k).requires_grad_(False))
    words = f"--model {MODULE}:factory --data digits --image-size 8 --epochs 0 --macs 0.6 --round-to 1".split()
    outcome = typed("compress", *words, "--parent-epochs", 1, "--output", "frozen/one")
    assert outcome.code == 2
    assert "BadConfig: every parameter of the network is frozen" in outcome.err
    assert not list((here / "frozen").iterdir())


def test_the_users_data_decides_how_large_batches_are(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise export.CannotMeasure("stop here", at="here", effect="nothing", fix="none")

    monkeypatch.setattr("diffprune.run.compress", stop)
    (here / "pairs_of_mine.py").write_text(
        "import torch\ndef pairs():\n    half = [(torch.randn(8, 1, 8, 8), torch.arange(8))]\n    return half, half\n"
    )
    words = f"--model {MODULE}:factory --data pairs_of_mine:pairs --epochs 0 --macs 0.6 --round-to 1".split()
    outcome = typed("compress", *words, "--batch", 7, "--output", "own/one")
    assert "warning: batches of 7 images were asked for; pairs_of_mine:pairs makes its own" in outcome.err
    assert "makes its own" not in typed("compress", *words, "--output", "own/two").err
