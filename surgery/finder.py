"""`trace`: from a network to its channel graph, proven on a network that was really cut."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.capture import ExampleInputs, evaluating
from surgery.check import check_equal, compare, run
from surgery.cut import copied, cut_to, mask_
from surgery.doubts import Supposition, ranks, settle
from surgery.errors import BadKeep, NotEqual, NotFollowed, SurgeryError
from surgery.graph import ChannelGraph
from surgery.names import dense, distinct, relabelled
from surgery.observe import observe
from surgery.observed import Axis, Observed
from surgery.probing import lopsided, random
from surgery.twins import twinned
from surgery.units import AxisKey, build, resolve

FINDERS = ("names", "torch-pruning")
ROUNDS = 40
"""Cut networks are tried out at most this often before a trace is given up."""


def trace(model: nn.Module, example_inputs: ExampleInputs, *, finder: str = "names") -> ChannelGraph:
    """Which channels of `model` live or die together, and which are pinned and why.

    `example_inputs` is what the forward takes: a tensor, a tuple of positional or a mapping of keyword inputs; shapes
    and the path taken through the forward are those of the example. `finder` is "names" (default: runs the network
    once on the names of its channels) or "torch-pruning" (its DependencyGraph, as a second opinion). The model is
    unchanged. Before the graph is returned, units are cut out of copies: these must read the same names everywhere and
    compute what the masked network does; what fails is pinned with that reason.
    Raises CaptureFailed, NotFollowed.
    """
    if finder not in FINDERS:
        raise ValueError(f"finder is one of {', '.join(FINDERS)}; got {finder!r}")
    with twinned(model):
        seen = observe(model, example_inputs)
        graph = _Search(model, example_inputs, seen).run()
    if finder == "torch-pruning":
        from surgery.second_finder import second_graph

        return second_graph(model, example_inputs, graph)
    return graph


@dataclass(frozen=True)
class _Attempt:
    """A graph under suppositions; which doubts each group depends on, by key; which groups meet in one doubt."""

    graph: ChannelGraph
    doubted: Mapping[str, frozenset[str]]
    meetings: frozenset[frozenset[str]]


@dataclass(frozen=True)
class _Failure:
    """Why a cut network is not exact. It blames numbers only if all shapes and places were right."""

    text: str
    of_values: bool = False


class _Search:
    """Suppose, prove, and where the proof fails suppose something else of the lines to blame, or pin them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, seen: Observed) -> None:
        self.model, self.example, self.seen = model, example_inputs, seen
        self.suppositions: dict[str, Supposition] = {}
        self.pins: dict[str, str] = {}
        self.pinned: list[tuple[Tensor, str]] = []
        self.of_values = {doubt.key for doubt in seen.doubts if doubt.of_values}
        self.limit: dict[str, int] = {}
        for doubt in seen.doubts:
            self.limit[doubt.key] = max(self.limit.get(doubt.key, 1), ranks(doubt))

    def run(self) -> ChannelGraph:
        for _ in range(ROUNDS):
            attempt = self._attempt()
            failure = self._disproof(attempt, attempt.doubted)
            if failure is None:
                return _with_branches(attempt.graph, self.seen)
            blamed = self._blame(attempt, failure)
            for keys, found in blamed.items():
                self._reconsider(keys, found)
            if not blamed and not self._pin_groups(attempt):
                break
        raise NotFollowed(
            f"no cut of {type(self.model).__name__} could be shown to be exact: {failure.text if failure else ''}",
            at="surgery.trace",
            effect="no graph; the model is unchanged",
            fix="trace the parts of the network one by one to find the one that cannot be cut",
        )

    def _attempt(self) -> _Attempt:
        settled = settle(self.seen, self.model, self.suppositions, self.pins, self.pinned)
        axes, reasons = resolve(self.seen, settled.names, settled.label)
        inputs = {name: int(settled.label[channel]) for name, channel in self.seen.inputs.items()}
        axes |= settled.sizes
        tied_by = functools.partial(settled.names.tied_by, settled.label)
        graph = build(axes, reasons, self.seen.layers, self.model, inputs, self.seen.unseen, tied_by)
        return self._with_doubts(graph, settled.label, axes)

    def _with_doubts(self, graph: ChannelGraph, label: Tensor, axes: Mapping[AxisKey, Axis]) -> _Attempt:
        owner = torch.full((len(label) + 1,), -1)
        for i, group in enumerate(graph.groups):
            slot = group.slots[0]
            owner[axes[slot.tensor, slot.axis].names[slot.positions[:, 0]]] = i
        doubted: dict[str, set[str]] = {group.name: set() for group in graph.groups}
        meetings = set()
        for doubt in self.seen.doubts:
            met = owner[dense(relabelled(label, doubt.names))].unique().tolist()
            names = frozenset(graph.groups[i].name for i in met if i >= 0)
            for name in names:
                doubted[name].add(doubt.key)
            if not doubt.of_values:
                meetings.add(names)
        return _Attempt(graph, {name: frozenset(keys) for name, keys in doubted.items()}, frozenset(meetings))

    def _blame(self, attempt: _Attempt, together: _Failure) -> dict[frozenset[str], _Failure]:
        """Sets of lines whose groups fail on their own, with the failure; all of them, if none does."""
        sets: dict[frozenset[str], list[str]] = {}
        for name, keys in attempt.doubted.items():
            likely = frozenset(key for key in keys if (key in self.of_values) == together.of_values) or keys
            sets.setdefault(likely, []).append(name)
        blank = sets.pop(frozenset(), [])
        if len(sets) + bool(blank) > 1:
            alone = {keys: self._disproof(attempt, names) for keys, names in sets.items()}
            guilty = {keys: failure for keys, failure in alone.items() if failure}
            if guilty or (blank and self._disproof(attempt, blank)):
                return guilty
        return dict.fromkeys(sets, together)

    def _reconsider(self, keys: frozenset[str], failure: _Failure) -> None:
        now = {key: self.suppositions.get(key, Supposition()).next() for key in keys}
        if all(supposition.rank >= self.limit[key] for key, supposition in now.items()):
            self.pins |= dict.fromkeys(keys, failure.text)
        self.suppositions |= now

    def _pin_groups(self, attempt: _Attempt) -> bool:
        """No line is to blame: pin the groups that fail on their own."""
        before = len(self.pinned)
        for group in attempt.graph.groups:
            failure = self._disproof(attempt, [group.name])
            if failure:
                slot = next(s for s in group.slots if (s.tensor, s.axis) in self.seen.axes)
                channels = self.seen.axes[slot.tensor, slot.axis].names[slot.positions]
                self.pinned.append((channels, failure.text))
        return len(self.pinned) > before

    def _disproof(self, attempt: _Attempt, names: Iterable[str]) -> _Failure | None:
        """Cut units out of the groups `names`; None if that is exact.

        Where lines spell out shapes or places, several cuts in which widths that meet lose different numbers.
        """
        units = {name: attempt.graph.by_name[name].units for name in names}
        if not units:
            return None
        if any(attempt.doubted[name] - self.of_values for name in units):
            first, *others = lopsided(units, attempt.meetings)
            for keep in others:
                failure = self._misread(self.model, attempt.graph, keep)[0]
                if failure:
                    return failure
            # what is written into a slice shows in the values only
            failure = self._miscomputed(attempt.graph, first, seed=1)
            if failure:
                return failure
        return self._miscomputed(attempt.graph, random(units))

    def _misread(
        self, model: nn.Module, graph: ChannelGraph, keep: dict[str, Tensor]
    ) -> tuple[_Failure | None, Observed | None]:
        """Does a cut of `model` run and read the names that it did? Also what was seen of it."""
        try:
            alive = _checked(graph, keep)[1]
            small = cut_to(model, graph, alive)
            with twinned(small):
                again = observe(small, self.example)
        except SurgeryError as error:
            return _Failure(f"a cut network does not run ({str(error).splitlines()[0]})"), None
        if not _same_names(self.seen, again, alive):
            return _Failure("a cut network reads other channels"), again
        return None, again

    def _miscomputed(self, graph: ChannelGraph, keep: dict[str, Tensor], seed: int = 0) -> _Failure | None:
        """Does a cut network compute what the masked one does?"""
        probe = _perturbed(self.model, seed)
        failure, again = self._misread(probe, graph, keep)
        if failure or again is None:
            return failure
        mask_(probe, graph, _checked(graph, keep)[0])
        try:
            if self.seen.boxed:
                _compare_boxed(observe(probe, self.example).boxed, again.boxed)
            else:
                with torch.no_grad(), evaluating(probe):
                    compare(run(probe, self.example), again.output, "surgery.trace")
        except NotEqual as error:
            text = str(error).splitlines()[0]
            shape = not self.seen.boxed and _shapes(again.output) != _shapes(self.seen.output)
            if shape or not self._equal_in_float64(probe, graph, keep, seed):
                return _Failure(f"a cut network could not be shown to compute the same ({text})", of_values=not shape)
        return None

    def _equal_in_float64(self, masked: nn.Module, graph: ChannelGraph, keep: dict[str, Tensor], seed: int) -> bool:
        """In single precision, rounding in a deep network may look like an error."""
        small = cut_to(_perturbed(self.model, seed), graph, _checked(graph, keep)[1])
        example = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, self.example
        )
        try:
            return check_equal(masked.double(), small.double(), example, tolerance=1e-9) <= 1e-9
        except (NotEqual, RuntimeError):  # some networks do not run in double precision
            return False


def _with_branches(graph: ChannelGraph, seen: Observed) -> ChannelGraph:
    """Mark the groups beside whose readers the input reaches every output.

    Per node, the groups (as bits) that every way from the input to it passes through a reader of: what all its sources
    have in common, and what it reads itself.
    """
    bit: dict[AxisKey, int] = {}
    for i, group in enumerate(graph.groups):
        for slot in group.readers:
            bit[slot.tensor, slot.axis] = bit.get((slot.tensor, slot.axis), 0) | 1 << i
    passed: list[int] = []
    for node in seen.nodes:
        common = functools.reduce(int.__and__, (passed[source] for source in node.sources)) if node.sources else 0
        passed.append(functools.reduce(int.__or__, (bit.get(key, 0) for key in node.reads), common))
    needed = functools.reduce(int.__or__, (passed[end] if end >= 0 else -1 for end in seen.ends), 0)
    groups = tuple(
        replace(group, droppable=not needed >> i & 1 and not group.norms) for i, group in enumerate(graph.groups)
    )
    return replace(graph, groups=groups)


def _compare_boxed(masked: list[tuple[str, Tensor]], small: list[tuple[str, Tensor]]) -> None:
    """What black boxes got, as long as both went one way, and where shapes are equal: rounding may decide."""
    both = list(zip(masked, small, strict=False))
    way = next((i for i, ((a, _), (b, _)) in enumerate(both) if a != b), len(both))
    pairs = [(a, b) for (_, a), (_, b) in both[:way] if a.shape == b.shape and a.unique().numel() > 1]
    if pairs:
        compare([a for a, _ in pairs], [b for _, b in pairs], "surgery.trace")


def _shapes(output: object) -> list[torch.Size]:
    return [leaf.shape for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _checked(graph: ChannelGraph, keep: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[AxisKey, Tensor]]:
    """`keep` checked; where groups of one unit empty an axis together, all of these are kept."""
    try:
        return graph.checked(keep)
    except BadKeep:
        return graph.checked({name: flags for name, flags in keep.items() if len(flags) > 1})


def _perturbed(model: nn.Module, seed: int) -> nn.Module:
    """A copy with weights of an order that shows errors: a head of zeros or a scale of 1e-6 would hide them."""
    probe = copied(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in probe.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1:
                parameter.add_(_noise(parameter.shape, generator).to(parameter))
    return probe


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Of the order that weights of this shape are initialised with; of rank one, for that is quickly made."""
    factors = []
    for axis, n in enumerate(shape[:2]):
        view = [-1 if a == axis else 1 for a in range(len(shape))]
        factors.append(torch.rand(n, generator=generator).mul_(2).sub_(1).view(view))
    noise = factors[0] * 0.3 if len(factors) == 1 else factors[0] * factors[1]
    return noise if len(shape) < 2 else noise * shape[1:].numel() ** -0.5


def _same_names(before: Observed, after: Observed, alive: Mapping[AxisKey, Tensor]) -> bool:
    """Does every class of the small network lie in one class of the dense one, on every axis?

    The dense classes may be coarser: ties that a single head does not need any more do no harm. What is left of length
    1 may be seen as another kind of axis or as none, and so may a parameter that is used element by element.
    """
    free = before.elements.keys() | after.elements.keys()
    gone = [key for key in before.axes.keys() - after.axes.keys() if key not in alive or alive[key].sum() > 1]
    more = [key for key in after.axes.keys() - before.axes.keys() if len(after.axes[key].names) > 1]
    if {tensor for tensor, _ in (*gone, *more)} - free and not before.boxed:  # a black box may go another way
        return False
    both = list(before.axes.keys() & after.axes.keys())
    old = [before.axes[key].names[alive[key]] if key in alive else before.axes[key].names for key in both]
    new = [after.axes[key].names for key in both]
    if not before.boxed:  # what decides by values may give any number of outputs
        old, new = old + before.output_names, new + after.output_names
    if [names.shape for names in old] != [names.shape for names in new]:
        return False
    old, new = ([names.flatten() for names in side] for side in (old, new))
    classes = [relabelled(s.names.classes(), torch.cat(n)) for s, n in ((before, old), (after, new))]
    unique = distinct(torch.stack(classes))
    return bool(unique.shape[1] == len(unique[1].unique()))
