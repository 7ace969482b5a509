"""Laws of cutting: what it changes, and above all what it does not."""

import copy
from typing import Any

import pytest
import torch
from oracle import gated_output, random_keep, relative_error, run
from torch import Tensor, nn
from zoo import ZOO, Residual, TiedWeight, randomised, traced

import surgery
from surgery import ChannelGraph

NETWORKS = (
    "plain", "residual", "dense_concat", "chunk_gate", "depthwise", "grouped", "transposed", "shared_module",
    "tied_weight", "bare_scale", "buffer_scale", "prelu_sigmoid", "layer_norm_mlp", "c2f", "class_token",
    "mixed_output",
)


def content(model: nn.Module) -> dict[str, bytes]:
    """The bytes of everything in the state dict."""
    return {name: t.detach().contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else str(t).encode()
            for name, t in model.state_dict().items()}


def described(model: nn.Module) -> list[Any]:
    """What surgery must hand on: modes, classes, flags, dtypes, hooks."""
    found: list[Any] = [(n, type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()]
    found += [(n, p.requires_grad, p.dtype, p.device, type(p)) for n, p in model.named_parameters()]
    return [*found, *((n, b.dtype, b.device) for n, b in model.named_buffers())]


def closing(graph: ChannelGraph, seed: int, groups: slice) -> dict[str, Tensor]:
    names = [group.name for group in graph.groups][groups]
    return {name: flags for name, flags in random_keep(graph, seed).items() if name in names}


@pytest.mark.parametrize("name", NETWORKS)
def test_keeping_everything_is_the_identity(name: str) -> None:
    model, graph, _ = traced(name)
    for keep in ({}, {group.name: torch.ones(group.units, dtype=torch.bool) for group in graph.groups}):
        for same in (surgery.cut(model, graph, keep), surgery.mask(model, graph, keep)):
            assert content(same) == content(model)
            assert described(same) == described(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_cutting_one_then_the_other_is_cutting_both(name: str) -> None:
    model, graph, x = traced(name)
    first, second = closing(graph, 1, slice(0, None, 2)), closing(graph, 2, slice(1, None, 2))
    both = surgery.cut(model, graph, {**first, **second})
    for a, b in ((first, second), (second, first)):
        halfway = surgery.cut(model, graph, a)
        assert content(surgery.cut(halfway, surgery.trace(halfway, x), b)) == content(both)


@pytest.mark.parametrize("name", NETWORKS)
def test_cutting_twice_is_cutting_once(name: str) -> None:
    model, graph, x = traced(name)
    keep = random_keep(graph, 1)
    once = surgery.cut(model, graph, keep)
    again = surgery.trace(once, x)
    assert {g.name: g.units for g in again.groups} == {name: int(flags.sum()) for name, flags in keep.items()}
    assert content(surgery.cut(once, again, {})) == content(once)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_deeper_cut_of_a_cut_is_exact(name: str) -> None:
    model, graph, x = traced(name)
    small = surgery.cut(model, graph, random_keep(graph, 1, share=0.8))
    again = surgery.trace(small, x)
    keep = random_keep(again, 2)
    assert relative_error(gated_output(small, again, keep, x), run(surgery.cut(small, again, keep), x)) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_the_input_model_is_untouched(name: str) -> None:
    model, graph, x = traced(name)
    for leaf in torch.utils._pytree.tree_leaves(run(model, x)):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.square().sum().backward(retain_graph=True)
    model.train()
    next(model.children()).eval()
    next(iter(model.parameters())).requires_grad_(False)
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    before, shown, random = content(model), described(model), torch.get_rng_state()
    kept_x = copy.deepcopy(x)

    graph = surgery.trace(model, x)
    keep = random_keep(graph, 1)
    masked, small = surgery.mask(model, graph, keep), surgery.cut(model, graph, keep)
    surgery.check_equal(masked, small, x)

    assert content(model) == before
    assert described(model) == shown
    assert torch.equal(torch.get_rng_state(), random)
    assert grads.keys() == dict(model.named_parameters()).keys()
    for n, p in model.named_parameters():
        assert (p.grad is None) == (grads[n] is None)
        assert p.grad is None or torch.equal(p.grad, grads[n])
    leaves = zip(torch.utils._pytree.tree_leaves(x), torch.utils._pytree.tree_leaves(kept_x), strict=True)
    assert all(torch.equal(a, b) for a, b in leaves if isinstance(a, Tensor))
    if not any(group.norms for group in graph.groups):  # a norm that leaves channels out is another class
        assert described(masked) == shown
    assert described(small) == shown
    assert not {t.data_ptr() for t in small.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 2e-2)])
def test_the_dtype_is_kept(dtype: torch.dtype, limit: float) -> None:
    model, x = randomised(Residual()).to(dtype).eval(), torch.randn(2, 3, 8, 8).to(dtype)
    graph = surgery.trace(model, x)
    keep = random_keep(graph, 0)
    small = surgery.cut(model, graph, keep)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert surgery.check_equal(surgery.mask(model, graph, keep), small, x) < limit
    assert relative_error(gated_output(model, graph, keep, x).float(), small(x).float()) < limit


def test_the_memory_format_is_kept() -> None:
    model = randomised(Residual()).double().eval().to(memory_format=torch.channels_last)
    x = ZOO["residual"].example().to(memory_format=torch.channels_last)
    graph = surgery.trace(model, x)
    keep = random_keep(graph, 0)
    small = surgery.cut(model, graph, keep)
    for weight in (small.stem[0].weight, small.a.weight):  # type: ignore[index, union-attr]
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    assert relative_error(gated_output(model, graph, keep, x), small(x)) < 1e-12


def test_tied_weights_stay_tied() -> None:
    model = randomised(TiedWeight()).double().eval()
    graph = surgery.trace(model, ZOO["tied_weight"].example())
    small = surgery.cut(model, graph, random_keep(graph, 0))
    assert small.a.weight is small.b.weight
    assert small.a.weight is not model.a.weight
    assert small.a.weight.shape < model.a.weight.shape


def test_hooks_are_kept_and_run() -> None:
    model, calls = randomised(Residual()).double().eval(), []
    model.a.register_forward_hook(lambda module, args, out: calls.append(tuple(out.shape)))
    x = ZOO["residual"].example()
    graph = surgery.trace(model, x)
    calls.clear()
    surgery.cut(model, graph, {"a": torch.tensor([True, False] * 3)})(x)
    assert calls == [(2, 3, 8, 8)]


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_remember_their_new_sizes(name: str) -> None:
    """What a cut layer says of itself is what one built anew with these sizes has; so copies by constructor work."""
    model, graph, _ = traced(name)
    small = surgery.cut(model, graph, random_keep(graph, 0))
    for layer in small.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            ins, outs = layer.in_channels, layer.out_channels
            shape = (ins, outs // layer.groups) if layer.transposed else (outs, ins // layer.groups)
            assert layer.weight.shape[:2] == shape
            assert layer.bias is None or layer.bias.shape == (outs,)
        elif isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d):
            assert layer.weight.shape == (layer.num_features,)
        elif isinstance(layer, nn.PReLU):
            assert layer.weight.shape == (layer.num_parameters,)


@pytest.mark.parametrize("name", ["residual", "layer_norm_mlp", "class_token"])
def test_a_branch_that_is_closed_altogether_is_cut_exactly(name: str) -> None:
    model, graph, x = traced(name)
    droppable = [group for group in graph.groups if group.droppable]
    assert droppable
    assert not all(group.droppable for group in graph.groups)
    for group in droppable:
        keep = {**random_keep(graph, 0), group.name: torch.zeros(group.units, dtype=torch.bool)}
        small = surgery.cut(model, graph, keep)
        assert relative_error(gated_output(model, graph, keep, x), run(small, x)) < 1e-12
        assert surgery.check_equal(surgery.mask(model, graph, keep), small, x) < 1e-12
        assert surgery.SizeModel(graph).of(keep).params == sum(p.numel() for p in small.parameters())


def test_the_small_network_trains() -> None:
    model, graph, x = traced("residual")
    small = surgery.cut(model, graph, random_keep(graph, 0)).train()
    before = content(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(small(x), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = content(small)
    assert all(after[name] != before[name] for name in before if name.endswith("weight"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown group": ({"nobody": torch.ones(6, dtype=torch.bool)}, "does not have: nobody"),
    "too short": ({"a": torch.ones(5, dtype=torch.bool)}, r"of shape \(5,\); torch.bool of shape \(6,\) is asked"),
    "too many axes": ({"a": torch.ones(6, 1, dtype=torch.bool)}, r"of shape \(6, 1\)"),
    "numbers": ({"a": torch.ones(6)}, r"is torch.float32 of shape \(6,\)"),
    "indices": ({"a": torch.arange(6)}, "is torch.int64"),
    "nothing left": ({"stem.0": torch.zeros(8, dtype=torch.bool)}, "all 8 channels on axis . of .* would be removed"),
}


@pytest.mark.parametrize(("keep", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_keep_that_does_not_fit_is_refused(keep: dict[str, Any], message: str) -> None:
    model, graph, _ = traced("residual")
    for call in (surgery.cut, surgery.mask):
        with pytest.raises(surgery.BadKeep, match=message):
            call(model, graph, keep)
    with pytest.raises(ValueError, match=message):
        surgery.SizeModel(graph).of(keep)


def test_a_forward_that_draws_numbers_leaves_the_random_state() -> None:
    class Noisy(Residual):
        def body(self, x: Tensor) -> Tensor:
            return super().body(x + torch.randn_like(x[:, :1]))

    model, x = Noisy().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = torch.get_rng_state()
    graph = surgery.trace(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    keep = random_keep(graph, 0)
    assert surgery.check_equal(surgery.mask(model, graph, keep), surgery.cut(model, graph, keep), x) < 1e-12
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model, graph, _ = traced("residual")
    model.leftover = model.a.weight * 2  # a tensor with a history, as old weight norms keep
    for call in (surgery.cut, surgery.mask):
        with pytest.raises(surgery.NotCopied, match=r"Residual cannot be copied: .*Only Tensors created explicitly"):
            call(model, graph, {})


def test_a_list_of_booleans_is_a_keep() -> None:
    model, graph, x = traced("residual")
    small = surgery.cut(model, graph, {"a": [True, False, True, True, False, True]})  # type: ignore[dict-item]
    assert small.a.out_channels == 4
    assert small(x).shape == (2, 5)


def test_a_refusal_without_words_is_named_by_its_kind() -> None:
    class Mute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    with pytest.raises(surgery.CaptureFailed, match="does not run: AssertionError"):
        surgery.trace(Mute(), torch.randn(2, 3))


def test_a_layer_that_asserts_its_width_without_words_is_pinned() -> None:
    class Proud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            if x.shape[1] != 8:
                raise AssertionError
            return self.b(x)

    graph = surgery.trace(Proud().eval(), torch.randn(2, 3))
    assert not graph.groups
    assert any("AssertionError" in pin.reason for pin in graph.pinned), graph.pinned
