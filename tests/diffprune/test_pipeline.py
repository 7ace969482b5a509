"""The whole path on stripes of three directions: met budgets, an honest report, nothing changed that was given."""

import copy
import gc
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from stripes import PLAIN, SEEN, Batches, Small, batched, stripes
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import surgery
from diffprune import Budget, HardConcrete, Recipe, Result, compress
from diffprune.compensate import compensate_
from diffprune.feeding import endless
from diffprune.gains import gains
from diffprune.landing import land
from diffprune.pipeline import SCORED
from diffprune.recover import accuracy
from diffprune.score import per_cost
from diffprune.training import fit_


@pytest.fixture(scope="module")
def train() -> Batches:
    return batched(256, 0)


@pytest.fixture(scope="module")
def val() -> Batches:
    return batched(240, 1)


def test_the_random_state_of_the_caller_is_left_alone_and_no_grad_is_no_hindrance(train: Batches, val: Batches) -> None:
    model, before = Small().eval(), torch.get_rng_state()
    with torch.no_grad():
        result = compress(model, train, val, budget=Budget(macs=0.5), epochs=0.25)
        assert not torch.is_grad_enabled()
    assert result.report["training"]["steps"] == 2
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def parent(train: Batches) -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    fit_(model, endless(train), Recipe(lr=0.05), steps=range(48), total=48, phase="parent", on_event=lambda event: None)
    return model.eval()


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def result(parent: nn.Module, train: Batches, val: Batches, events: list[dict[str, Any]]) -> Result:
    return compress(parent, train, val, budget=Budget(macs=0.5), epochs=4, on_event=events.append)


def states(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def counted(model: nn.Module) -> tuple[int, int]:
    """Multiply-adds per picture and parameters."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 1, 8, 8))
    return counter.get_total_flops() // 4, sum(parameter.numel() for parameter in model.parameters())


def right(model: nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in batches]
    return torch.cat(hits).mean().item()


def check(result: Result, parent: nn.Module, val: Batches) -> dict[str, Any]:
    """What holds for every finished run."""
    report = result.report
    assert json.loads(json.dumps(report)) == report
    assert (report["macs"]["dense"], report["params"]["dense"]) == counted(parent)
    assert (report["macs"]["pruned"], report["params"]["pruned"]) == counted(result.model)
    budget = report["budget"]
    assert budget["reached"] == report[budget["kind"]]["pruned"] / report[budget["kind"]]["dense"]
    assert budget["reached"] <= budget["asked"]
    assert (budget["reached"] >= 0.99 * budget["asked"]) == (budget["note"] is None)
    assert report["equivalence"]["masked_vs_cut"] < 1e-5
    assert report["accuracy"]["examples"] == 240
    assert report["accuracy"]["dense"] == pytest.approx(right(copy.deepcopy(parent).eval(), val))
    assert report["accuracy"]["pruned"] == pytest.approx(right(result.model, val))
    assert not any(module.training for module in result.model.modules())
    assert {row["name"]: row["kept"] for row in report["groups"]} == {k: int(v.sum()) for k, v in result.keep.items()}
    for name, parameter in result.model.named_parameters():
        assert parameter.requires_grad == parent.get_parameter(name).requires_grad
    return report


def test_half_the_macs(result: Result, parent: nn.Module, val: Batches) -> None:
    report = check(result, parent, val)
    assert report["budget"]["reached"] <= 0.5
    assert report["budget"]["reached"] >= 0.49 or "no further step" in report["budget"]["note"]
    assert report["accuracy"]["dense"] > 0.9
    assert report["accuracy"]["pruned"] > report["accuracy"]["dense"] - 0.05
    assert all(keep.any() for keep in result.keep.values())
    assert not all(keep.all() for keep in result.keep.values())


def test_the_report_holds_every_number(result: Result) -> None:
    report = result.report
    stages = {"dense", "after_cut", "after_recalibration", "pruned"}
    assert report["accuracy"].keys() == stages | {"examples"}
    assert all(0 <= report["accuracy"][stage] <= 1 for stage in stages)
    assert report["budget"].keys() == {"kind", "asked", "reached", "note", "round_to", "reopened"}
    assert report["macs"].keys() == report["params"].keys() == {"dense", "pruned"}
    assert (report["budget"]["kind"], report["budget"]["asked"], report["budget"]["round_to"]) == ("macs", 0.5, 1)
    training = report["training"]
    assert (training["steps"], training["search_steps"], training["seed"]) == (32, 2, 0)
    assert (training["gate"], training["device"], training["frozen_params"]) == ("diffprune", "cpu", 0)
    assert training["lr"] == Recipe().lr
    assert report["seconds"] > 0
    (head,) = (pin for pin in report["pinned"] if pin["where"] == "head")
    assert (head["channels"], "output" in head["reason"]) == (3, True)


def test_the_macs_of_a_group_by_hand(result: Result) -> None:
    rows = {row["name"]: row for row in result.report["groups"]}
    stem, a, b, head = 64 * 9 * 16, 64 * 9 * 16 * 24, 64 * 24 * 16, 16 * 3
    whole = stem + a + b + head
    assert result.report["macs"]["dense"] == whole
    assert [(row["units"], row["macs_share"]) for row in (rows["a"], rows["stem.0"])] == [
        (24, pytest.approx((a + b) / whole)),
        (16, pytest.approx(1.0)),
    ]


def test_every_step_and_stage_is_told(result: Result, events: list[dict[str, Any]]) -> None:
    phases = [event["phase"] for event in events]
    said = ["warning"] * len(result.report["warnings"])
    assert phases == ["dense", *["search"] * 2, *said, "cut", "recalibrate", *["recover"] * 30, "done"]
    assert [event["step"] for event in events if "step" in event] == list(range(1, 33))
    stages = {event["phase"]: event["accuracy"] for event in events if "accuracy" in event}
    assert list(stages.values()) == [v for k, v in result.report["accuracy"].items() if k != "examples"]
    (cut,) = (event for event in events if event["phase"] == "cut")
    assert cut["reached"] == result.report["budget"]["reached"]
    assert all(json.dumps(event) for event in events)


def test_training_that_loses_what_the_fit_had_is_undone(parent: nn.Module, train: Batches, val: Batches) -> None:
    ruin = Recipe(lr=5.0, hints=0.0)
    result = compress(parent, train, val, budget=Budget(macs=0.5), epochs=1, recipe=ruin)
    stages = result.report["accuracy"]
    (text,) = (text for text in result.report["warnings"] if text.startswith("training took"))
    assert "so it was undone" in text
    assert stages["pruned"] == stages["after_recalibration"] == accuracy(result.model, val)[0] > 0.8


def test_only_two_networks_are_left_for_the_recovery(parent: nn.Module, train: Batches, val: Batches) -> None:
    """The parent's copy and the small one: what was gated and masked would take the memory of training."""
    gc.collect()
    before, alive = sum(isinstance(each, Small) for each in gc.get_objects()), []

    def look(event: dict[str, Any]) -> None:
        if event["phase"] == "recover" and not alive:
            gc.collect()
            alive.append(sum(isinstance(each, Small) for each in gc.get_objects()) - before)

    compress(parent, train, val, budget=Budget(macs=0.5), epochs=1, on_event=look)
    assert alive == [2]


def test_the_given_network_is_left_alone(parent: nn.Module, train: Batches, val: Batches) -> None:
    model = copy.deepcopy(parent).train()
    model.norm.eval()  # type: ignore[union-attr]
    before, modes = states(model), [module.training for module in model.modules()]
    compressed = compress(model, train[:2], val, budget=Budget(macs=0.5), epochs=4)
    assert same(before, states(model))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in compressed.model.parameters()}


def test_the_seed_decides(parent: nn.Module, val: Batches) -> None:
    images, labels = stripes(128, 3)
    shuffled = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)

    def run(seed: int) -> dict[str, Tensor]:
        return states(compress(parent, shuffled, val, budget=Budget(macs=0.5), epochs=2, seed=seed).model)

    first = run(1)
    torch.rand(7)
    assert same(first, run(1))
    assert not same(first, run(2))


def test_no_epochs_select_by_gain_fit_and_recalibrate(parent: nn.Module, train: Batches, val: Batches) -> None:
    model = compress(parent, train, val, budget=Budget(macs=0.5), epochs=0)
    report = check(model, parent, val)
    assert report["training"]["steps"] == report["training"]["search_steps"] == 0
    assert report["accuracy"]["pruned"] == report["accuracy"]["after_recalibration"]
    graph = surgery.trace(parent, train[0][0])
    size = surgery.SizeModel(graph)
    images = torch.cat([x for x, _ in train])[:SCORED]
    best = land(Budget(macs=0.5), size, per_cost(gains(parent, graph, images), Budget(macs=0.5), size))
    assert torch.equal(surgery.SizeModel(graph).flat(model.keep), best.flat)
    kept = model.keep["a"].nonzero().squeeze(1)
    small = surgery.cut(parent, graph, model.keep)
    source = small.get_parameter("a.weight").clone()
    compensate_(small, parent, graph, model.keep, torch.cat([x for x, _ in train]))
    assert not torch.equal(small.get_parameter("a.weight"), source)
    assert torch.allclose(model.model.get_parameter("a.weight"), small.get_parameter("a.weight"), atol=1e-5)
    assert not torch.equal(model.model.get_buffer("norm.running_mean"), parent.get_buffer("norm.running_mean")[kept])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": Budget(params=0.4)}, {"gate": "diffprune"}),
        ({"gate": "hard-concrete"}, {"gate": "hard-concrete"}),
        ({"gate": HardConcrete(beta=0.5)}, {"gate": "HardConcrete"}),
        ({"gate": "diffprune-deterministic"}, {"gate": "diffprune-deterministic"}),
        ({"round_to": 8}, {}),
        ({"recipe": Recipe(lr=0.01, distill=0.0)}, {"lr": 0.01, "distill": 0.0}),
        ({"recipe": Recipe(search=0.0)}, {"search_steps": 0}),
        ({"recipe": Recipe(search=1.0)}, {"search_steps": 16}),
        ({"example_inputs": torch.zeros(1, 1, 8, 8) + torch.arange(8.0)}, {}),
    ],
    ids=["params", "hard-concrete", "own-gate", "fixed", "round_to", "recipe", "no-search", "search", "example"],
)
def test_other_settings(
    parent: nn.Module, train: Batches, val: Batches, options: dict[str, Any], words: dict[str, Any]
) -> None:
    compressed = compress(parent, train, val, **{"budget": Budget(macs=0.5), "epochs": 2, **options})
    report = check(compressed, parent, val)
    assert words.items() <= report["training"].items()
    assert report["budget"]["kind"] == options.get("budget", Budget(macs=0.5)).kind
    if "round_to" in options:
        assert all(keep.sum() % 8 == 0 for keep in compressed.keep.values())
    assert report["accuracy"]["pruned"] > 0.6


@pytest.mark.parametrize("form", ["tensors", "loader"])
def test_training_without_labels_imitates_the_parent(
    parent: nn.Module, train: Batches, val: Batches, form: str
) -> None:
    images = torch.cat([x for x, _ in train])
    unlabelled: Any = images.split(32) if form == "tensors" else DataLoader(TensorDataset(images), batch_size=32)
    report = check(compress(parent, unlabelled, val, budget=Budget(macs=0.5), epochs=4), parent, val)
    assert report["accuracy"]["pruned"] > report["accuracy"]["dense"] - 0.05


def test_frozen_parameters_are_cut_but_not_trained(parent: nn.Module, train: Batches, val: Batches) -> None:
    model = copy.deepcopy(parent)
    model.a.requires_grad_(False)  # type: ignore[union-attr]
    compressed = compress(model, train, val, budget=Budget(macs=0.5), epochs=1)
    report = check(compressed, model, val)
    assert report["training"]["frozen_params"] == 24 * 16 * 9
    kept = parent.get_parameter("a.weight")[compressed.keep["a"]][:, compressed.keep["stem.0"]]
    assert torch.equal(compressed.model.get_parameter("a.weight"), kept)
    trained = parent.get_parameter("b.weight")[compressed.keep["stem.0"]][:, compressed.keep["a"]]
    assert not torch.equal(compressed.model.get_parameter("b.weight"), trained)


def test_a_network_frozen_throughout_learns_its_gates(parent: nn.Module, train: Batches, val: Batches) -> None:
    model = copy.deepcopy(parent).requires_grad_(False)
    compressed = compress(model, train, val, budget=Budget(macs=0.6), epochs=2)
    report = check(compressed, model, val)
    assert report["training"]["frozen_params"] == report["params"]["dense"]
    assert report["training"]["search_steps"] == report["training"]["steps"] == 16
    kept = parent.get_parameter("a.weight")[compressed.keep["a"]][:, compressed.keep["stem.0"]]
    assert torch.equal(compressed.model.get_parameter("a.weight"), kept)


def test_the_whole_budget_keeps_every_channel(parent: nn.Module, train: Batches, val: Batches) -> None:
    compressed = compress(parent, train, val, budget=Budget(macs=1.0), epochs=0)
    check(compressed, parent, val)
    assert all(keep.all() for keep in compressed.keep.values())


def test_training_starts_with_the_batches_that_were_looked_at(
    parent: nn.Module, val: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the loader, as any other training from the same loader would."""
    passes = []

    class Numbered:
        def __len__(self) -> int:
            return 20

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            passes.append([(x + len(passes), y) for x, y in (list(val) * 20)[:20]])
            return iter(passes[-1])

    class Stop(Exception):
        pass

    def spied(gated: Any, parent: Any, batches: Iterator[Any], *args: Any, **options: Any) -> None:
        got = list(islice(batches, 25))
        assert all(a is b for a, b in zip(got, [*passes[0], *passes[1]][:25], strict=True))
        raise Stop

    monkeypatch.setattr("diffprune.pipeline.choose", spied)
    with pytest.raises(Stop):
        compress(parent, Numbered(), val, budget=Budget(macs=0.5), epochs=1)


def test_without_hints_nothing_is_remembered_for_them(
    parent: nn.Module, train: Batches, val: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*args: Any) -> None:
        raise AssertionError("hints were prepared")

    monkeypatch.setattr("diffprune.pipeline.hinting", called)
    budget = Budget(macs=0.5)
    result = compress(parent, train, val, budget=budget, epochs=1, recipe=Recipe(hints=0.0))
    assert result.report["training"]["steps"] == len(train)
    with pytest.raises(AssertionError, match="hints were prepared"):
        compress(parent, train, val, budget=budget, epochs=1)


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    """A data set without a length."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def test_a_loader_without_a_length_is_counted(parent: nn.Module, train: Batches, val: Batches) -> None:
    loader = DataLoader(Streamed(train), batch_size=None)
    result = compress(parent, loader, val, budget=Budget(macs=0.5), epochs=1)
    assert result.report["training"]["steps"] == len(train)


def test_what_is_cut_is_the_given_network_whatever_was_searched(
    parent: nn.Module, train: Batches, val: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, given = surgery.cut, []

    def spied(model: nn.Module, graph: surgery.ChannelGraph, keep: dict[str, Tensor]) -> nn.Module:
        given.append(states(model))
        return cut(model, graph, keep)

    monkeypatch.setattr(surgery, "cut", spied)
    for gate in ("diffprune", "hard-concrete"):
        compress(parent, train, val, budget=Budget(macs=0.5), epochs=2, gate=gate)
    assert len(given) == 2
    assert all(same(model, states(parent)) for model in given)


def test_a_wrong_cut_stops_the_run(
    parent: nn.Module, train: Batches, val: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeded fault: another unit than the keep says."""
    cut = surgery.cut

    def wrong(model: nn.Module, graph: surgery.ChannelGraph, keep: dict[str, Tensor]) -> nn.Module:
        return cut(model, graph, {name: flags.roll(1) for name, flags in keep.items()})

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(surgery, "cut", wrong)
    with pytest.raises(surgery.NotEqual, match="differs by"):
        compress(parent, train, val, budget=Budget(macs=0.5), epochs=1, on_event=told.append)
    assert {event["phase"] for event in told} == {"dense", "search"}


def test_images_of_several_sizes_are_learned_from() -> None:
    train = [*SEEN, (torch.randn(32, 3, 10, 10), SEEN[0][1])]
    assert compress(PLAIN, train, SEEN, budget=Budget(macs=0.6), epochs=1).report["training"]["steps"] == 2


def test_a_part_of_an_epoch_is_a_step_at_least() -> None:
    recipe = Recipe(momentum=0.0)
    result = compress(PLAIN, SEEN, SEEN, budget=Budget(macs=0.6), epochs=0.1, recipe=recipe)
    assert result.report["training"]["steps"] == 1


def test_the_fit_can_be_left_out(
    parent: nn.Module, train: Batches, val: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[object] = []
    monkeypatch.setattr("diffprune.pipeline.compensate_", lambda *args: fitted.append(args))
    for asked in (True, False):
        compress(parent, train, val, budget=Budget(macs=0.5), epochs=0, recipe=Recipe(compensate=asked))
        assert len(fitted) == 1


def test_what_scores_do_to_their_network_stays_there(parent: nn.Module, train: Batches, val: Batches) -> None:
    def careless(model: nn.Module, graph: surgery.ChannelGraph, images: Tensor) -> Tensor:
        model.train()
        model(5 * images + 3).sum().backward()
        return torch.ones(graph.units)

    result = compress(parent, train, val, budget=Budget(macs=0.6), epochs=0.25, scores=careless)
    assert result.report["accuracy"]["dense"] == pytest.approx(right(parent, val))


def test_the_result_has_no_gradients_left(result: Result) -> None:
    """A loop that clears them after its step would add these to its first."""
    assert all(p.grad is None for p in result.model.parameters())


def test_inference_mode_is_no_hindrance(parent: nn.Module, train: Batches, val: Batches) -> None:
    with torch.inference_mode():
        result = compress(parent, train, val, budget=Budget(macs=0.6), epochs=0.25)
        assert torch.is_inference_mode_enabled()
    assert result.report["training"]["steps"] == 2
