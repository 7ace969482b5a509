"""What a newcomer gets wrong: one screen with what, where, effect and fix, exit code 2, and nothing left behind."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from newcomer import MODULE, Outcome, typed, working_in
from safetensors.torch import save

import surgery
from diffprune.benching import grid
from diffprune.models import load_model

SMALL = f"{MODULE}:factory"
PARENT = "--parent-epochs 1000"  # takes long: what is refused with it is refused before


class Foreign:
    """Something that only unpickling could bring back."""


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with working_in(tmp_path_factory.mktemp("newcomer")) as folder:
        weights = load_model(SMALL).state_dict()
        whole = save(weights)
        files = {
            "cut_off.safetensors": whole[: len(whole) // 2],
            "noise.safetensors": b"\xff" * 64,
            "few.safetensors": save({"0.weight": weights["0.weight"]}),
            "text.onnx": b"this is not a network",
            "unknown.toml": b'model = "m:n"\ndata = "digits"\nmacs = 0.5\nouput = "o"\n',
            "damaged.toml": b'model = "m:n\n',
            "speedup.toml": f'model = "{SMALL}"\ndata = "digits"\nspeedup = 0.5\noutput = "out"\n'.encode(),
        }
        for name, content in files.items():
            (folder / name).write_bytes(content)
        torch.save({"weights": weights, "made": Foreign()}, folder / "pickled.pt")
        (folder / "empty/train").mkdir(parents=True)
        (folder / "empty/val").mkdir()
        (folder / "unreadable/cat").mkdir(parents=True)
        for number in range(5):
            (folder / f"unreadable/cat/{number}.png").write_bytes(b"no picture")
        shutil.copytree(folder / "pictures/val", folder / "unlabelled/val")
        shutil.copytree(folder / "pictures/train/cat", folder / "unlabelled/train")
        (folder / "taken").mkdir()
        (folder / "taken/report.json").write_text("{}")
        graph = surgery.trace(load_model(SMALL).eval(), torch.randn(2, 1, 8, 8))
        surgery.save(surgery.cut(load_model(SMALL).eval(), graph, {}), folder / "cut.safetensors")
        yield folder


def refused(here: Path, words: str, fact: str) -> Outcome:
    before = sorted(here.rglob("*"))
    outcome = typed(*words.split())
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert PARENT not in words or "training" not in outcome.err, "refused before the parent is trained"
    lines = outcome.err.splitlines()
    while lines and not lines[0].partition(":")[0].isidentifier():
        lines.pop(0)  # what the run told before
    text = "\n".join(lines)
    assert fact in text
    assert [line.split()[0] for line in lines[-3:]] == ["at", "effect", "fix"], text
    assert all(line.split()[1:] for line in lines[-3:])
    assert len(lines) <= 20, "one screen"
    assert max(map(len, lines)) <= 320
    assert "Traceback" not in text
    left = [path for path in sorted(here.rglob("*")) if path not in before and "__pycache__" not in path.parts]
    assert left == []
    return outcome


COMPRESS = "compress --image-size 8 --batch 32 --epochs 1 --round-to 1 --output out --macs 0.5 --data digits --model"


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ("torchvision:resnet181", "BadModel: there is no network 'resnet181'"),
        ("absent.module:net", "BadModel: there is no module absent.module"),
        ("justaname", "BadModel: 'justaname' does not name a network"),
        (f"{MODULE}:factry", f"BadModel: module {MODULE} has no factry"),
        (f"{MODULE}:broken", "BadModel: calling it raised RuntimeError: it is broken"),
        (f"{MODULE}:number", "BadModel: the factory returned int"),
        (f"{SMALL} --weights absent.safetensors", "BadWeights: the file cannot be read"),
        (f"{SMALL} --weights DEFAULT", "BadWeights: 'DEFAULT' is not a weights file"),
        (f"{SMALL} --weights cut_off.safetensors", "BadWeights: the file is damaged"),
        (f"{SMALL} --weights noise.safetensors", "BadWeights: the file is damaged"),
        (f"{SMALL} --weights few.safetensors", "BadWeights: the weights do not fit the network"),
        (f"{SMALL} --weights pickled.pt", "BadWeights: the file holds a pickled"),
        (f"{SMALL} --data digit", "BadData: there is no data 'digit'"),
        (f"{SMALL} --data imagefolder:absent", "BadData: the folder is missing"),
        (f"{SMALL} --data imagefolder:empty", "BadData: there are no folders of classes in train"),
        (f"{MODULE}:colour --data imagefolder:unreadable", "BadData: the picture cat/"),
        (f"{SMALL} --data npz:absent.npz", "BadData: the file is missing"),
        (f"{SMALL} --data npz:text.onnx", "BadData: the file cannot be read: it is not an npz file"),
        (f"{SMALL} --data {MODULE}:number", "BadData: the function returned int"),
        (f"{SMALL} --data npz:colour.npz", "BadData: the network does not take images of (3, 8, 8)"),
        (f"{MODULE}:colour --data digits", "BadData: the network does not take images of (1, 8, 8)"),
        (f"{MODULE}:rigid --image-size 9", "BadData: the network does not take images of (1, 9, 9)"),
        (f"{MODULE}:few {PARENT}", "BadConfig: the network answers 2 images with (2, 2)"),
        (f"{MODULE}:colour --data imagefolder:unlabelled {PARENT}", "BadData: the images have no labels"),
        (f"{SMALL} --macs 0", "macs = 0.0; allowed: a MACs share, above 0"),
        (f"{SMALL} --macs 1.5", "macs = 1.5; allowed"),
        (f"{SMALL} --params 0.5", "budget: macs = 0.5 and params = 0.5"),
        (f"{SMALL} --macs 0.0001 {PARENT}", "BudgetUnreachable: 0.0001 of the dense macs"),
        (f"{SMALL} --round-to 16 {PARENT}", "the least reachable is 1"),
        (f"{MODULE}:rigid {PARENT}", "NothingToCut: the network has no channel"),
        (f"{MODULE}:deciding {PARENT}", "NotExportable: "),
        (f"{SMALL} --lr 1e30", "TrainingDiverged: the loss is nan"),
        (f"{SMALL} --lr 1e9 --batch 128", "TrainingDiverged: the loss is "),
        (f"{SMALL} --parent-epochs 1 --parent-lr 1e30", "TrainingDiverged: the loss is nan"),
        (
            f"{SMALL} --parent-epochs 1 --parent-lr 1e18 --batch 1300",
            "values that are not finite after the parent phase",
        ),
        (f"{SMALL} --device tpu", "device = 'tpu'; allowed: cpu or cuda"),
        (f"{SMALL} --round-to often", "round_to = 'often'"),
        (f"{SMALL} --output text.onnx", "OutputExists: the output folder is a file"),
    ],
)
def test_compress(here: Path, words: str, fact: str) -> None:
    refused(here, f"{COMPRESS} {words}", fact)


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ("", "BadConfig: 4 settings are wrong"),
        ("--config absent.toml", "the settings cannot be read: No such file"),
        ("--config taken", "the settings cannot be read"),
        ("--config damaged.toml", "the settings are not valid TOML"),
        ("--config unknown.toml", "ouput: unknown setting; the nearest known one is output"),
        ("--config unknown.toml --epochs -1", "at      unknown.toml and the command line"),
        ("--config speedup.toml", "speedup = 0.5; allowed: dense latency / pruned latency, above 1"),
    ],
)
def test_compress_from_a_file(here: Path, words: str, fact: str) -> None:
    refused(here, f"compress {words}", fact)


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ("demo --output taken", "OutputExists: the output folder is taken"),
        ("inspect torchvision:resnet", "BadModel: there is no network 'resnet'"),
        (f"inspect {SMALL}", "BadData: the network does not take images of (3, 224, 224)"),
        (f"inspect {SMALL} --input 1,8", "BadConfig: --input is '1,8'"),
        (f"inspect {SMALL} --input 0,8,8", "BadConfig: --input is '0,8,8'"),
        (f"inspect {SMALL} --input a,b,c", "BadConfig: --input is 'a,b,c'"),
        (f"inspect {SMALL} --round-to 0", "BadConfig: --round-to is '0'"),
        (f"inspect {SMALL} --input 1,8,8 --macs 0", "BadBudget: macs is a share of the dense cost"),
        (f"inspect {SMALL} --input 1,8,8 --params 2", "BadBudget: params is a share of the dense cost"),
        ("bench absent.onnx", "BadOnnx: there is no such file"),
        ("bench text.onnx", "cannot load the file"),
        ("bench text.onnx --threads 0", "CannotMeasure: 0 threads asked"),
        ("bench text.onnx --device tpu", "CannotMeasure: device 'tpu' is not known"),
        ("bench text.onnx --threads 1,two", "BadConfig: --threads is '1,two'"),
        ("bench text.onnx --batch 1,", "BadConfig: --batch is '1,'"),
        ("bench text.onnx --batch 8,0", "CannotMeasure: batch 0 asked"),
        ("bench text.onnx --input 3,8,8", "BadConfig: --input is '3,8,8'"),
        ("bench text.onnx --input x=3,8,", "BadConfig: --input is 'x=3,8,'"),
        ("bench text.onnx --runtime jit", "CannotMeasure: runtime 'jit' is not known"),
        ("bench text.onnx --runtime onnx,eager", "BadConfig: torch does not run ONNX files"),
        ("bench text.onnx --precision tf32", "CannotMeasure: precision 'tf32' asked on cpu"),
        ("bench taken text.onnx", "BadConfig: a run's folder is compared by itself"),
        ("bench taken", "BadOnnx: there is no such file"),
        ("bench taken --runtime eager", "BadRun: manifest.json cannot be read"),
        ("bench taken --runtime eager --input x=3,8,8", "BadConfig: --input is for ONNX files"),
        ("bench text.onnx --json absent/x.json", "BadConfig: --json absent/x.json is in a folder that does not exist"),
        ("bench text.onnx --json taken", "BadConfig: --json taken is a folder"),
        (f"export absent.safetensors --model {SMALL} --output x.onnx", "BadFile: absent.safetensors cannot be read"),
        (f"export noise.safetensors --model {SMALL} --output x.onnx", "BadFile: noise.safetensors cannot be read"),
        (f"export few.safetensors --model {SMALL} --output x.onnx", "BadFile: few.safetensors cannot be read"),
        (f"export cut.safetensors --model {MODULE}:colour --output x.onnx", "BadFile: "),
        (f"export cut.safetensors --model {SMALL} --output x.onnx", "NotExportable: the network does not run"),
        (f"export cut.safetensors --model {SMALL} --output absent/x.onnx", "BadConfig: --output absent/x.onnx"),
        (f"export cut.safetensors --model {SMALL} --input 1,8,8 --output x.onnx --opset 7", "NotExportable: opset 7"),
        (f"export cut.safetensors --model {SMALL} --mean 0.5 --output x.onnx", "BadConfig: one of --mean and --std"),
        (f"export cut.safetensors --model {SMALL} --no-preprocessing --output x.onnx", "BadConfig: --no-preprocessing"),
        (f"export cut.safetensors --model {SMALL} --mean a --std 1 --output x.onnx", "BadConfig: --mean is 'a'"),
        (f"export cut.safetensors --model {SMALL} --mean= --std= --output x.onnx", "BadConfig: --mean is ''"),
        (
            f"export cut.safetensors --model {SMALL} --input 1,8,8 --mean 0.5 --std 0 --output x.onnx",
            "NotExportable: mean (0.5,) and std (0.0,) do not normalise",
        ),
        (f"export cut.safetensors --model {SMALL} --labels absent --output x.onnx", "BadConfig: --labels absent"),
        (f"export cut.safetensors --model {SMALL} --labels taken --output x.onnx", "BadConfig: --labels taken cannot"),
        (
            f"export cut.safetensors --model {SMALL} --input 1,8,8 --labels text.onnx --output x.onnx",
            "NotExportable: 1 labels for",
        ),
        ("verify absent", "BadRun: manifest.json cannot be read: No such file"),
        ("verify text.onnx", "BadRun: manifest.json cannot be read: Not a directory"),
        ("verify taken", "BadRun: manifest.json cannot be read: No such file"),
    ],
)
def test_the_other_commands(here: Path, words: str, fact: str) -> None:
    refused(here, words, fact)


def test_a_speed_up_out_of_reach(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By measuring, before the parent is trained."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("diffprune.stopwatch.SECONDS", 0.3)
    words = f"{COMPRESS} {SMALL} --speedup 1000 {PARENT}".replace("--macs 0.5 ", "")
    refused(here, words, "BudgetUnreachable: a speed-up of 1e+03 is asked; the largest reachable is ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu(here: Path) -> None:
    refused(here, f"{COMPRESS} {SMALL} --device cuda", "DeviceMissing: there is no CUDA device")
    refused(here, "bench text.onnx --device cuda", "DeviceMissing: onnxruntime")


def test_a_folder_that_is_taken_stays_as_it_is(here: Path) -> None:
    refused(here, f"{COMPRESS} {SMALL} --output taken", "for example taken-2")
    assert [path.name for path in (here / "taken").iterdir()] == ["report.json"]


def test_the_same_words_without_the_fault_are_accepted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the refusals above would prove nothing."""
    words = f"export cut.safetensors --model {SMALL} --input 1,8,8 --output x.onnx --license mit"
    outcome = typed(*words.split(), "--mean", "0.5", "--std", "0.25")
    assert outcome.code == 0, outcome.err
    (given,) = onnxruntime.InferenceSession(here / "x.onnx").get_inputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", 8, 8, 1])

    class Accepted(Exception):
        pass

    def accept(*_: Any) -> None:
        raise Accepted

    monkeypatch.setattr("diffprune.run._compressed", accept)
    with pytest.raises(Accepted):
        typed(*f"{COMPRESS} {MODULE}:colour --data imagefolder:unlabelled --output fine".split())


def test_a_setting_that_is_named_twice_is_measured_once() -> None:
    asked = {"threads": [1, 1], "batches": [8, 1, 8], "runtimes": ["onnx"], "precisions": ["fp32"]}
    assert [(s.threads, s.batch) for s in grid("cpu", **asked)] == [(1, 8), (1, 1)]
