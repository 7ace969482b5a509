"""`diffprune quantize` as it is typed, on a finished run: what it writes, says, refuses and leaves alone."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from newcomer import MODULE, Outcome, typed, working_in

import export
from diffprune import quantizing, verification
from diffprune.data import load_data
from diffprune.errors import NotVerified
from diffprune.manifest import read_manifest
from diffprune.quantized import warnings
from diffprune.report import milliseconds, percent
from export import recipes

COMPRESS = f"compress --model {MODULE}:factory --image-size 8 --batch 100 --round-to 1 --macs 0.6"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A newcomer's folder with a finished run in `finished`."""
    with working_in(tmp_path_factory.mktemp("newcomer")) as folder:
        words = "--data digits --parent-epochs 6 --parent-lr 0.2 --epochs 0 --output finished"
        assert typed(*COMPRESS.split(), *words.split()).code == 0
        yield folder


@pytest.fixture
def run(here: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(here / "finished", tmp_path / "run")


@pytest.fixture(scope="module")
def outcome(here: Path) -> Outcome:
    shutil.copytree(here / "finished", here / "one")
    found = typed("quantize", "one")
    assert found.code == 0, found.err
    return found


@pytest.fixture
def report(outcome: Outcome, here: Path) -> dict[str, Any]:
    return json.loads((here / "one/pruned-int8.json").read_text())


def logits(path: Path, images: torch.Tensor) -> np.ndarray:
    (found,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"input": images.numpy()}
    )
    return found


ADDED = {"pruned-int8.onnx", "pruned-int8.json", "pruned-int8.card.md"}


def test_the_folder_gains_three_files_and_keeps_the_others(outcome: Outcome, here: Path) -> None:
    before = {path.name: path.read_bytes() for path in (here / "finished").iterdir()}
    after = {path.name: path.read_bytes() for path in (here / "one").iterdir()}
    assert after.keys() - before.keys() == ADDED
    old, new = before.pop("manifest.json"), after.pop("manifest.json")
    assert {name: after[name] for name in before} == before
    listed, added = json.loads(old)["files"], json.loads(new)["files"]
    assert {name: added[name] for name in listed} == listed
    assert {name: added[name]["sha256"] for name in added.keys() - listed.keys()} == {
        name: hashlib.sha256(after[name]).hexdigest() for name in ADDED
    }
    read_manifest(here / "one")
    for name in after.keys() - before.keys():
        assert (here / "one" / name).stat().st_mode & 0o044
        for place in (here, Path.home(), Path(__file__).parents[2]):
            assert str(place).encode() not in after[name], name


def test_verify_knows_what_a_smaller_file_was_made_from(outcome: Outcome, here: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(here / "one", tmp_path / "run")
    assert verification._source(folder, "pruned-int8.onnx").startswith("made from pruned.onnx")
    (folder / "pruned-int8.onnx").write_bytes((folder / "pruned.onnx").read_bytes())
    with pytest.raises(NotVerified, match=r"made from a file with sha256 None, which pruned\.onnx has not"):
        verification._source(folder, "pruned-int8.onnx")


def test_the_numbers_are_those_of_the_files(report: dict[str, Any], here: Path) -> None:
    images, labels = (torch.cat(half) for half in zip(*load_data("digits", image_size=8).val, strict=True))
    files = {"dense": "dense.onnx", "pruned": "pruned.onnx", "int8": "pruned-int8.onnx"}
    found = {key: logits(here / "one" / file, images) for key, file in files.items()}
    for key, file in files.items():
        assert report["accuracy"][key] == pytest.approx(np.mean(found[key].argmax(1) == labels.numpy()), abs=0.005)
        assert report["file_bytes"][key] == (here / "one" / file).stat().st_size
    assert report["accuracy"]["examples"] == 450
    assert report["accuracy"]["pruned"] > 0.5, "the network has learned"
    noise, signal = ((array.astype(float) ** 2).sum() for array in (found["int8"] - found["pruned"], found["pruned"]))
    assert report["fidelity"]["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), abs=0.1)
    agreement = np.mean(found["int8"].argmax(1) == found["pruned"].argmax(1))
    assert report["fidelity"]["top1_agreement"] == pytest.approx(agreement, abs=0.005)
    assert report["fidelity"]["examples"] == 450
    assert report["size"] == report["file_bytes"]["int8"]
    for pair in ("dense_pruned", "dense_int8", "pruned_int8"):
        latency = report["latency"][pair]
        assert latency["low"] <= latency["speedup"] <= latency["high"]
        assert len(latency["small"]["samples"]) >= 30


def test_the_file_is_an_int8_file_with_the_metadata_of_the_run(report: dict[str, Any], here: Path) -> None:
    model = onnx.load(here / "one/pruned-int8.onnx")
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found["source_model"] == f"{MODULE}:factory"
    assert json.loads(found["quantization"]) == report["recipe"]
    assert report["recipe"]["target"] == recipes.resolved("x86")
    assert report["recipe"]["examples"] == 256
    assert {t.data_type for t in model.graph.initializer} >= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


def test_the_terminal_shows_a_table_and_each_warning(outcome: Outcome, report: dict[str, Any]) -> None:
    lines = outcome.out.splitlines()
    table = lines[: lines.index("", 1)]
    assert max(map(len, table)) <= 80
    (row,) = (line for line in table if line.startswith("int8 "))
    latency = report["latency"]["dense_int8"]
    for part in (
        percent(report["accuracy"]["int8"]),
        percent(report["fidelity"]["top1_agreement"]),
        f"{report['fidelity']['sqnr_db']:.1f} dB",
        milliseconds(latency["small"]["median"]),
        f"[{latency['low']:.2f}, {latency['high']:.2f}]",
    ):
        assert part in row
    assert "pruned-int8.onnx, compared with dense.onnx, is " in outcome.out
    assert "pruned-int8.onnx, compared with pruned.onnx, is " in outcome.out
    shown = [line for line in lines if line.startswith("warning: ")]
    assert shown == [f"warning: {text}" for text in dict.fromkeys(report["warnings"])]
    assert "calibrating on training images" in outcome.err


def test_data_that_lies_elsewhere_now_is_given(run: Path) -> None:
    config = run / "config.toml"
    config.write_text(config.read_text().replace('data = "digits"', 'data = "imagefolder:gone"'))
    found = typed("quantize", run)
    assert found.code == 2
    assert "BadData: the folder is missing" in found.err
    assert typed("quantize", run, "--data", "digits").code == 0
    assert (run / "pruned-int8.onnx").is_file()


@pytest.mark.parametrize(("key", "told"), [("labels", '["a", "b"]'), ("mean", "[0.5]"), ("std", "[0.5]")])
def test_other_classes_or_another_normalisation_are_refused(run: Path, key: str, told: str) -> None:
    model = onnx.load(run / "pruned.onnx")
    next(entry for entry in model.metadata_props if entry.key == key).value = told
    onnx.save(model, run / "pruned.onnx")
    refused(str(run), f"pruned.onnx says {told}")


def test_images_in_another_order_each_time_are_judged_by_their_own_labels(here: Path) -> None:
    images, labels = (torch.cat(half) for half in zip(*load_data("digits", image_size=8).val, strict=True))
    draw = torch.Generator().manual_seed(0)

    class Shuffled:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            order = torch.randperm(len(labels), generator=draw)
            return iter(zip(images[order].split(100), labels[order].split(100), strict=True))

    files = {key: here / "finished" / f"{key}.onnx" for key in ("dense", "pruned")} | {
        "fp16": here / "finished/pruned.onnx"}
    shuffled = quantizing._judged(files, "fp16", Shuffled(), 1)  # type: ignore[arg-type]
    in_order = quantizing._judged(files, "fp16", load_data("digits", image_size=8).val, 1)
    assert shuffled["accuracy"] == in_order["accuracy"]
    assert shuffled["fidelity"]["top1_agreement"] == 1


def test_its_card_has_the_numbers_and_code_that_runs(
    outcome: Outcome, report: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    card = (here / "one/pruned-int8.card.md").read_text()
    assert f"| {percent(report['accuracy']['int8'])} |" in card
    assert f"| {milliseconds(report['latency']['dense_int8']['small']['median'])} |" in card
    assert "uint8 activations" in card
    assert "`x86-" in card
    (block,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(here / "one")
    exec(compile(block, "card", "exec"), {})
    assert int(capsys.readouterr().out.strip("[]\n")) in range(10)


def test_a_file_that_comes_out_otherwise_the_second_time_is_not_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, quantize = sorted(run.iterdir()), export.quantize
    seen: list[Path] = []

    def drifting(path: Path, output: Path, images: list[torch.Tensor], *, target: str) -> Any:
        seen.append(output)
        return quantize(path, output, [x + len(seen) for x in images], target=target)

    monkeypatch.setattr(export, "quantize", drifting)
    found = typed("quantize", run)
    assert found.code == 2
    assert "NotReproducible: 1 of 1 files come out with other bytes" in found.err
    assert sorted(run.iterdir()) == before


def test_it_is_calibrated_with_training_images_as_they_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return load_data(*args, **options)

    def stop(path: Path, output: Path, calibration: list[torch.Tensor], *, target: str) -> None:
        given.extend(calibration)
        raise export.NotQuantizable("enough", at="a", effect="b", fix="c")

    monkeypatch.setattr(quantizing, "load_data", load)
    monkeypatch.setattr(export, "quantize", stop)
    assert typed("quantize", run).code == 2
    train = load_data("digits", image_size=8, batch=100, augment=False).train
    expected = torch.cat([images for images, _ in islice(train, 3)])[:256]
    assert torch.equal(torch.cat(given), expected)
    assert max(map(len, given)) == 32
    assert [options["augment"] for options in asked] == [False]


def test_float16_has_no_target_and_says_that_it_is_for_gpus(run: Path) -> None:
    found = typed("quantize", run, "--precision", "fp16")
    assert found.code == 0, found.err
    report = json.loads((run / "pruned-fp16.json").read_text())
    assert report["recipe"]["precision"] == "fp16"
    assert report["fidelity"]["sqnr_db"] > 40
    assert "warning: float16 is for GPUs" in found.out
    assert not (run / "pruned-int8.onnx").exists()


def test_a_collapse_is_said_loudly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges taken from black images, in which every real one is cut off."""
    monkeypatch.setattr(quantizing, "_images", lambda train: [torch.full((8, 1, 8, 8), 1e-4)])
    found = typed("quantize", run, "--target", "tensorrt")
    assert found.code == 0, found.err
    assert "warning: int8 loses accuracy: it answers " in found.out
    assert "warning: made for TensorRT" in found.out


def test_warnings_are_about_what_happened(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {**report, "accuracy": {"pruned": 0.9, "int8": 0.892}, "latency": {}}
    assert list(warnings({**quiet, "recipe": {"precision": "int8", "target": "x86-avx2"}})) == []
    lost = {**quiet, "accuracy": {"pruned": 0.9, "int8": 0.89}, "recipe": {"precision": "int8", "target": "x86-avx2"}}
    assert ["89.00 %" in text and "90.00 %" in text for text in warnings(lost)] == [True]
    for sets, count in ((("avx2",), 1), (("avx2", "avx512_vnni"), 0)):
        monkeypatch.setattr(recipes, "instruction_sets", lambda sets=sets: sets)
        assert len(list(warnings({**quiet, "recipe": {"precision": "int8", "target": "x86-vnni"}}))) == count


def refused(words: str, fact: str) -> None:
    found = typed("quantize", *words.split())
    assert (found.code, found.out) == (2, ""), found
    lines = found.err.splitlines()
    assert fact in found.err
    assert [line.split()[0] for line in lines[-3:]] == ["at", "effect", "fix"]
    assert "Traceback" not in found.err


def test_what_cannot_be_done_is_refused_and_leaves_nothing(here: Path, run: Path) -> None:
    settings = (run / "config.toml").read_text()
    refused("absent", "BadRun: there is no such folder")
    (here / "pictures/pruned.onnx").write_bytes(b"")
    refused("pictures", "BadRun: the folder has no config.toml, dense.onnx")
    refused(f"{run} --precision int4", "BadConfig: precision 'int4' is not known")
    refused(f"{run} --target arm", "BadConfig: target 'arm' is not known")
    refused(f"{run} --precision fp16 --target x86", "BadConfig: fp16 has no target")
    sealed = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(sealed.replace("sha", "shb", 1))
    refused(f"{run}", "BadRun: ")
    assert not list(run.glob("pruned-*.json")), "found before anything was measured"
    (run / "manifest.json").write_text(sealed)
    (run / "pruned-int8.onnx").write_bytes(b"older")
    before = sorted(path.name for path in run.iterdir())
    for old, new, fact in (
        ('"digits"', '"npz:gone.npz"', "BadData: the file is missing"),
        ("image_size = 8", "image_size = 9", "BadData: the data has input_shape [1, 9, 9], pruned.onnx says [1, 8, 8]"),
        ("macs", "mcas", "mcas: unknown setting"),
    ):
        assert old in settings
        (run / "config.toml").write_text(settings.replace(old, new))
        refused(str(run), fact)
    assert sorted(path.name for path in run.iterdir()) == before
    assert (run / "pruned-int8.onnx").read_bytes() == b"older"


def test_what_is_interrupted_leaves_the_older_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "pruned-int8.onnx").write_bytes(b"older")
    before = sorted(path.name for path in run.iterdir())

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "compare", interrupted)
    assert typed("quantize", run).code == 130
    assert sorted(path.name for path in run.iterdir()) == before
