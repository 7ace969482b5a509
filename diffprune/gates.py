"""Gate families: learned, approximately binary factors of units, with exact zeros.

All take one flat vector of logits, shape (units,), float32. A unit is open when its gate is not zero.
"""

from dataclasses import dataclass, replace
from math import inf, log
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class Gate(Protocol):
    """What a family of gates offers. `progress` runs from 0 to 1 over a search."""

    @property
    def start(self) -> float:
        """A logit at which `hard` is exactly 1: where the gates of a trained network begin."""

    def sample(self, logits: Tensor, group: Tensor) -> Tensor:
        """Gates of one training step, shape (units,), differentiable; `group` is the group index of each unit."""

    def chance(self, logits: Tensor) -> Tensor:
        """Probability that each unit is open, shape (units,), differentiable."""

    def hard(self, logits: Tensor) -> Tensor:
        """Gates without noise, for evaluation and folding, shape (units,)."""

    def at(self, progress: float) -> "Gate":
        """The family at this point of its continuation."""


SHARPEST = 1e-6
"""The least noise that chances are computed with: without any there is no slope, and no expected cost between two."""


@dataclass(frozen=True)
class MeanCentred:
    """DiffPrune-style gates: a hard decision plus a zero-mean relaxation over the open side.

        v_i = sigmoid(l_i) - u_i        u_i = sigmoid(noise * logit(U(0, 1)))
        h_i = 1 if v_i > 0 else 0       so P(h_i = 1) = sigmoid(l_i / noise)
        g_i = h_i * (1 + relaxation * (v_i - mean of v over the open units of the group))

    Closed gates are exactly 0, the open gates of a group average exactly 1 and lie in (0, 2). `noise` 1 is the
    stochastic gate, 0 (u = 1/2) the deterministic one; between them the chances sharpen. The mean is taken as a
    constant in the backward pass: with its gradient the open gates of a group could only trade against each other.

    Source: DiffPrune (Shulman 2020, arXiv 2012.03653) describes deterministic approximately binary gates with exact
    zeros; its formula was not available, so this is a reconstruction from the sign-partitioned group-mean
    transformation in the author's later code (relational-compression, after arXiv 2107.01400). The noise level that
    links both modes is ours. The defaults are gentle because a short search starts from a trained network: an open gate
    is at most 10 % off 1, and only units close to the threshold flip (docs/method.md).
    """

    noise: float = 0.05
    relaxation: float = 0.1
    stochastic: bool = True
    start: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < inf or not 0 <= self.relaxation <= 1:
            raise ValueError(
                f"noise is 0 or more, relaxation from 0 to 1; got noise={self.noise}, relaxation={self.relaxation}"
            )

    def sample(self, logits: Tensor, group: Tensor) -> Tensor:
        threshold = torch.full_like(logits, 0.5)
        if self.stochastic:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            threshold = torch.sigmoid(self.noise * torch.logit(uniform))
        value = torch.sigmoid(logits) - threshold
        open_ = (value > 0).to(value.dtype)
        centred = value - open_mean(value.detach(), open_, group)
        return open_ * (1 + self.relaxation * centred)

    def chance(self, logits: Tensor) -> Tensor:
        """Exact for stochastic gates; for deterministic ones a smooth count with temperature `noise`."""
        return torch.sigmoid(logits / max(self.noise, SHARPEST))

    def hard(self, logits: Tensor) -> Tensor:
        return (logits > 0).to(logits.dtype)

    def at(self, progress: float) -> "MeanCentred":
        """Noise falls tenfold over the search; the relaxation fades in its last fifth, so that g = h at the cut."""
        fade = min(1.0, 5.0 * (1.0 - progress))
        return replace(self, noise=self.noise * 0.1**progress, relaxation=self.relaxation * fade)


@dataclass(frozen=True)
class HardConcrete:
    """Hard Concrete gates (Louizos, Welling, Kingma 2018, arXiv 1712.01312, eq. 10-12).

    s = sigmoid((logit(u) + l) / beta)      z = clip(s * (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(l - beta * log(-gamma / zeta))
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    start: float = 3.0

    def sample(self, logits: Tensor, group: Tensor) -> Tensor:
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        return self._stretch(torch.sigmoid((torch.logit(uniform) + logits) / self.beta))

    def chance(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits - self.beta * log(-self.gamma / self.zeta))

    def hard(self, logits: Tensor) -> Tensor:
        """The test-time gate of the paper, eq. 13; not binary: what is open keeps its value."""
        return self._stretch(torch.sigmoid(logits))

    def at(self, progress: float) -> "HardConcrete":
        return self

    def _stretch(self, s: Tensor) -> Tensor:
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)


def open_mean(value: Tensor, open_: Tensor, group: Tensor) -> Tensor:
    """Per unit the mean of `value` over the open units of its group, shape (units,)."""
    zeros = torch.zeros(int(group.max()) + 1 if group.numel() else 0, dtype=value.dtype, device=value.device)
    total = zeros.index_add(0, group, value * open_)
    count = zeros.index_add(0, group, open_)
    return (total / count.clamp_min(1))[group]


GATES: dict[str, Gate] = {
    "diffprune": MeanCentred(),
    "diffprune-deterministic": MeanCentred(stochastic=False),
    "hard-concrete": HardConcrete(),
}
"""The families by the names that `attach` and the command line take."""


def family(gate: str | Gate) -> Gate:
    """The family of that name; one that is given as an object stays. Raises ValueError."""
    if not isinstance(gate, str):
        return gate
    if gate not in GATES:
        raise ValueError(f"gate is one of {', '.join(GATES)}; got {gate!r}")
    return GATES[gate]


class GatedModule(nn.Module):
    """Its `logits` and `shift` stay float32 where the network becomes half precision, in which small steps vanish."""

    logits: nn.Parameter
    shift: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        logits, shift = self.logits.data, self.shift
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.logits.dtype.itemsize < logits.dtype.itemsize:
            self.logits.data, self.shift = logits.to(self.logits.device), shift.to(self.logits.device)
            self.logits.grad = None
        return self
