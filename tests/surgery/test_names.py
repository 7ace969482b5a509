"""Union-find on tensors against one written with dictionaries, and the laws of expanded names."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.names import NEUTRAL, Names, dense, together, varying

PAIRS = st.lists(st.tuples(st.integers(NEUTRAL, 19), st.integers(NEUTRAL, 19)), max_size=40)


def brute_force(n: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The smallest member of everyone's component, by merging sets."""
    component = {i: {i} for i in range(n)}
    for a, b in pairs:
        if NEUTRAL not in (a, b) and component[a] is not component[b]:
            merged = component[a] | component[b]
            for member in merged:
                component[member] = merged
    return [min(component[i]) for i in range(n)]


@given(PAIRS, st.integers(1, 5))
def test_classes_are_the_connected_components(pairs: list[tuple[int, int]], size: int) -> None:
    names = Names()
    names.fresh(20)
    for i in range(0, len(pairs), size):
        a, b = torch.tensor(pairs[i : i + size]).unbind(1)
        names.tie(a, b)
    assert names.classes().tolist() == brute_force(20, pairs)


@given(PAIRS, st.lists(st.integers(NEUTRAL, 19), max_size=4))
def test_a_pin_holds_for_the_whole_class(pairs: list[tuple[int, int]], pinned: list[int]) -> None:
    names = Names()
    names.fresh(20)
    for a, b in pairs:
        names.tie(torch.tensor([a]), torch.tensor([b]))
    for i, name in enumerate(pinned):
        names.pin(torch.tensor([name]), f"reason {i}")
    labels = brute_force(20, pairs)
    expected: dict[int, str] = {}
    for i, name in enumerate(pinned):
        if name != NEUTRAL:
            expected.setdefault(labels[name], f"reason {i}")
    assert names.reasons(names.classes()) == expected


def test_a_long_chain_is_one_class() -> None:
    names = Names()
    chain = names.fresh(5000)[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    names.tie(chain[1:], chain[:-1])
    assert (names.classes() == 0).all()


def test_a_tie_broadcasts() -> None:
    names = Names()
    grid = names.fresh(6).view(2, 3)
    names.tie(grid, grid[:, :1])
    assert names.classes().tolist() == [0, 0, 0, 3, 3, 3]


SHAPES = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4)


@given(SHAPES)
def test_dense_loses_no_element_and_varying_sees_only_change(axes: list[tuple[int, bool]]) -> None:
    small = torch.Size(1 if expanded else n for n, expanded in axes)
    names = torch.arange(small.numel()).view(small).expand([n for n, _ in axes])
    assert torch.equal(dense(names).expand(names.shape), names)
    assert dense(names).numel() == small.numel()
    assert varying(names) == [a for a, (n, expanded) in enumerate(axes) if n > 1 and not expanded]
    assert varying(names.clone()) == varying(names)  # constant, though not expanded


@given(SHAPES, st.integers(0, 3))
def test_together_is_the_same_on_expanded_and_on_full_tensors(axes: list[tuple[int, bool]], fixed: int) -> None:
    fixed %= len(axes)
    small = torch.Size(1 if expanded else n for n, expanded in axes)
    shape = [n for n, _ in axes]
    a = torch.arange(small.numel()).view(small).expand(shape)
    b = (100 + torch.arange(small.numel())).view(small).expand(shape)
    joined = together(lambda x, y: torch.cat((x, y), fixed), (a, b), fixed=fixed)
    assert torch.equal(joined, torch.cat((a.clone(), b.clone()), fixed))
    assert torch.equal(together(torch.maximum, (a, b)), torch.maximum(a, b))


def test_together_keeps_expanded_axes_free_of_memory() -> None:
    names = torch.arange(8).view(1, 8, 1).expand(64, 8, 4096)
    assert together(torch.maximum, (names, names)).untyped_storage().nbytes() == 8 * 8
