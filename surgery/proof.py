"""The proof of a graph: units are really cut out, and what is left must read the same names and compute the same."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture import ExampleInputs, evaluating, tensors_in
from surgery.check import check_equal, compare, run
from surgery.cut import cut_to, mask_
from surgery.errors import BadKeep, NotEqual, SurgeryError, first_line
from surgery.graph import ChannelGraph
from surgery.names import NEUTRAL, dense, distinct, relabelled
from surgery.observe import observe
from surgery.observed import Doubt, Observed
from surgery.probing import equal, lopsided, random, without_first
from surgery.rebuilding import copied
from surgery.twins import twinned
from surgery.units import AxisKey


@dataclass(frozen=True)
class Failure:
    """Why a cut network is not exact. It blames numbers only if all shapes and places were right.

    `line` is the key of the doubt to blame, if that is known.
    """

    text: str
    of_values: bool = False
    line: str = ""


@dataclass(frozen=True)
class _Trial:
    """What is cut out to find out: a complete keep, and which indices survive along each axis."""

    graph: ChannelGraph
    keep: Mapping[str, Tensor]
    alive: Mapping[AxisKey, Tensor]


class Proof:
    """Cuts of `model` against what was `seen` of it."""

    def __init__(self, model: nn.Module, example: ExampleInputs, seen: Observed) -> None:
        self.model, self.example, self.seen, self.cuts = model, example, seen, 0
        self.bland = _bland(model)
        self.label = seen.names.classes()
        if seen.boxed:  # what decides by values may go another way, and treat what may not change in another
            pinned = torch.cat([self.label[names] for names, _ in seen.names.pins])
            self.label[torch.isin(self.label, pinned)] = int(pinned[0])

    def disproof(
        self, graph: ChannelGraph, names: Iterable[str], meetings: Iterable[Iterable[str]] = ()
    ) -> Failure | None:
        """Cut units out of the groups `names`; None if that is exact.

        Where lines spell out shapes or places (`meetings`: of which groups), in several cuts widths that meet lose
        different numbers.
        """
        units = {name: graph.by_name[name].units for name in names}
        if not units:
            return None
        return next(filter(None, self._failures(graph, units, meetings)), None)

    def _failures(
        self, graph: ChannelGraph, units: Mapping[str, int], meetings: Iterable[Iterable[str]]
    ) -> Iterator[Failure | None]:
        for keep in lopsided(units, meetings) if meetings else ():
            yield self._misshapen(_trial(graph, keep))
        first, computed = _trial(graph, without_first(units, _sharing(graph))), False
        if meetings:  # what is written into a slice shows in the values only
            computed = self.seen.mutated
            yield (self._miscomputed if computed else self._misshapen)(first)
        yield self._miscomputed(_trial(graph, random(units)))
        if 2 in units.values() and not computed:  # a number that channels meet may be that of the first, or of the last
            yield self._miscomputed(first)

    def equals(self, graph: ChannelGraph) -> list[str]:
        """Groups that may not become equally wide together, as few as show it. A forward can ask that in Python."""
        channels = {group.name: (group.units, group.slots[0].positions.shape[1]) for group in graph.groups}
        guilty = list(channels)
        if len(guilty) < 2:
            return []
        keep = equal(channels)
        if not self._misshapen(_trial(graph, keep)):
            return []
        for name in channels:
            others = [other for other in guilty if other != name]
            if self._misshapen(_trial(graph, {other: keep[other] for other in others})):
                guilty = others
        return guilty

    def _misshapen(self, trial: _Trial) -> Failure | None:
        """`_misread` of a cut network whose weights hold no values, if none are needed."""
        small = cut_to(self.model, trial.graph, trial.alive, hollow=not self.seen.computed)
        return self._misread(trial, small, spent=True)

    def _misread(self, trial: _Trial, small: nn.Module, *, spent: bool = False) -> Failure | None:
        """Does the cut network run, read the names that the dense one did, and compute with the same constants?"""
        self.cuts += 1
        try:
            with twinned(small):
                again = observe(small, self.example, self.seen, spent=spent)
        except SurgeryError as error:
            return Failure(f"a cut network does not run ({first_line(error)})")
        if not self._same_names(again, trial.alive):
            return Failure("a cut network reads other channels")
        return self._other_constant(again, trial.alive)

    def _miscomputed(self, trial: _Trial) -> Failure | None:
        """Does a cut network compute what the masked one does?"""
        small = self._small(trial)
        failure = self._misread(trial, small)
        if failure:
            return failure
        try:
            output = self._output(small)
        except Exception as error:  # what a copy remembers of the dense one, such as a cache, does not fit it
            return Failure(f"a cut network does not run ({first_line(error)})")
        del small  # one copy of the network at a time
        masked = self._masked(trial)
        try:
            same = _compare_boxed if self.seen.boxed else compare
            same(self._output(masked), output, "surgery.trace")
        except NotEqual as error:
            text = first_line(error)
            shape = not self.seen.boxed and _shapes(output) != _shapes(self.seen.output)
            if shape or not self._equal_in_float64(masked, self._small(trial)):
                return Failure(f"a cut network could not be shown to compute the same ({text})", of_values=not shape)
        return None

    def _same_names(self, after: Observed, alive: Mapping[AxisKey, Tensor]) -> bool:
        """Does every class of the small network lie in one class of the dense one, on every axis?

        The dense classes may be coarser: ties that a single head does not need any more do no harm. What is left of
        length 1 may be seen as another kind of axis or as none, and so may a parameter that is used element by element.
        """
        before = self.seen
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
        classes = [relabelled(self.label, torch.cat(old)), relabelled(after.names.classes(), torch.cat(new))]
        unique = distinct(torch.stack(classes))
        return bool(unique.shape[1] == len(unique[1].unique()))

    def _other_constant(self, after: Observed, alive: Mapping[AxisKey, Tensor]) -> Failure | None:
        """A number or constant that channels meet and that a cut changes: an output may be too blunt to show it."""
        before = self.seen
        living = torch.ones(before.names.count, dtype=torch.bool)
        for key, flags in alive.items():
            if key in before.axes:
                living[self.label[before.axes[key].names[~flags]]] = False
        old, new = (_by_line(seen.doubts) for seen in (before, after))
        lives = living[self.label]
        for line in old.keys() & new.keys():
            same_number = len(old[line]) == len(new[line])  # another one: a width of one channel raises no doubt
            if same_number and not all(_follow(a, b, lives) for a, b in zip(old[line], new[line], strict=True)):
                return Failure("it is another one after a cut", of_values=True, line=line)
        return None

    def _small(self, trial: _Trial) -> nn.Module:
        small = cut_to(self.model, trial.graph, trial.alive)
        _perturb_(small, self.bland, trial.graph.shapes, trial.alive)
        return small

    def _masked(self, trial: _Trial) -> nn.Module:
        masked = copied(self.model)
        _perturb_(masked, self.bland, trial.graph.shapes)
        mask_(masked, trial.graph, trial.keep)
        return masked

    def _output(self, model: nn.Module) -> Any:
        """What `model` computes; of black boxes, what they get."""
        if self.seen.boxed:
            return observe(model, self.example).boxed
        with torch.no_grad(), evaluating(model):
            return run(model, self.example)

    def _equal_in_float64(self, masked: nn.Module, small: nn.Module) -> bool:
        """In single precision, rounding in a deep network may look like an error."""
        example = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, self.example
        )
        try:
            return check_equal(masked.double(), small.double(), example, tolerance=1e-9) <= 1e-9
        except (NotEqual, RuntimeError):  # some networks do not run in double precision
            return False


def _sharing(graph: ChannelGraph) -> set[str]:
    """Groups beside which there are other channels in every width."""
    return {
        group.name for group in graph.groups
        if all(graph.length(slot.tensor, slot.axis) > slot.positions.numel() for slot in group.slots)
    }


def _trial(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> _Trial:
    """Where groups of one unit empty an axis together, all of these are kept."""
    try:
        return _Trial(graph, *graph.checked(keep))
    except BadKeep:
        return _Trial(graph, *graph.checked({name: flags for name, flags in keep.items() if len(flags) > 1}))


def _compare_boxed(masked: list[tuple[str, Tensor]], small: list[tuple[str, Tensor]], at: str) -> None:
    """What black boxes got, as long as both went one way, and where shapes are equal: rounding may decide."""
    both = list(zip(masked, small, strict=False))
    way = next((i for i, ((a, _), (b, _)) in enumerate(both) if a != b), len(both))
    pairs = [(a, b) for (_, a), (_, b) in both[:way] if a.shape == b.shape and a.unique().numel() > 1]
    if pairs:
        compare([a for a, _ in pairs], [b for _, b in pairs], at)


def _shapes(output: object) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_in(output)]


def _scale(shape: torch.Size) -> float:
    """The order that weights of this shape are initialised with."""
    return 0.3 if len(shape) == 1 else shape[1:].numel() ** -0.5


def _bland(model: nn.Module) -> set[str]:
    """Weights that hardly vary, such as a head of zeros or a scale of 1e-6: they would hide errors."""
    return {
        name for name, p in model.named_parameters()
        if p.is_floating_point() and p.numel() > 1 and p.detach().float().std() < 1e-3 * _scale(p.shape)
    }


def _perturb_(
    model: nn.Module, names: Collection[str], shapes: Mapping[str, Sequence[int]],
    alive: Mapping[AxisKey, Tensor] | None = None,
) -> None:
    """Add noise to the weights `names`, of rank one, for that is quickly made.

    What a cut left of the network, the indices `alive`, gets the noise that it would have in the dense one.
    """
    generator = torch.Generator().manual_seed(0)
    for name in sorted(names):
        parameter, shape = model.get_parameter(name), torch.Size(shapes[name])
        factors = [torch.ones(1).to(parameter)] * 2
        for axis, n in enumerate(shape[:2]):
            factor = torch.rand(n, generator=generator).mul_(2).sub_(1)
            flags = (alive or {}).get((name, axis))
            view = [-1 if a == axis else 1 for a in range(len(shape))]
            factors[axis] = (factor if flags is None else factor[flags]).view(view).to(parameter)
        with torch.no_grad():
            parameter.addcmul_(*factors, value=_scale(shape))


def _by_line(doubts: Iterable[Doubt]) -> dict[str, list[Doubt]]:
    found: dict[str, list[Doubt]] = {}
    for doubt in doubts:
        if doubt.of_values:
            found.setdefault(doubt.key, []).append(doubt)
    return found


def _follow(before: Doubt, after: Doubt, living: Tensor) -> bool:
    """Are the constants of a small network those of the dense one at the channels that live?"""
    names = dense(before.names)
    lives = torch.where(names == NEUTRAL, True, living[names.clamp_min(0)])
    return len(before.constants) == len(after.constants) and all(
        _close(_restricted(old, lives), new.flatten())
        for old, new in zip(before.constants, after.constants, strict=True)
    )


def _restricted(constant: Tensor, lives: Tensor) -> Tensor:
    """The elements of `constant` that meet a channel that lives, shape (elements,)."""
    constant = constant[(None,) * (lives.dim() - constant.dim())]
    for axis, n in enumerate(constant.shape):
        lives = lives.any(axis, keepdim=True) if n == 1 else lives
    return constant[lives.expand(constant.shape)]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=0.0, equal_nan=True)
