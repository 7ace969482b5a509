"""Two finders that share no analysis must find the same units; where torch-pruning cannot, it is refused."""

import signal
import threading

import pytest
import torch
import torchvision
from oracle import gated_output, random_keep, relative_error, run
from zoo import ZOO, randomised, short_densenet

import surgery
from surgery import second_finder
from surgery.graph import ChannelGraph

LARGE = ("mobilenet_v3_small", "resnet50", "vgg11_bn", "googlenet", "regnet_y_400mf")
NETWORKS = ("densenet", "squeezenet1_1", *(pytest.param(name, marks=pytest.mark.soak) for name in LARGE))
SAME = (
    "plain", "residual", "concat_then_add", "dense_concat", "self_concat", "flatten_to_linear", "stack_mean", "grouped",
    "depthwise", "transposed", "conv_1d_3d", "shared_module", "tied_weight", "prelu_sigmoid", "two_inputs",
    "dict_input", "view_of_shape", "data_parallel", "sum_of_heads",
)
MISJUDGED = ("flip", "chunk_gate", "pixel_shuffle", "mean_over_channels")


def units(graph: ChannelGraph) -> set[frozenset[tuple[str, int, int]]]:
    """Every unit as the set of (tensor, axis, position) that it occupies."""
    return {
        frozenset((slot.tensor, slot.axis, int(p)) for slot in group.slots for p in slot.positions[unit])
        for group in graph.groups for unit in range(group.units)
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_both_finders_find_the_same_units(name: str) -> None:
    plain = {"init_weights": False} if name in ("googlenet", "vgg11_bn") else {}
    if name == "googlenet":  # torch-pruning looks at the eval-mode forward only, which leaves them out
        plain["aux_logits"] = False
    model = short_densenet() if name == "densenet" else torchvision.models.get_model(name, weights=None, **plain)
    x = torch.randn(1, 3, 64, 64)
    if name == "vgg11_bn":  # 4096 neurons of 25088 inputs would only cost time
        model.classifier = torch.nn.Sequential(torch.nn.Linear(25088, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    first = surgery.trace(model, x)
    second = second_finder.second_graph(model, x, first)
    assert units(first) == units(second)
    assert [group.name for group in first.groups] == [group.name for group in second.groups]
    assert first.units > 1000


@pytest.mark.parametrize("name", SAME)
def test_a_cut_along_the_second_graph_is_exact(name: str) -> None:
    case = ZOO[name]
    model, x = randomised(case.build()).double().requires_grad_(False), case.example()
    graph = surgery.trace(model, x, finder="torch-pruning")
    assert units(graph) == units(surgery.trace(model, x))
    keep = random_keep(graph, 0)
    assert relative_error(gated_output(model.eval(), graph, keep, x), run(surgery.cut(model, graph, keep), x)) < 1e-12
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", MISJUDGED)
def test_what_torch_pruning_misjudges_is_refused(name: str) -> None:
    case = ZOO[name]
    with pytest.raises(surgery.FinderFailed, match="torch-pruning gives no usable groups"):
        surgery.trace(randomised(case.build()).double().eval(), case.example(), finder="torch-pruning")


def test_a_search_that_does_not_end_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_finder, "SECONDS_LIMIT", 0.5)
    model = ZOO["plain"].build()

    def endless(*_: object, **__: object) -> None:
        while True:
            pass

    monkeypatch.setattr(second_finder.tp.DependencyGraph, "build_dependency", endless)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(surgery.FinderFailed, match="TimeoutError: not finished after"):
        surgery.trace(model, torch.randn(2, 3, 8, 8), finder="torch-pruning")
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_second_finder_stays_in_the_main_thread() -> None:
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            surgery.trace(ZOO["plain"].build(), torch.randn(2, 3, 8, 8), finder="torch-pruning")
        except surgery.FinderFailed as error:
            errors.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_an_unknown_finder_is_refused() -> None:
    with pytest.raises(ValueError, match="finder is one of names, torch-pruning"):
        surgery.trace(ZOO["plain"].build(), torch.randn(2, 3, 8, 8), finder="guess")
