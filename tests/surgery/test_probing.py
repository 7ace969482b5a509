"""The cuts that a graph is proven with: no two widths that meet may lose equally many in all of them."""

import itertools

import torch

from surgery.probing import lopsided, numbered, random


def test_groups_that_meet_have_different_numbers() -> None:
    units = dict.fromkeys("abcdefghij", 4)
    meetings = [("a", "b", "h"), ("b", "i"), ("c", "unknown")]
    number = numbered(units, meetings)
    assert set(number) == {"a", "b", "c", "h", "i"}
    assert all(number[x] != number[y] for meeting in meetings[:2] for x, y in itertools.combinations(meeting, 2))


def test_three_groups_in_a_row_lose_different_numbers() -> None:
    units = {name: 2 + i for i, name in enumerate("abc")}
    keeps = list(lopsided(units, [[name] for name in units]))
    lost = {name: tuple(int((~keep[name]).sum()) if name in keep else 0 for keep in keeps) for name in units}
    assert len(set(lost.values())) == 3
    assert all(any(counts) for counts in lost.values())


def test_every_keep_leaves_a_unit_and_closes_one() -> None:
    units = {"one": 1, "two": 2, "three": 3, "many": 40}
    for keep in (random(units), *lopsided(units, [units])):
        assert all(not flags.all() for flags in keep.values())
        assert all(flags.any() for name, flags in keep.items() if name != "one")
    assert not random(units)["many"][0]
    assert all(int(random(units)[name].sum()) >= 2 for name in ("three", "many"))
    assert torch.equal(random(units)["many"], random(units)["many"])
