"""The oracle of surgery, which shares no code with it: closed channels are zeroed in the *inputs* of their readers."""

import torch
from torch import Tensor, nn

from surgery import ChannelGraph


def random_keep(graph: ChannelGraph, seed: int, share: float = 0.5) -> dict[str, Tensor]:
    """Each unit kept with chance `share`; in every group at least one is kept and, if it has two, one closed."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        flags = torch.rand(group.units, generator=generator) < share
        flags[int(torch.randint(group.units, (1,), generator=generator))] = True
        if flags.all() and group.units > 1:
            flags[int(torch.randint(group.units, (1,), generator=generator))] = False
        if not flags.any():
            flags[0] = True
        keep[group.name] = flags
    return keep


def gated_output(model: nn.Module, graph: ChannelGraph, keep: dict[str, Tensor], x: Tensor) -> object:
    """The output of `model` when each layer that reads a closed channel finds zeros there."""
    tensors, hooks = dict(model.named_parameters()), []
    for group in (g for g in graph.groups if g.name in keep):
        for slot in group.readers:
            closed = slot.positions[~keep[group.name]].reshape(-1)
            users = [m for m in model.modules() if getattr(m, "weight", None) is tensors[slot.tensor]]

            def zero(module: nn.Module, args: tuple[Tensor, ...], closed: Tensor = closed) -> tuple[Tensor, ...]:
                x = args[0].clone()
                width = closed
                if isinstance(module, nn.Linear):
                    x[..., width] = 0
                else:
                    period = x.shape[1] // getattr(module, "groups", 1)
                    for start in range(0, x.shape[1], period):
                        x[:, start + width] = 0
                return (x,)

            hooks += [module.register_forward_pre_hook(zero) for module in users]
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(reference: object, output: object) -> float:
    """max |difference| / max |reference|, worst over all outputs, of equal shapes; no reference may be constant."""
    pairs = zip(_leaves(reference), _leaves(output), strict=True)
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
        assert a.std() > 1e-6 * a.abs().max() > 0, "the reference is constant: this check could not fail"
        worst = max(worst, ((a - b).abs().max() / a.abs().max()).item())
    return worst


def _leaves(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [leaf for value in values for leaf in _leaves(value)]  # type: ignore[attr-defined]
