"""What surgery promises, on networks composed at random: traced, cut twice, compared with the independent oracle.

    python -m benchmarks.soak --networks 500 --seed 0

Prints how the networks fared and why some were refused. The first network that breaks the promise is shrunk, printed
as a description that can be pasted into `judge` of tests/random_networks.py, and ends the run with exit code 1.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings

LEAST_FREE = 0.4
"""The share of networks with a free group below which the run says little about cutting, and fails."""


def soak(networks: int, first: int) -> list[Any]:
    """Judge so many networks drawn from `first` on; their verdicts. Raises Broken for the shrunk network."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import random_networks

    verdicts: list[Any] = []

    @seed(first)
    @settings(
        max_examples=networks, deadline=None, database=None, print_blob=False, suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(random_networks.networks())
    def judged(network: Any) -> None:
        verdicts.append(random_networks.judge(network))
        if len(verdicts) % 50 == 0:
            print(f"{len(verdicts)} networks", flush=True)

    judged()
    return verdicts


def report(verdicts: list[Any]) -> str:
    """Counts as text: how many are exact, how much is free, how much is pinned, what was refused."""
    exact = [v for v in verdicts if not (v.blank or v.refused)]
    free = [v for v in exact if v.groups]
    lines = [
        f"{len(verdicts)} networks",
        f"  exact    {len(exact)}: {len(free)} with free groups, {len(exact) - len(free)} with everything pinned",
        f"  free     {sum(v.groups for v in free)} groups of {sum(v.free for v in free)} units",
        f"  pinned   {sum(v.pinned for v in exact)} channels",
        f"  blank    {sum(v.blank for v in verdicts)}: the dense output does not vary or overflows, nothing to compare",
        f"  refused  {sum(bool(v.refused) for v in verdicts)}",
    ]
    for kind, count in Counter(v.refused.split(":")[0] for v in verdicts if v.refused).most_common():
        example = next(v.refused for v in verdicts if v.refused.startswith(kind))
        lines.append(f"           {count} {example}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        verdicts = soak(args.networks, args.seed)
    except AssertionError as error:
        sys.exit(f"the promise is broken: {error}")
    print(report(verdicts))
    print(f"  seconds  {time.perf_counter() - started:.0f}")
    free = sum(bool(v.groups) for v in verdicts)
    if free < LEAST_FREE * len(verdicts):
        sys.exit(f"only {free} of {len(verdicts)} networks have free groups: this run could hardly fail")


if __name__ == "__main__":
    main()
