"""The comparison with torch-pruning: peers reach the asked MACs, run by their own code, and the table adds up."""

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from zoo import randomised

import diffprune
from benchmarks import frontier, parents, variants
from benchmarks.cells import run_cells, stored
from benchmarks.cifar_resnet import CifarResNet
from benchmarks.parents import PARENTS
from benchmarks.peers import PEERS, macs, pruned, sparsify_
from diffprune.data import Batches, Data
from diffprune.feeding import endless
from diffprune.training import Recipe


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return randomised(CifarResNet(1)).eval()


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_reaches_the_asked_macs_and_leaves_the_dense_network_alone(
    name: str, dense: nn.Module, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    small = pruned(dense, PEERS[name], 0.6, frontier.outer_layers(dense), *images)
    left = macs(small, images[0][:1]) / macs(dense, images[0][:1])
    assert 0.5 < left <= 0.6
    assert small(images[0]).shape == (8, 10)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_macs_are_those_of_the_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert macs(net, torch.randn(2, 3, 6, 6)) == 8 * 3 * 9 * 16 + 8 * 16 * 5


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.regularises])
def test_sparse_training_shrinks_what_the_pruner_regularises(
    name: str, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    torch.manual_seed(0)
    parent, peer = CifarResNet(1).eval(), PEERS[name]
    norms = []
    for strength in (0.0, 300.0):
        model = CifarResNet(1)
        model.load_state_dict(parent.state_dict())
        changed = {key: value * strength for key, value in peer.options.items()}
        kept = [model.get_submodule(layer) for layer in frontier.outer_layers(model)]
        sparsify_(
            model, type(peer)(**{**vars(peer), "options": changed}), kept, endless([images]), Recipe(lr=0.05),
            steps=4, total=4, parent=parent,
        )
        block = model.layer1[0]
        norms.append(torch.stack([block.bn1.weight.norm(), block.conv1.weight.norm()]))
    assert (norms[1] / norms[0]).min() < 0.97


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")])])
@pytest.mark.parametrize("method", ["diffprune", "growing-reg"])
def test_a_method_runs_its_steps_on_a_device(
    method: str, device: str, dense: nn.Module, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, labels = images
    batches = Batches(8, 4, lambda: iter([(x, labels)] * 4))
    data = Data(batches, batches, tuple("0123456789"), (3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    model = copy.deepcopy(dense).to(device)
    setup = frontier.Setup(model, data, x.to(device), labels.to(device), 4, 0.6, 0, Recipe())
    small = frontier.ours(setup) if method == "diffprune" else frontier.peer(method, setup)
    assert next(small.parameters()).device.type == device
    assert not small.training
    assert macs(small, setup.x[:1]) < 0.61 * macs(model, setup.x[:1])
    untrained = frontier.ours(replace(setup, steps=0)) if method == "diffprune" else model
    assert not torch.equal(small.linear.weight, untrained.linear.weight)


def test_a_variant_changes_what_it_says(
    dense: nn.Module, images: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(8, 4, lambda: iter([images] * 4))
    data = Data(batches, batches, tuple("0123456789"), (3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    setup = frontier.Setup(dense, data, *images, 4, 0.6, 0, Recipe())
    asked = []

    def compress(*args: object, **given: object) -> SimpleNamespace:
        inspect.signature(diffprune.compress).bind(*args, **given)
        asked.append(given)
        return SimpleNamespace(model=dense)

    monkeypatch.setattr(frontier, "compress", compress)
    for options in variants.VARIANTS.values():
        assert 0 <= variants.compressed(setup, **options) <= 1
    assert len({(options.get("gate"), options["recipe"]) for options in asked}) == len(variants.VARIANTS)
    rows = [{"variant": name, "factor": 2, "seed": 0, "accuracy": 0.5} for name in ("no fit", "as it is")]
    assert variants.table(rows).splitlines()[2:] == ["| as it is | 50.00 | 1 |", "| no fit | 50.00 | 1 |"]


def test_a_peer_trains_on_the_first_order_of_the_data(
    dense: nn.Module, images: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shuffled() -> torch.utils.data.DataLoader:  # type: ignore[type-arg]
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
                                           torch.arange(64) % 10),
            batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3),
        )  # fmt: skip

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(frontier, "fit_", lambda model, batches, *_, **__: seen.append(next(batches)[0]))
    loader = shuffled()
    data = Data(loader, loader, tuple("0123456789"), (3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    frontier.peer("magnitude", frontier.Setup(dense, data, *images, 4, 0.6, 0, Recipe()))
    assert torch.equal(seen[0], next(iter(shuffled()))[0])


def test_networks_whose_files_are_gone_keep_an_unknown_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frontier, "RESULTS", tmp_path / "frontier.json")
    monkeypatch.setattr(frontier, "LATENCY", tmp_path / "latency.json")
    monkeypatch.setattr(frontier, "FILES", tmp_path / "nowhere")
    monkeypatch.setattr(frontier, "PICTURE", tmp_path / "picture.svg")
    found = {"accuracy": 0.9, "macs_left": 0.5, "steps": 0, "seconds": 60.0}
    monkeypatch.setattr(frontier, "measure", lambda *_: found)
    words = "frontier --data . --networks resnet56 --epochs 0 --factors 2 --seeds 0"
    monkeypatch.setattr("sys.argv", words.split())
    frontier.main()
    assert "| ResNet-56 | 0 | 2x | diffprune | 90.00 | 2.00x | unknown | 1.0 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "shape", "outer"), [
    ("lenet5", (1, 28, 28), {"9"}),
    ("resnet18", (3, 32, 32), {"conv1", "fc", "layer2.0.conv2", "layer2.0.downsample.0"}),
])
def test_a_parent_without_published_weights_is_trained_once(
    name: str, shape: tuple[int, int, int], outer: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, labels = torch.randn(8, *shape), torch.randint(10, (8,))
    batches = Batches(8, 1, lambda: iter([(x, labels)]))
    data = Data(batches, batches, tuple("0123456789"), shape, (0.0,) * shape[0], (1.0,) * shape[0])
    monkeypatch.setattr(parents, "load_data", lambda spec: data)
    parent = replace(PARENTS[name], epochs=1)
    first, again = (parent.trained(tmp_path, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first(x).shape == (8, 10)
    assert outer <= set(frontier.outer_layers(first))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_small_images_keep_their_size_in_torchvisions_resnet18() -> None:
    net = PARENTS["resnet18"].build()
    assert net.layer1(net.maxpool(net.conv1(torch.zeros(1, 3, 32, 32)))).shape == (1, 64, 32, 32)


def cells() -> list[frontier.Cell]:
    common = {"network": "resnet20", "epochs": 0.0, "factor": 2, "macs_left": 0.5, "speedup": 1.5, "low": 1.4,
              "high": 1.6, "seconds": 60.0}
    return [
        {**common, "method": method, "seed": seed, "accuracy": accuracy + seed / 100}
        for method, accuracy in (("diffprune", 0.84), ("magnitude", 0.50)) for seed in (0, 1)
    ]


def test_the_table_and_the_picture_show_every_cell(tmp_path: Path) -> None:
    lines = frontier.table(cells()).splitlines()
    assert lines[2] == "| ResNet-20 | 0 | 2x | diffprune | 84.50 ± 0.71 | 2.00x | 1.50 ± 0.00 | 1.0 | 2 |"
    noisy = [{**cell, "low": 1.0, "high": 2.0} for cell in cells()]
    assert "| 2.00x | unknown |" in frontier.table(noisy)
    untimed = [{key: value for key, value in cell.items() if key not in ("speedup", "low", "high")} for cell in cells()]
    assert "| 2.00x | unknown |" in frontier.table(untimed)
    frontier.picture(cells(), tmp_path / "one.svg")
    frontier.picture(cells(), tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "magnitude" in (tmp_path / "one.svg").read_text()


def test_minutes_are_those_of_the_cpu() -> None:
    here, there = cells()[:2]
    row = frontier.table([here, {**there, "device": "cuda", "seconds": 6.0}]).splitlines()[2]
    assert row == "| ResNet-20 | 0 | 2x | diffprune | 84.50 ± 0.71 | 2.00x | 1.50 ± 0.00 | 1.0 | 2 |"
    assert frontier.table([{**there, "device": "cuda"}]).endswith("| unknown | 1 |")


def test_precisions_are_not_taken_for_seeds() -> None:
    half = [{**cell, "epochs": 1.0, "precision": "bfloat16"} for cell in cells()]
    lines = frontier.table([*half, *({**cell, "epochs": 1.0} for cell in cells())]).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["1", "1", "1 bfloat16", "1 bfloat16"]
    assert all(line.endswith("| 2 |") for line in lines)


def test_the_seed_decides_what_is_random(dense: nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    kept = frontier.outer_layers(dense)
    nets = [pruned(dense, PEERS["random"], 0.6, kept, *images, seed) for seed in (0, 0, 1)]
    shapes = [[p.shape for p in net.parameters()] for net in nets]
    same = [all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), net.parameters(), strict=True))
            for net, shape in zip(nets[1:], shapes[1:], strict=True) if shape == shapes[0]]
    assert same[0]
    assert shapes[2] != shapes[0] or not same[1]


def test_the_grid_asks_resnet56_of_the_best_peers_only() -> None:
    grid = frontier.grid(["resnet20", "resnet56"], [0.0, 1.0], [2, 3, 5], [0, 1], "bfloat16", "cuda")
    assert len(grid) == 2 * (2 * 3 * (2 + len(PEERS)) + 2 * 2 * 5)
    assert grid[0] == {"network": "resnet20", "epochs": 0.0, "factor": 2, "method": "diffprune", "seed": 0}
    assert all((cell.get("precision"), cell.get("device")) == (("bfloat16", "cuda") if cell["epochs"] else (None, None))
               for cell in grid)


def test_a_cell_is_trained_first_and_timed_when_all_are(
    dense: nn.Module, images: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = images
    batches = Batches(8, 2, lambda: iter([(x, labels)] * 2))
    data = Data(batches, batches, tuple("0123456789"), (3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    given = frontier.Setup(copy.deepcopy(dense), data, x, labels, 2, 0.5, 0, Recipe())
    monkeypatch.setattr(frontier, "setup", lambda cell, folder, device: given)
    for name in ("RESULTS", "LATENCY"):
        monkeypatch.setattr(frontier, name, tmp_path / f"{name}.json")
    monkeypatch.setattr(frontier, "FILES", tmp_path / "files")
    monkeypatch.setattr(frontier, "SECONDS", 0.5)
    cell = {"network": "resnet20", "epochs": 1.0, "factor": 2, "method": "uniform", "seed": 0}
    cells = [{**cell, "precision": "bfloat16"}]
    (trained,) = run_cells(frontier.RESULTS, cells, lambda cell: frontier.measure(cell, tmp_path))
    assert trained["steps"] == 2
    assert "speedup" not in trained
    assert "| unknown |" in frontier.table([trained])
    run_cells(frontier.LATENCY, cells, frontier.time_of)
    (result,) = frontier.results()
    assert result["accuracy"] == trained["accuracy"]
    assert result["low"] <= result["speedup"] <= result["high"]


def test_committed_variants_give_their_table() -> None:
    table, root = variants.table(stored(variants.RESULTS)[1]), Path(__file__).parents[1]
    assert table in (root / "docs" / "experiments.md").read_text()


def test_committed_results_give_their_table() -> None:
    results = frontier.results()
    table, root = frontier.table(results), Path(__file__).parents[1]
    assert table in (root / "docs" / "experiments.md").read_text()
    for page in ("README.md", "docs/method.md"):
        shown = [line for line in (root / page).read_text().splitlines() if line.startswith("| ResNet-56 |")]
        assert len(shown) >= 2
        assert set(shown) <= set(table.splitlines())
