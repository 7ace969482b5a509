"""An optimizer that goes on with the cut network does there what it would do in the masked one.

Masked readers have zero weights whose gradients are not zero, so both are compared after one step only.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import random_keep
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer
from zoo import ZOO, randomised, traced

import surgery
from surgery import ChannelGraph, Keep

NETWORKS = (
    "residual", "dense_concat", "depthwise", "grouped", "tied_weight", "bare_scale", "class_token", "layer_norm_mlp",
    "group_norm", "chunk_gate", "multihead_attention", "transposed", "shared_module",
)
FEW = ("residual", "multihead_attention")
Make = Callable[[Iterable[Any]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
    "amsgrad": partial(AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
}
LIMIT = 1e-10
NOISE = 1e-12
"""Gradients below are zero but for rounding: a bias before a batch norm, or the bias of keys in attention."""


def step(name: str, model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    labels = torch.randint(5, (6,), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(ZOO[name].example(seed, batch=6)), labels).backward()
    optimizer.step()


def trained(name: str, make: Make) -> tuple[nn.Module, Optimizer, ChannelGraph]:
    """A network in training mode after three steps."""
    model = randomised(ZOO[name].build()).double().train()
    optimizer = make(model.parameters())
    for seed in range(3):
        step(name, model, optimizer, seed)
    return model, optimizer, traced(name)[1]


def surviving(tensor: Tensor, name: str, graph: ChannelGraph, keep: Keep) -> Tensor:
    """The entries of a tensor that a cut leaves, by the graph alone."""
    for (of, axis), flags in graph.checked(keep)[1].items():
        if of == name:
            tensor = tensor.index_select(axis, flags.nonzero()[:, 0])
    return tensor


def assert_goes_on(
    name: str, make: Make, model: nn.Module, optimizer: Optimizer, graph: ChannelGraph,
    carry: Callable[..., object] = surgery.carry_optimizer_,
) -> nn.Module:
    """After the same step in the masked and in the cut network every parameter and its state are equal.

    Where Adam has nothing but rounding to divide by its own square root, the values are compared, not the changes.
    """
    keep = random_keep(graph, 1)
    masked, small = surgery.mask(model, graph, keep), surgery.cut(model, graph, keep)
    other = make(masked.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    carry(optimizer, model, small)
    step(name, masked, other, 9)
    step(name, small, optimizer, 9)
    dense = dict(masked.named_parameters())
    for n, p in small.named_parameters():
        def left(tensor: Tensor, n: str = n) -> Tensor:
            return surviving(tensor.detach(), n, graph, keep)

        expected, real = left(dense[n]), left(dense[n].grad).abs() > NOISE
        assert (p - expected).abs().max() <= LIMIT * expected.abs().max(), n
        change, moved = expected - before[n], (p - before[n]) - (expected - before[n])
        assert moved[real].abs().sum() <= LIMIT * change[real].abs().sum(), n
        state = optimizer.state[p]
        assert state.keys() == other.state[dense[n]].keys()
        for key, value in other.state[dense[n]].items():
            value = left(value) if isinstance(value, Tensor) and value.dim() else value
            assert state[key] == value if key == "step" else state[key].shape == p.shape
            assert (state[key] - value).abs().max() <= LIMIT * abs(value).max() + NOISE, (n, key)
    return small


@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(name, kind, marks=[pytest.mark.soak] * (kind in ("nesterov", "amsgrad") and name not in FEW))
    for name in NETWORKS for kind in OPTIMIZERS
])
def test_the_next_step_is_that_of_the_masked_network(name: str, kind: str) -> None:
    make = OPTIMIZERS[kind]
    model, optimizer, graph = trained(name, make)
    small = assert_goes_on(name, make, model, optimizer, graph)
    again = surgery.trace(small, ZOO[name].example())
    assert_goes_on(name, make, small, optimizer, again)


def first_entries(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """A wrong slice: as many entries as are kept, but the first ones."""
    for axis, index in axes.items():
        tensor = tensor.narrow(axis, 0, len(index)).clone()
    return tensor


def no_state(optimizer: Optimizer, model: nn.Module, small: nn.Module) -> None:
    """A wrong carry: the parameters without their history."""
    surgery.carry_optimizer_(optimizer, model, small)
    optimizer.state.clear()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", FEW)
def test_a_wrong_slice_or_none_would_be_seen(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = OPTIMIZERS[kind]
    with pytest.raises(AssertionError):
        assert_goes_on(name, make, *trained(name, make), carry=no_state)
    monkeypatch.setattr("surgery.optimizer.sliced", first_entries)
    with pytest.raises(AssertionError):
        assert_goes_on(name, make, *trained(name, make))


def test_over_two_cuts_at_once_is_one_after_the_other() -> None:
    model, one, graph = trained("residual", OPTIMIZERS["adamw"])
    other = OPTIMIZERS["adamw"](model.parameters())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    halfway = surgery.cut(model, graph, random_keep(graph, 1, share=0.8))
    again = surgery.trace(halfway, ZOO["residual"].example())
    small = surgery.cut(halfway, again, random_keep(again, 2))
    surgery.carry_optimizer_(one, model, small)
    surgery.carry_optimizer_(other, model, halfway)
    surgery.carry_optimizer_(other, halfway, small)
    assert [*one.state] == [*other.state] == [*small.parameters()]
    for p in small.parameters():
        assert all(torch.equal(one.state[p][key], value) for key, value in other.state[p].items())
        assert p.shape == one.state[p]["exp_avg"].shape


def test_groups_hyper_parameters_and_foreign_parameters_stay() -> None:
    model, x = randomised(ZOO["tied_weight"].build()).double(), ZOO["tied_weight"].example()
    graph = surgery.trace(model, x)
    foreign = nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = SGD(
        [
            {"params": [model.head.weight, foreign, model.a.weight], "lr": 0.3},
            {"params": [model.stem[1].bias]},
        ],
        lr=0.1, momentum=0.9,
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    (model(x).sum() + foreign.sum()).backward()
    optimizer.step()
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    history = optimizer.state[foreign]["momentum_buffer"]
    lists = [group["params"] for group in optimizer.param_groups]
    small = surgery.cut(model, graph, random_keep(graph, 0))
    surgery.carry_optimizer_(optimizer, model, small)
    assert all(group["params"] is old for group, old in zip(optimizer.param_groups, lists, strict=True))

    expected = [[small.head.weight, foreign, small.a.weight], [small.stem[1].bias]]
    for group, parameters in zip(optimizer.param_groups, expected, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
    assert small.b.weight is small.a.weight
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
    assert optimizer.state.keys() == {p for group in expected for p in group}
    assert optimizer.state[foreign]["momentum_buffer"] is history
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.15, 0.05]


def test_an_optimizer_that_made_no_step_is_carried() -> None:
    model = randomised(ZOO["residual"].build()).double()
    graph = surgery.trace(model, ZOO["residual"].example())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    small = surgery.cut(model, graph, random_keep(graph, 0))
    surgery.carry_optimizer_(optimizer, model, small)
    assert not optimizer.state
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], small.parameters(), strict=True))


@pytest.mark.parametrize(("shape", "layout"), [
    ((4, 5, 3, 3), torch.channels_last), ((4, 5, 1, 1), torch.channels_last), ((4, 5, 3, 3), torch.contiguous_format),
    ((4, 5, 2, 3, 2), torch.channels_last_3d),
])
def test_layout_and_dtype_of_the_state_stay(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    from surgery.rebuilding import sliced

    state = torch.randn(shape).bfloat16().contiguous(memory_format=layout)
    out = sliced(state, {0: torch.tensor([0, 3]), 1: torch.tensor([1, 2, 4])})
    expected = state[[0, 3]][:, [1, 2, 4]]
    assert torch.equal(out, expected)
    assert out.dtype == torch.bfloat16
    assert out.stride() == torch.empty(out.shape).contiguous(memory_format=layout).stride()


def test_the_state_of_a_network_in_channels_last_stays_so() -> None:
    model = randomised(ZOO["residual"].build()).to(memory_format=torch.channels_last)
    x = ZOO["residual"].example(dtype=torch.float32).to(memory_format=torch.channels_last)
    graph = surgery.trace(model, x)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    model(x).sum().backward()
    optimizer.step()
    small = surgery.cut(model, graph, random_keep(graph, 0))
    surgery.carry_optimizer_(optimizer, model, small)
    state = optimizer.state[small.a.weight]["exp_avg"]
    assert state.is_contiguous(memory_format=torch.channels_last)
    assert not state.is_contiguous()
    assert state.dtype == torch.float32


def test_a_network_loaded_from_a_file_fits(tmp_path: Path) -> None:
    model, optimizer, graph = trained("residual", OPTIMIZERS["sgd"])
    surgery.save(surgery.cut(model, graph, random_keep(graph, 0)), tmp_path / "small.safetensors")
    small = surgery.load(tmp_path / "small.safetensors", ZOO["residual"].build)
    surgery.carry_optimizer_(optimizer, model, small)
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in small.parameters())


def refused(optimizer: Optimizer, model: nn.Module, small: nn.Module, message: str) -> None:
    """The refusal comes before anything is changed."""
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    state = {p: dict(entries) for p, entries in optimizer.state.items()}
    with pytest.raises(surgery.NotCarried, match=message):
        surgery.carry_optimizer_(optimizer, model, small)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert optimizer.state.keys() == state.keys()
    for p, entries in state.items():
        assert all(optimizer.state[p][key] is value for key, value in entries.items())


def test_factored_state_is_refused() -> None:
    model, optimizer, graph = trained("residual", partial(Adafactor, lr=0.01))
    small = surgery.cut(model, graph, random_keep(graph, 0))
    refused(optimizer, model, small, r"the state row_var of stem.0.weight has shape \(8, 3, 3, 1\); the parameter has")


def test_flat_state_is_refused() -> None:
    model, optimizer, graph = trained("residual", OPTIMIZERS["sgd"])
    state = optimizer.state[model.a.weight]
    state["momentum_buffer"] = state["momentum_buffer"].flatten()
    small = surgery.cut(model, graph, random_keep(graph, 0))
    refused(optimizer, model, small, r"the state momentum_buffer of a.weight has shape \(432,\); the parameter has")


def test_state_across_parameters_is_refused() -> None:
    model, x = randomised(ZOO["residual"].build()).double(), ZOO["residual"].example()
    graph = surgery.trace(model, x)
    optimizer = LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    small = surgery.cut(model, graph, random_keep(graph, 0))
    refused(optimizer, model, small, r"the state d of stem.0.weight has shape \(\d+,\)")
    for key in ("d", "prev_flat_grad"):
        del optimizer.state[model.stem[0].weight][key]
    refused(optimizer, model, small, "the state old_dirs of stem.0.weight is a list")


def test_a_network_that_was_not_cut_of_it_is_refused() -> None:
    model, optimizer, graph = trained("residual", OPTIMIZERS["sgd"])
    keep = {"a": torch.tensor([True, False, True, True, False, True])}
    small, other = surgery.cut(model, graph, keep), surgery.cut(model, graph, {"a": ~keep["a"]})
    refused(optimizer, model, copy.deepcopy(model), "Residual has no record of what was cut")
    refused(optimizer, small, other, r"does not lead from a.weight of shape \(4, 8, 3, 3\) to \(2, 8, 3, 3\)")
    refused(optimizer, small, surgery.cut(model, graph, {}), r"a.weight of shape \(4, 8, 3, 3\) to \(6, 8, 3, 3\)")
    foreign, _, its = trained("depthwise", OPTIMIZERS["sgd"])
    refused(optimizer, model, surgery.cut(foreign, its, {}), "10 parameters are only in one of both networks: a.bias, ")
    narrow = copy.deepcopy(small)
    narrow.head = nn.Linear(8, 3).double()
    refused(optimizer, model, narrow, r"head.weight of shape \(5, 8\) to \(3, 8\)")
    edited = copy.deepcopy(small)
    edited.a.weight = nn.Parameter(torch.ones(3, 8, 3, 3).double())
    refused(optimizer, model, edited, r"a.weight of shape \(6, 8, 3, 3\) to \(3, 8, 3, 3\)")
    wide = copy.deepcopy(model)
    wide.a, wide.b = nn.Conv2d(8, 7, 3, padding=1).double(), nn.Conv2d(7, 8, 1).double()
    refused(SGD(wide.parameters()), wide, small, r"a.weight of shape \(7, 8, 3, 3\) to \(4, 8, 3, 3\)")
    refused(optimizer, copy.deepcopy(model), small, "SGD has no parameter of Residual")
