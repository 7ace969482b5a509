"""A budget of speed-up is met on the machine: the network that would be cut is exported, measured, and corrected."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import export
import surgery
from diffprune.budget import Budget
from diffprune.errors import BadBudget
from diffprune.landing import Landing, land, least, least_share, unreachable
from diffprune.timed import TimedSize
from diffprune.timing import timed_file, timed_network
from diffprune.training import Event
from export import Comparison, Settings
from export.settings import ONE_THREAD

EXCESS = 0.05
"""A measured speed-up may lie this far above the one asked: widths come in steps."""

AIM = 0.015
"""So far above the speed-up asked lies what is aimed at, so that a little noise does not end below it."""

NOISE = 0.05
"""Half the width of an interval, as a share of the speed-up, above which the machine is too noisy to meet a budget."""

LARGEST = 0.999
"""The share of the dense latency that a correction asks for at most: a budget is below 1."""

Try = tuple[Landing, Comparison]

TRIES = 7
LAST_RESORT = 4
"""After so many tries that were all too slow the smallest network is measured: what it reaches is all there is."""

SMALLEST = 1e6
"""More than any network can be asked for."""

MOST = 1.5
"""The next try asks for at most so many times what the last one did."""

SECONDS = 6.0
"""How long each try is measured."""

NEAR = 0.8
"""From this share of the largest speed-up predicted on, the largest is measured before anything is trained."""


@dataclass(frozen=True, eq=False)
class Stopwatch:
    """The dense network, and what its widths cost on the target; `measure` holds a cut one against it there.

    `versus` compares the dense network with a smaller one, for so many seconds.
    """

    parent: nn.Module
    graph: surgery.ChannelGraph
    size: TimedSize
    versus: Callable[[nn.Module, float], Comparison]

    def measure(self, flat: Tensor, times: int = 1) -> Comparison:
        """Dense against the network that keeps the units in `flat`, shape (units,), for `times` SECONDS."""
        return self.versus(surgery.cut(self.parent, self.graph, self.size.keep(flat)), times * SECONDS)

    def fastest(self, round_to: int, gate_of: Tensor | None = None) -> Comparison:
        """Dense against the smallest network that can be cut."""
        return self.measure(least(self.size, round_to, gate_of))

    def predictable(self, budget: Budget, round_to: int, gate_of: Tensor | None = None) -> Budget:
        """`budget`, or the most that the table expects of the smallest network, which may measure faster."""
        share = max(budget.share, least_share(budget, self.size, round_to, gate_of))
        return Budget(speedup=1 / min(share, LARGEST))

    def require_reachable(self, budget: Budget, round_to: int, gate_of: Tensor | None = None) -> None:
        """Raises BudgetUnreachable by measuring the smallest network, unless the prediction leaves no doubt."""
        if NEAR / least_share(budget, self.size, round_to, gate_of) > budget.asked:
            return
        fastest = self.fastest(round_to, gate_of)
        if fastest.high < budget.asked:
            raise unreachable(budget, 1 / fastest.speedup, round_to)

    def land(
        self, budget: Budget, scores: Tensor, round_to: int, gate_of: Tensor | None, tell: Event
    ) -> tuple[Landing, Comparison]:
        """The structure whose measured speed-up is the one asked, or above it by at most EXCESS.

        Each try is measured, and the next one corrects what the table expects by what was found. One that is close
        enough is measured again, twice as long, and what comes out then counts: it was chosen by the first measurement,
        which its noise may have favoured. Where no try comes so close, the one that is least above the one asked is
        taken, else the fastest whose interval still holds it and that is no more than EXCESS below.

        Raises:
            BudgetUnreachable: with the largest that was measured, of the smallest network too.
            export.CannotMeasure: a machine too noisy to tell.
        """
        found: list[Try] = []
        ask = budget.asked
        while len(found) < TRIES:
            expected = self.predictable(Budget(speedup=max(ask, 1 / LARGEST)), round_to, gate_of)
            landing = land(expected, self.size, scores, round_to=round_to, gate_of=gate_of)
            if any(torch.equal(landing.flat, other.flat) for other, _ in found):
                if ask == SMALLEST or not _all_slow(budget, found):
                    break
                ask = SMALLEST  # steps are too coarse for what was asked: is there anything faster at all?
                continue
            measured = self.measure(landing.flat)
            if _meets(budget, measured):
                measured = self.measure(landing.flat, times=2)
            found.append((landing, measured))
            tell(
                {
                    "phase": "correct",
                    "predicted": 1 / landing.reached,
                    "speedup": measured.speedup,
                    "low": measured.low,
                    "high": measured.high,
                }
            )
            if _meets(budget, measured):
                break
            ask = SMALLEST if len(found) == LAST_RESORT and _all_slow(budget, found) else _next(budget, found)
        return _best(budget, found, round_to)


def doubts(measured: Comparison) -> list[str]:
    """A sentence if the machine was too noisy to know the speed-up; none if not."""
    if max(measured.high / measured.speedup, measured.speedup / measured.low) <= 1 + NOISE:
        return []
    return [
        f"this machine is too noisy to meet a speed-up: {measured.speedup:.2f}x was measured, with an interval of "
        f"{measured.low:.2f} to {measured.high:.2f}; stop other work, and compress again"
    ]


def apart(budget: Budget, measured: Comparison, round_to: int) -> str | None:
    """A sentence if what is accepted lies further from the speed-up asked than a budget allows; else None."""
    if _meets(budget, measured):
        return None
    found = f"{measured.speedup:.2f}x was measured where {budget.asked:g}x was asked"
    if measured.speedup < budget.asked:
        return f"{found}; the interval goes to {measured.high:.2f}"
    return f"{found}; no try came closer, with widths in steps of {round_to} channels"


def _meets(budget: Budget, measured: Comparison) -> bool:
    return budget.asked <= measured.speedup <= (1 + EXCESS) * budget.asked


def _all_slow(budget: Budget, found: Sequence[Try]) -> bool:
    return all(measured.speedup < budget.asked for _, measured in found)


def _next(budget: Budget, found: Sequence[Try]) -> float:
    """The speed-up that the table is asked for next, after all that was `found`.

    The last one corrected by its error. Once a try was too slow and one too fast, what lies between these two; once two
    were too slow, what lies beyond them: where something does not get faster, the error grows with what is asked.
    """
    aim = (1 + AIM) * budget.asked
    tries = sorted((1 / landing.reached, measured.speedup) for landing, measured in found)
    slow = [pair for pair in tries if pair[1] < budget.asked]
    fast = [pair for pair in tries if pair[1] >= budget.asked]
    if slow and fast and slow[-1][0] < fast[0][0]:
        return _through(slow[-1], fast[0], aim)
    if len(slow) > 1 and not fast and slow[-2][1] < slow[-1][1]:
        return min(_through(slow[-2], slow[-1], aim), MOST * slow[-1][0])
    landing, measured = found[-1]
    return aim / measured.speedup / landing.reached


def _through(low: tuple[float, float], high: tuple[float, float], aim: float) -> float:
    """What is expected where `aim` is measured, on the line of logarithms through two tries (expected, measured)."""
    part = math.log(aim / low[1]) / math.log(high[1] / low[1])
    return low[0] * math.exp(min(part * math.log(high[0] / low[0]), math.log(SMALLEST)))


def _best(budget: Budget, found: Sequence[Try], round_to: int) -> Try:
    """The try that is least above what was asked, else the fastest, if that may be it."""
    enough = [pair for pair in found if pair[1].speedup >= budget.asked]
    if enough:
        return min(enough, key=lambda pair: pair[1].speedup)
    best = max(found, key=lambda pair: pair[1].speedup)
    if best[1].high < budget.asked:
        raise unreachable(budget, 1 / best[1].speedup, round_to)
    if best[1].speedup < budget.asked / (1 + EXCESS):
        raise export.CannotMeasure(
            f"this machine is too noisy to tell whether {budget.asked:g}x was reached: {best[1].speedup:.2f}x was "
            f"measured, with an interval of {best[1].low:.2f} to {best[1].high:.2f}",
            at="the speed-up of what would be cut",
            effect="nothing was cut",
            fix="stop other work, and compress again",
        )
    return best


def stopwatch(
    parent: nn.Module,
    graph: surgery.ChannelGraph,
    example: surgery.ExampleInputs,
    folder: Path,
    *,
    step: int,
    tell: Event,
    settings: Settings = ONE_THREAD,
) -> Stopwatch:
    """Build the table of the network's layers at multiples of `step`, measured as `settings` say.

    onnxruntime reads files, which are put into `folder`; the other runtimes are torch's.
    """
    if isinstance(example, Mapping):
        raise BadBudget(
            "the example inputs are given by name",
            at="Budget(speedup=...)",
            effect="nothing was started",
            fix="give a tensor or a tuple of tensors: ONNX files are fed by position",
        )
    how = asdict(settings)

    def progress(done: int, steps: int) -> None:
        tell({"phase": "table", "step": done, "steps": steps})

    if settings.runtime != "onnx":
        size = timed_network(parent, example, graph, step=step, settings=settings, on_progress=progress)
        return Stopwatch(
            parent, graph, size,
            lambda small, seconds: export.compare_networks(parent, small, example, **how, seconds=seconds),
        )  # fmt: skip
    del how["runtime"]
    tell({"phase": "export"})
    dense = export.for_timing(parent, example, folder / "dense.onnx")

    def versus(small: nn.Module, seconds: float) -> Comparison:
        return export.compare(dense, export.for_timing(small, example, folder / "small.onnx"), **how, seconds=seconds)

    size = timed_file(dense, graph, step=step, settings=settings, on_progress=progress)
    return Stopwatch(parent, graph, size, versus)
