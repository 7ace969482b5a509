"""One sentence about a run that claims no more than was measured."""

from collections.abc import Mapping
from typing import Any

from export.comparison import NOISE, verdict_of


def verdict(report: Mapping[str, Any]) -> str:
    """Speed on the target, MACs and accuracy of the pruned network against its parent's."""
    device, latency = _on_target(report)
    saved = 100 * (1 - report["macs"]["pruned"] / report["macs"]["dense"])
    points = 100 * (report["accuracy"]["pruned"] - report["accuracy"]["dense"])
    speed = speed_in_words(latency["speedup"], latency["low"], latency["high"])
    return f"The pruned network is {speed} on this {device} with {saved:.1f} % fewer MACs, and {_moved(points)}."


def missed(report: Mapping[str, Any]) -> list[str]:
    """A sentence if the final files are slower than the speed-up that was asked, and met while the cut was chosen."""
    budget, (_, latency) = report["budget"], _on_target(report)
    if budget["kind"] != "speedup" or latency["high"] >= budget["asked"]:
        return []
    now = speed_in_words(latency["speedup"], latency["low"], latency["high"])
    return [
        f"{_times(budget['asked'])} was asked, and {_times(budget['reached'])} measured while the cut was chosen, but "
        f"the final files are {now}: the machine was not the same at both times; diffprune verify measures again"
    ]


def _on_target(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The device that was asked to be fast, and the latency there."""
    latencies = report["latency"]
    return ("GPU", latencies["cuda"]) if "cuda" in latencies else ("CPU", latencies["cpu"])


def speed_in_words(ratio: float, low: float, high: float) -> str:
    """dense latency / pruned latency with its interval: faster or slower only if the whole interval says so."""
    if low <= 1 <= high:
        noisy = f": {NOISE}" if verdict_of(low, high) == NOISE else ""
        return f"not measurably faster or slower{noisy} ({_times(low)} to {_times(high)})"
    if high < 1:
        return f"{_times(1 / ratio)} slower ({_times(1 / high)} to {_times(1 / low)})"
    return f"{_times(ratio)} faster ({_times(low)} to {_times(high)})"


def _times(ratio: float) -> str:
    """With a third digit where two would show 1.00x."""
    return f"{ratio:.3f}x" if 0.95 < ratio < 1.05 else f"{ratio:.2f}x"


def _moved(points: float) -> str:
    if not points:
        return "exactly as accurate as its parent"
    return f"{abs(points):.2f} points {'more' if points > 0 else 'less'} accurate than its parent"
