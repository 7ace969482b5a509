"""`trace`: from a network to its channel graph, proven on a network that was really cut."""

import functools
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from surgery.capture import ExampleInputs, restored
from surgery.doubts import Supposition, lookalikes, ranks, settle
from surgery.errors import CaptureFailed, NotFollowed
from surgery.graph import ChannelGraph, ChannelGroup
from surgery.names import dense, relabelled
from surgery.observe import observe
from surgery.observed import Axis, Observed
from surgery.proof import Failure, Proof
from surgery.twins import twinned
from surgery.units import AxisKey, build, resolve

FINDERS = ("names", "torch-pruning")
ROUNDS = 40
"""So often is something else supposed before a trace is given up."""
CUTS = 200
"""So many networks are cut to try out what is supposed; then all lines that are still in doubt are pinned."""
SECONDS = 600.0
"""A search that takes longer is given up."""


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
    _require_network(model)
    with twinned(model), restored(model.parameters()):
        seen = observe(model, example_inputs)
        graph = _Search(model, example_inputs, seen).run()
    if finder == "torch-pruning":
        from surgery.second_finder import second_graph

        return second_graph(model, example_inputs, graph)
    return graph


def _require_network(model: object) -> None:
    """Raises CaptureFailed for what is no plain nn.Module that holds its values."""
    if not isinstance(model, nn.Module):
        what = f"{model.__name__}, a class," if isinstance(model, type) else type(model).__name__
        fact, fix = f"{what} is not a network", "give an nn.Module that was built"
    elif any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        fact, fix = f"{type(model).__name__} is compiled by TorchScript", "give the nn.Module that it was made from"
    elif isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        fact, fix = "the network is compiled by torch.compile", "give the nn.Module that it was made from"
    elif any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        fact, fix = f"{type(model).__name__} has lazy layers that have not run yet", "run it once on the example inputs"
    elif (default := torch.get_default_device()).type != "cpu":  # names of channels are bookkeeping, kept on the CPU
        fact, fix = f"torch makes new tensors on {default}", "reset it: torch.set_default_device('cpu')"
    else:
        return
    raise CaptureFailed(fact, at="surgery.trace", effect="no graph", fix=fix)


@dataclass(frozen=True)
class _Attempt:
    """A graph under suppositions; which doubts each group depends on, by key; which groups meet in one doubt."""

    graph: ChannelGraph
    doubted: Mapping[str, frozenset[str]]
    meetings: frozenset[frozenset[str]]


class _Search:
    """Suppose, prove, and where the proof fails suppose something else of the lines to blame, or pin them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, seen: Observed) -> None:
        self.model, self.seen, self.proof = model, seen, Proof(model, example_inputs, seen)
        self.suppositions: dict[str, Supposition] = {}
        self.pins: dict[str, str] = {}
        self.pinned: list[tuple[Tensor, str]] = []
        self.of_values = {doubt.key for doubt in seen.doubts if doubt.of_values}
        self.limit: dict[str, int] = {}
        self.alike: dict[str, int] = {}
        for doubt in seen.doubts:
            self.limit[doubt.key] = max(self.limit.get(doubt.key, 1), ranks(doubt))
            self.alike[doubt.key] = max(self.alike.get(doubt.key, 1), lookalikes(model, doubt))

    def run(self) -> ChannelGraph:
        deadline = time.monotonic() + SECONDS
        for _ in range(ROUNDS):
            attempt = self._attempt()
            failure = self._disproof(attempt, attempt.doubted)
            if failure is None:
                if self._pin_equals(attempt):
                    continue
                return _with_branches(self._without_coincidences(attempt), self.seen)
            if time.monotonic() > deadline:
                break
            if self.proof.cuts > CUTS:
                rest = {doubt.key for doubt in self.seen.doubts} - self.pins.keys()
                self.pins |= dict.fromkeys(rest, f"nothing was proven in {CUTS} cuts")
                continue
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

    def _without_coincidences(self, attempt: _Attempt) -> ChannelGraph:
        """Without the sizes that cuts are exact without: a number that only happens to be as large as a width stays.

        Those of one class and attribute are read by the same code, and stay or go together.
        """
        seen = {name for name, _ in self.seen.axes}  # all other sizes are supposed
        alike: dict[tuple[type[nn.Module], str], set[str]] = {}
        for name in sorted(attempt.graph.sizes.keys() - seen):
            owner, _, attribute = name.rpartition(".")
            alike.setdefault((type(self.model.get_submodule(owner)), attribute), set()).add(name)
        for names in alike.values():
            groups = [g.name for g in attempt.graph.groups if any(slot.tensor in names for slot in g.slots)]
            less = replace(attempt, graph=_without_sizes(attempt.graph, names))
            if self._disproof(less, groups) is None:
                attempt = less
        return attempt.graph

    def _blame(self, attempt: _Attempt, together: Failure) -> dict[frozenset[str], Failure]:
        """Sets of lines whose groups fail on their own, with the failure; all of them, if none does."""
        if together.line:
            return {frozenset([together.line]): together}
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

    def _reconsider(self, keys: frozenset[str], failure: Failure) -> None:
        if failure.line:
            self.pins[failure.line] = failure.text
            return
        now = {key: self.suppositions.get(key, Supposition()).next(self.alike[key]) for key in keys}
        if all(supposition.rank >= self.limit[key] for key, supposition in now.items()):
            self.pins |= dict.fromkeys(keys, failure.text)
        self.suppositions |= now

    def _pin_groups(self, attempt: _Attempt) -> bool:
        """No line is to blame: pin the groups that fail on their own."""
        before = len(self.pinned)
        for group in attempt.graph.groups:
            failure = self._disproof(attempt, [group.name])
            if failure:
                self._pin(group, failure.text)
        return len(self.pinned) > before

    def _pin_equals(self, attempt: _Attempt) -> bool:
        """Pin the groups of which the forward asks whether they are equally wide: then it goes another way."""
        guilty = self.proof.equals(attempt.graph)
        for name in guilty:
            self._pin(attempt.graph.by_name[name], "the forward goes another way where widths are equal")
        return bool(guilty)

    def _pin(self, group: ChannelGroup, reason: str) -> None:
        slot = next(s for s in group.slots if (s.tensor, s.axis) in self.seen.axes)
        self.pinned.append((self.seen.axes[slot.tensor, slot.axis].names[slot.positions], reason))

    def _disproof(self, attempt: _Attempt, names: Iterable[str]) -> Failure | None:
        names = list(names)
        spelled = any(attempt.doubted[name] - self.of_values for name in names)
        return self.proof.disproof(attempt.graph, names, attempt.meetings if spelled else ())


def _without_sizes(graph: ChannelGraph, names: Collection[str]) -> ChannelGraph:
    groups = tuple(
        replace(group, slots=tuple(slot for slot in group.slots if slot.tensor not in names)) for group in graph.groups
    )
    return replace(graph, groups=groups, sizes={n: size for n, size in graph.sizes.items() if n not in names})


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
    return replace(graph, groups=groups, fixed=seen.fixed)
