"""A gated network: the same function as its fold, its mask and its cut, with gradients to gates and weights."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import gated_output, random_keep, relative_error, run
from torch import Tensor, nn
from zoo import ZOO, Case, randomised, traced

import diffprune
import surgery
from diffprune import GATES, GatedModel, HardConcrete, MeanCentred, attach
from diffprune.errors import NothingToCut
from surgery import ChannelGraph

HAZARDS = (
    "plain", "residual", "concat_then_add", "dense_concat", "self_concat", "depthwise", "grouped", "tied_weight",
    "flatten_to_linear", "shared_module", "transposed", "broadcast_mask", "view_of_shape", "functional_conv",
    "layer_norm_mlp", "two_inputs", "frozen_parts", "coordinate_concat", "group_norms", "multihead_attention",
    "remembered_heads",
)  # fmt: skip


class TiedTransposed(nn.Module):
    """One weight whose both axes are read: by a convolution, and by the transposed one that undoes it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tied, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.stem(x).tanh()).tanh()
        return self.head(F.conv_transpose2d(x, self.tied.weight).tanh().mean((2, 3)))


def trace(case: Case) -> tuple[nn.Module, ChannelGraph, Any]:
    model, x = randomised(case.build()).double().eval(), case.example()
    return model, surgery.trace(model, x), x


def set_gates_(gated: GatedModel, keep: dict[str, Tensor]) -> None:
    """Logits of +-2 by `keep`."""
    with torch.no_grad():
        gated.logits.copy_(gated.size.flat(keep).float() * 4 - 2)


@pytest.mark.parametrize("gate", GATES)
def test_open_gates_change_no_bit_of_the_output(gate: str) -> None:
    for name in ("residual", "tied_weight", "depthwise"):
        model, graph, x = traced(name)
        gated = attach(model, graph, gate=gate)
        assert not gated.training
        assert torch.equal(gated(x), model(x))
        assert torch.equal(gated.folded()(x), model(x))
        assert all(keep.all() for keep in gated.keep().values())


@pytest.mark.parametrize("name", HAZARDS)
def test_gated_folded_masked_and_cut_are_one_function(name: str) -> None:
    model, graph, x = traced(name)
    gated = attach(model, graph)
    assert graph.groups
    for seed in range(4):
        keep = random_keep(graph, seed)
        set_gates_(gated, keep)
        expected = gated_output(model, graph, keep, x)
        assert relative_error(expected, run(gated, x)) < 1e-12
        assert relative_error(expected, run(gated.folded(), x)) < 1e-12
        assert relative_error(expected, run(surgery.mask(model, graph, gated.keep()), x)) < 1e-12
        assert relative_error(expected, run(surgery.cut(gated.folded(), graph, gated.keep()), x)) < 1e-12
        assert relative_error(run(model, x), expected) > 1e-3, "closing units changed nothing"


def test_a_weight_that_is_read_along_both_axes_is_gated_along_both() -> None:
    model, graph, x = trace(Case(TiedTransposed, (2, 3, 8, 8)))
    assert {(s.tensor, s.axis) for g in graph.groups for s in g.readers} >= {("tied.weight", 0), ("tied.weight", 1)}
    gated = attach(model, graph)
    for seed in range(4):
        keep = random_keep(graph, seed)
        set_gates_(gated, keep)
        expected = surgery.cut(model, graph, keep)(x)
        assert relative_error(expected, gated(x)) < 1e-12
        assert relative_error(expected, gated.folded()(x)) < 1e-12
        assert relative_error(model(x), expected) > 1e-3


@pytest.mark.parametrize("name", HAZARDS)
def test_each_unit_of_the_flat_vector_gates_its_own_channels(name: str) -> None:
    model, graph, x = traced(name)
    gated = attach(model, graph)
    outputs = set()
    for group in graph.groups:
        for unit in range(group.units):
            keep = {group.name: torch.arange(group.units) != unit}
            set_gates_(gated, keep)
            output = run(gated, x)
            assert relative_error(gated_output(model, graph, keep, x), output) < 1e-12
            outputs.add(output.sum().item())
    assert len(outputs) > 0.8 * graph.units, "only units that a ReLU silences may do the same"


def test_gates_that_are_neither_zero_nor_one_scale_what_the_readers_see() -> None:
    model, graph, x = traced("plain")
    gated = attach(model, graph, gate="hard-concrete")
    with torch.no_grad():
        gated.logits.copy_(torch.linspace(-4, 4, graph.units))
    first, second = gated.hard().double().split([8, 12])
    layers = [*model.children()]
    y = layers[3](layers[2](layers[1](layers[0](x))) * first[:, None, None])
    expected = layers[6](layers[5](layers[4](y)) * second)
    assert 0 < int((first * (1 - first) > 0).sum()) < 8
    assert relative_error(expected, gated(x)) < 1e-12
    assert relative_error(expected, gated.folded()(x)) < 1e-12
    assert surgery.check_equal(gated.folded(), surgery.cut(gated.folded(), graph, gated.keep()), x) < 1e-12


def test_folding_another_keep_opens_with_the_smallest_open_gate() -> None:
    model, graph, x = traced("plain")
    gated = attach(model, graph, gate=HardConcrete())
    with torch.no_grad():
        gated.logits.copy_(torch.linspace(-4, 4, graph.units))
    gates = gated.hard().detach()
    flat = torch.rand(graph.units, generator=torch.Generator().manual_seed(0)) < 0.6
    flat[0], flat[-1] = True, False
    assert gates[0] == 0
    assert gates[-1] == 1
    expected = torch.where(gates > 0, gates, gates[gates > 0].min()) * flat
    with torch.no_grad():
        weights = gated.gated_weights(expected)
    folded = dict(gated.folded(flat).named_parameters())
    assert weights.keys() == {"3.weight", "6.weight"}
    assert all(torch.equal(folded[name], weight) for name, weight in weights.items())
    masked = surgery.mask(gated.folded(flat), graph, gated.size.keep(flat))
    assert torch.equal(masked(x), gated.folded(flat)(x))
    with torch.no_grad():
        gated.logits.fill_(-5)
    assert torch.equal(gated.folded(torch.ones(graph.units, dtype=torch.bool))(x), model(x)), "none open: all ones"


def test_the_given_network_is_neither_changed_nor_shared() -> None:
    model, graph, x = traced("residual")
    model.train()
    before = copy.deepcopy(model.state_dict())
    gated = attach(model, graph)
    assert gated.training
    gated(x).sum().backward()
    torch.optim.SGD(gated.parameters(), lr=0.1).step()
    set_gates_(gated, random_keep(graph, 0))
    gated.folded()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not {id(p) for p in gated.parameters()} & {id(p) for p in model.parameters()}
    assert not torch.equal(before["a.weight"], gated.model.state_dict()["a.weight"])


def test_modes_of_submodules_are_kept() -> None:
    model, graph, _ = traced("residual")
    model.train().get_submodule("bn").eval()
    gated = attach(model, graph)
    assert [m.training for m in gated.model.modules()] == [m.training for m in model.modules()]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["residual", "tied_weight", "grouped"])
def test_gradients_reach_gates_and_weights(name: str, gate: str) -> None:
    model, graph, x = traced(name)
    gated = attach(model, graph, gate=gate).train()
    with torch.no_grad():
        gated.logits.fill_(0.4)
    torch.manual_seed(0)
    gated(x).square().sum().backward()
    assert gated.logits.grad is not None
    assert gated.logits.grad.isfinite().all()
    # the closed gates of one sample have no gradient, and Hard Concrete none where it is clipped
    assert (gated.logits.grad != 0).float().mean() > 0.3
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gated.parameters_of_model())


def test_gradient_of_the_gates_against_finite_differences() -> None:
    model, graph, x = traced("flatten_to_linear")
    gated = attach(model, graph, gate="hard-concrete").double().train()

    def loss(logits: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(gated, {"logits": logits}, (x,)).square().mean()

    at = torch.linspace(-1, 1, graph.units, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (at,))
    assert torch.autograd.grad(loss(at), at)[0].abs().max() > 1e-4


def test_training_mode_draws_one_sample_a_forward_and_moves_the_statistics() -> None:
    model, graph, x = traced("residual")
    gated = attach(model, graph, gate=MeanCentred(noise=0.2, relaxation=1.0)).train()
    with torch.no_grad():
        gated.logits.fill_(0.1)
    before = copy.deepcopy(gated.model.get_buffer("bn.running_mean"))
    torch.manual_seed(1)
    first, second = gated(x), gated(x)
    assert not torch.equal(first, second)
    assert not torch.equal(before, gated.model.get_buffer("bn.running_mean"))
    assert gated.model.get_buffer("bn.num_batches_tracked") == 2
    gated.eval()
    assert torch.equal(gated(x), gated(x))


def test_the_shift_is_added_to_every_logit() -> None:
    model, graph, _ = traced("residual")
    gated = attach(model, graph, gate=MeanCentred(noise=0.2))
    with torch.no_grad():
        gated.logits.copy_(torch.linspace(-1, 1, graph.units))
    gated.shift.fill_(0.7)
    moved = gated.logits.detach() + 0.7
    assert torch.equal(gated.hard(), (moved > 0).float())
    assert torch.equal(gated.chance(), torch.sigmoid(moved / 0.2))
    torch.manual_seed(0)
    found = gated.sample()
    torch.manual_seed(0)
    assert torch.equal(found, gated.gate.sample(moved, gated.group))


def test_keep_and_closed_are_complementary_and_named_by_group() -> None:
    model, graph, _ = traced("concat_then_add")
    gated = attach(model, graph)
    keep = random_keep(graph, 2)
    set_gates_(gated, keep)
    assert gated.keep().keys() == keep.keys() == gated.closed().keys()
    for name, flags in keep.items():
        assert torch.equal(gated.keep()[name], flags)
        assert torch.equal(gated.closed()[name], ~flags)


def test_state_dict_round_trip() -> None:
    model, graph, x = traced("residual")
    gated, other = attach(model, graph), attach(randomised(copy.deepcopy(model), seed=9), graph)
    set_gates_(gated, random_keep(graph, 1))
    gated.shift.fill_(0.25)
    assert not torch.equal(other(x), gated(x))
    other.load_state_dict(gated.state_dict())
    assert torch.equal(other(x), gated(x))
    assert other.shift == 0.25
    own = {key for key in gated.state_dict() if not key.startswith("model.")}
    assert own == {"logits", "shift", "group", "gate_of"}


def test_a_deep_copy_is_independent() -> None:
    model, graph, x = traced("depthwise")
    gated = attach(model, graph)
    twin = copy.deepcopy(gated)
    set_gates_(twin, random_keep(graph, 1))
    assert torch.equal(gated(x), model(x))
    assert not torch.equal(twin(x), model(x))
    assert relative_error(gated_output(model, graph, random_keep(graph, 1), x), twin(x)) < 1e-12


def test_tied_weights_stay_tied() -> None:
    model, graph, x = traced("tied_weight")
    gated = attach(model, graph)
    set_gates_(gated, random_keep(graph, 3))
    for network in (gated.model, gated.folded(), surgery.cut(gated.folded(), graph, gated.keep())):
        assert network.get_parameter("a.weight") is network.get_parameter("b.weight")
    gated.train()(x).sum().backward()
    assert gated.model.get_parameter("a.weight").grad is gated.model.get_parameter("b.weight").grad


def test_parameters_are_split_without_overlap() -> None:
    model, graph, _ = traced("tied_weight")
    gated = attach(model, graph)
    gates, weights = ({id(p) for p in part} for part in (gated.parameters_of_gates(), gated.parameters_of_model()))
    assert gates == {id(gated.logits)}
    assert not gates & weights
    assert gates | weights == {id(p) for p in gated.parameters()}
    assert gated.logits.dtype == torch.float32


def test_autocast() -> None:
    case = ZOO["residual"]
    model, x = randomised(case.build()), case.example(dtype=torch.float32)
    graph = surgery.trace(model, x)
    gated = attach(model.eval(), graph)
    keep = random_keep(graph, 0)
    masked = surgery.mask(model, graph, keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        set_gates_(gated, keep)
        assert torch.equal(gated(x), masked(x))
        output = gated.train()(x)
        assert gated.sample().dtype == torch.float32
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert gated.logits.grad is not None
    assert gated.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("gate", GATES)
def test_weights_of_half_precision_keep_it(gate: str) -> None:
    model, graph, x = traced("residual")
    model, x = model.bfloat16(), x.bfloat16()
    gated = attach(model, graph, gate=gate)
    assert gated.logits.dtype == torch.float32
    assert torch.equal(gated(x), model(x))
    gated.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in gated.parameters())


def test_a_network_without_free_channels_is_refused() -> None:
    for name, reason in (("nothing_free", "model output"), ("softmax_over_channels", "across the channels")):
        model, graph, _ = traced(name)
        with pytest.raises(NothingToCut, match="no channel that may be removed") as caught:
            attach(model, graph)
        assert f"{len(graph.pinned)} pinned entries" in str(caught.value)
        assert any(reason in pin.reason for pin in graph.pinned)


def test_the_function_is_not_hidden_by_a_module_of_its_name() -> None:
    """`diffprune.attach` was the module once anything had imported it."""
    for name in diffprune.__all__:
        assert not isinstance(getattr(diffprune, name), ModuleType), name


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    model, graph, _ = traced("residual")
    with pytest.raises(ValueError, match=r"diffprune, diffprune-deterministic, hard-concrete; got 'l0'"):
        attach(model, graph, gate="l0")
