"""Units that share a gate open and close together: whole residual branches, or what the caller says."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from oracle import random_keep
from torch import Tensor, nn
from torchvision.models import resnet18

import export
import surgery
from benchmarks.cifar_resnet import CifarResNet
from diffprune import Budget, attach, branches, compress
from diffprune.bundles import gate_of
from diffprune.detectors import untouched
from diffprune.landing import land
from diffprune.search import follow_
from surgery import BadKeep, ChannelGraph


def traced(build: Callable[[], nn.Module] = resnet18) -> tuple[nn.Module, ChannelGraph, Tensor]:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 3, 32, 32)
    return model, surgery.trace(model, x), x


def test_each_unit_has_its_own_gate_by_default() -> None:
    _, graph, _ = traced()
    assert torch.equal(gate_of(graph, ()), torch.arange(graph.units))


def test_a_branch_shares_one_gate_and_its_closing_drops_it() -> None:
    model, graph, x = traced()
    gated = attach(model, graph, bundles=branches(graph)).eval()
    whole = [group.name for group in graph.groups if group.droppable]
    assert len(whole) == 8
    free = sum(group.units for group in graph.groups if not group.droppable)
    assert gated.logits.shape == (free + len(whole),)
    closed = {whole[0]: torch.zeros(graph.by_name[whole[0]].units, dtype=torch.bool)}
    with torch.no_grad():
        gated.logits[gated.gate_of[~gated.size.flat(closed)]] = -5
    keep = gated.keep()
    assert [name for name, flags in keep.items() if not flags.all()] == whole[:1]
    assert not keep[whole[0]].any()
    small = surgery.cut(gated.folded(), graph, keep)
    surgery.check_equal(surgery.mask(model, graph, keep), small, x)
    torch.testing.assert_close(gated(x), small(x), rtol=1e-5, atol=1e-5)


class Bottlenecks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
                nn.ReLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16),
            )
            for _ in range(4)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


def test_a_branch_of_several_widths_has_one_gate() -> None:
    model, graph, _ = traced(Bottlenecks)
    found = branches(graph)
    assert [list(bundle) for bundle in found] == [[f"blocks.{i}.3", f"blocks.{i}.0"] for i in range(4)]
    batches = [(torch.randn(16, 3, 32, 32), torch.arange(16) % 5)]
    result = compress(model, batches, batches, budget=Budget(macs=0.6), epochs=0, bundles=branches)
    kept = [[bool(result.keep[name].any()) for name in bundle] for bundle in found]
    assert all(first == last for first, last in kept)
    assert 0 < sum(first for first, _ in kept) < 4


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_landing_keeps_bundles_whole(share: float) -> None:
    _, graph, _ = traced()
    size, of = surgery.SizeModel(graph), gate_of(graph, branches(graph))
    scores = torch.randn(int(of.max()) + 1, generator=torch.Generator().manual_seed(0))[of]
    landing = land(Budget(macs=share), size, scores, gate_of=of)
    for gate in (of.bincount() > 1).nonzero().squeeze(1):
        assert landing.flat[of == gate].unique().numel() == 1
    assert landing.reached <= share
    assert landing.reached > share - 0.02
    assert landing.reached == pytest.approx(size.of(size.keep(landing.flat)).macs / size.dense.macs)


def test_a_budget_of_all_closes_no_bundle_and_rounding_reopens_none() -> None:
    _, graph, _ = traced()
    size, of = surgery.SizeModel(graph), gate_of(graph, branches(graph))
    scores = torch.randn(int(of.max()) + 1, generator=torch.Generator().manual_seed(0))[of]
    whole = land(Budget(macs=1.0), size, scores, gate_of=of)
    assert (bool(whole.flat.all()), whole.note) == (True, None)
    for share in (0.4, 0.7):
        landing = land(Budget(macs=share), size, scores, round_to=4, gate_of=of)
        shared = of.bincount()[of] > 1
        assert 0 <= landing.reopened <= int((~shared).sum())
    free, bundles = untouched(size, 64, torch.arange(size.units)), untouched(size, 64, of)
    assert free, "groups of 64 units are one step wide"
    assert bundles != free


def test_a_bundle_may_reach_over_groups_and_the_budget_is_met_by_the_search() -> None:
    model, graph, x = traced()
    halves = random_keep(graph, 1)
    bundle = {name: halves[name] for name in list(halves)[:3]}
    gated = attach(model, graph, bundles=[bundle])
    follow_(gated, Budget(macs=0.7), 0.7)
    assert float(Budget(macs=0.7).cost(gated.size, gated.chance().detach())) == pytest.approx(0.7, rel=2e-3)
    gates = gated.train().sample()
    inside = ~gated.size.flat({name: ~flags for name, flags in bundle.items()})
    assert gates[inside].unique().numel() == 1
    gated(x).sum().backward()
    assert gated.logits.grad is not None
    assert gated.logits.grad.isfinite().all()


def test_what_means_nothing_is_refused() -> None:
    _, graph, _ = traced()
    group = next(group for group in graph.groups if not group.droppable)
    all_, none = torch.ones(group.units, dtype=torch.bool), torch.zeros(group.units, dtype=torch.bool)
    with pytest.raises(BadKeep, match="does not have"):
        gate_of(graph, [{"nowhere": all_}])
    with pytest.raises(BadKeep, match="would be removed"):
        gate_of(graph, [{group.name: all_}])
    with pytest.raises(ValueError, match="empty or shares"):
        gate_of(graph, [{group.name: none}])
    one = {group.name: torch.arange(group.units) == 1}
    with pytest.raises(ValueError, match="empty or shares"):
        gate_of(graph, [one, one])


def test_attach_takes_what_finds_bundles_as_compress_does() -> None:
    model, graph, _ = traced(lambda: CifarResNet(1))
    one, other = attach(model, graph, bundles=branches), attach(model, graph, bundles=branches(graph))
    assert torch.equal(one.gate_of, other.gate_of)
    assert len(one.logits) < graph.units


def test_compress_drops_branches(tmp_path: Path) -> None:
    model, graph, x = traced(lambda: CifarResNet(2))
    batches = [(torch.randn(16, 3, 16, 16), torch.randint(5, (16,))) for _ in range(2)]
    result = compress(model, batches, batches, budget=Budget(macs=0.2), epochs=1, bundles=branches)
    kept = [group["kept"] for group in result.report["groups"] if group["kept"] in (0, 1)]
    assert kept, "no branch was dropped at all"
    assert result.report["equivalence"]["masked_vs_cut"] < 1e-5
    macs = result.report["macs"]
    assert result.report["budget"]["reached"] == pytest.approx(macs["pruned"] / macs["dense"])
    assert macs["pruned"] <= 0.2 * macs["dense"], "the unit that is left of a closed branch counts"
    emptied = [name for name, flags in result.keep.items() if not flags.any()]
    readers = [result.model.get_parameter(slot.tensor) for name in emptied for slot in graph.by_name[name].readers]
    assert len(readers) == len(emptied) > 0
    assert not any(weight.any() for weight in readers), "training brought a closed branch back"
    assert all(weight.requires_grad for weight in readers)
    export.to_onnx(result.model, x, tmp_path / "small.onnx")
    left = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node].count("Conv")
    assert left == 13 - 2 * len(emptied), "both convolutions of a closed branch are gone"


@pytest.mark.parametrize("share", [0.25, 0.3, 0.4, 0.6])
def test_a_budget_is_met_with_the_cheaper_of_two_bundles_if_the_better_is_too_dear(share: float) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    size = surgery.SizeModel(surgery.trace(model, x))
    gate_of = torch.cat([torch.tensor([0] * 2 + [1] * 14), torch.arange(2, 10)])
    scores = torch.cat([torch.tensor([0.0] * 2 + [9.0] * 14), torch.randn(8)])
    landing = land(Budget(macs=share), size, scores, gate_of=gate_of)
    assert landing.reached <= share
    assert landing.flat[:16].tolist() == ([True] * 2 + [False] * 14 if share < 0.5 else [False] * 2 + [True] * 14)
