"""Every hazard of the zoo is cut exactly, or pinned with a reason that names the operator."""

import pytest
import torch
from oracle import gated_output, random_keep, relative_error, run
from zoo import ZOO, randomised, traced

import surgery


@pytest.mark.parametrize("name", ZOO)
def test_cut_computes_what_the_gated_network_does(name: str) -> None:
    case, (model, graph, x) = ZOO[name], traced(name)
    names = [group.name for group in graph.groups]
    assert [name for name in case.free if name not in names] == [], graph.summary()
    if case.pinned:
        assert any(case.pinned in pin.reason for pin in graph.pinned), graph.summary()
    for seed in range(4):
        keep = random_keep(graph, seed)
        small = surgery.cut(model, graph, keep)
        expected = gated_output(model, graph, keep, x)
        assert relative_error(expected, run(small, x)) < 1e-12
        assert surgery.check_equal(surgery.mask(model, graph, keep), small, x) < 1e-12
        assert run(small, case.example(batch=3)) is not None  # another batch size runs too


@pytest.mark.parametrize("name", ["residual", "grouped", "depthwise", "group_norm", "attention"])
def test_bfloat16_and_channels_last_stay_what_they_are(name: str) -> None:
    layouts = {torch.bfloat16: torch.contiguous_format, torch.float32: torch.channels_last}
    units = {group.name: group.units for group in surgery.trace(ZOO[name].build(), ZOO[name].example().float()).groups}
    for dtype, layout in layouts.items():
        model = randomised(ZOO[name].build()).eval().to(dtype=dtype, memory_format=layout)
        x = ZOO[name].example(dtype=dtype)
        graph = surgery.trace(model, x)
        assert {group.name: group.units for group in graph.groups} == units
        keep = random_keep(graph, 0)
        small = surgery.cut(model, graph, keep)
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert all(p.is_contiguous(memory_format=layout) for p in small.parameters() if p.dim() == 4)
        surgery.check_equal(surgery.mask(model, graph, keep), small, x)


def test_a_wrong_slice_is_seen() -> None:
    model = randomised(ZOO["residual"].build()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = surgery.trace(model, x)
    keep = {"a": torch.tensor([True, True, True, False, True, True])}
    wrong = {"a": torch.tensor([True, True, False, True, True, True])}
    with pytest.raises(surgery.NotEqual, match="differs by"):
        surgery.check_equal(surgery.mask(model, graph, keep), surgery.cut(model, graph, wrong), x)
    assert relative_error(gated_output(model, graph, keep, x), surgery.cut(model, graph, wrong)(x)) > 1e-3


def test_a_head_that_runs_in_training_only_is_cut_along() -> None:
    model = randomised(ZOO["training_head"].build()).double()
    x = ZOO["training_head"].example()
    graph = surgery.trace(model, x)
    small = surgery.cut(model, graph, random_keep(graph, 0)).train()
    assert small.aux.in_channels < 8
    assert [tuple(output.shape) for output in small(x)] == [(2, 5), (2, 4)]


def test_heads_that_an_attribute_counts_are_counted_anew() -> None:
    model = randomised(ZOO["remembered_heads"].build()).double().eval()
    graph = surgery.trace(model, ZOO["remembered_heads"].example())
    assert graph.by_name["attend.q"].kind == "head"
    small = surgery.cut(model, graph, {"attend.q": torch.tensor([True, False, True])})
    assert (small.attend.num_heads, small.attend.width, small.attend.all_width) == (2, 4, 8)
