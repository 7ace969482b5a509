"""Small networks composed at random, and what must hold for each of them.

A network is a description: a nest of frozen dataclasses, whose repr can be pasted and built again. Every step fits any
width (group counts and cuts are adapted to it), so that a network stays valid while hypothesis takes parts away.
`judge` is the promise of surgery as one function.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from oracle import gated_output, random_keep, relative_error
from torch import Tensor, nn
from zoo import randomised

import surgery

SIDE = 8
WIDEST = 48
TOLERANCE = 1e-11
"""Wider than the 1e-12 of single layers: gates multiply and norms divide, in a row, by numbers that may be small; the
masked network adds zeros in another order than the cut one, and each such step can cost a few bits."""


class Node(nn.Module):
    """Runs a step: its layers are attributes here, its forward is the step's `run`."""

    def __init__(self, step: "Step", channels: int, side: int) -> None:
        super().__init__()
        self.step = step
        for name, layer in step.layers(channels, side).items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.step.run(self, x)


class Chain(nn.Sequential):
    """Steps one after the other. Where they grow too wide or too large, they are brought back."""

    def __init__(self, steps: "tuple[Step, ...]", channels: int, side: int) -> None:
        super().__init__()
        for step in steps:
            self.append(Node(step, channels, side))
            channels, side = shape_after(self[-1], channels, side)
            if channels > WIDEST:
                self.append(nn.Conv2d(channels, 8, 1))
            if side > 2 * SIDE:
                self.append(nn.AvgPool2d(2))
            channels, side = min(channels, 8) if channels > WIDEST else channels, side // 2 if side > 2 * SIDE else side


def shape_after(module: nn.Module, channels: int, side: int) -> tuple[int, int]:
    with torch.no_grad(), surgery.evaluating(module):
        _, channels, side, _ = module(torch.zeros(1, channels, side, side)).shape
    return channels, side


def like(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the height and width of `x`."""
    return y if y.shape[2:] == x.shape[2:] else F.adaptive_avg_pool2d(y, x.shape[2:])


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def image(x: Tensor, side: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (side, -1))


def divisible(channels: int, by: int) -> nn.Module:
    """What makes the width a multiple of `by`."""
    return nn.Conv2d(channels, channels + -channels % by, 1) if channels % by else nn.Identity()


# -- steps without steps inside ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        return {}

    def run(self, m: Any, x: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Conv(Step):
    out: Literal[6, 4, 8, 12, 1]
    kernel: Literal[1, 3]
    groups: Literal[1, 2, 4]
    bias: Literal[True, False]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        groups = math.gcd(self.groups, channels, self.out)
        return {"conv": nn.Conv2d(
            channels, self.out, self.kernel, padding=self.kernel // 2, groups=groups, bias=self.bias
        )}

    def run(self, m: Any, x: Tensor) -> Tensor:
        return m.conv(x)


@dataclass(frozen=True)
class Depthwise(Step):
    multiplier: Literal[1, 2]
    stride: Literal[1, 2]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        stride = self.stride if side >= 4 else 1
        return {"conv": nn.Conv2d(channels, channels * self.multiplier, 3, stride, 1, groups=channels)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        return m.conv(x)


@dataclass(frozen=True)
class Transposed(Step):
    out: Literal[6, 4, 8]
    kernel: Literal[1, 2]
    groups: Literal["one", "two", "depthwise"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        out = channels if self.groups == "depthwise" else self.out
        groups = {"one": 1, "two": math.gcd(2, channels, out), "depthwise": channels}[self.groups]
        return {"conv": nn.ConvTranspose2d(channels, out, self.kernel, self.kernel, groups=groups)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        return m.conv(x)


@dataclass(frozen=True)
class Norm(Step):
    kind: Literal["batch", "group", "groups", "instance"]
    affine: Literal[True, False]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        if self.kind == "batch":
            return {"norm": nn.BatchNorm2d(channels, affine=self.affine)}
        if self.kind == "instance":
            return {"norm": nn.InstanceNorm2d(channels, affine=self.affine)}
        wanted = 2 if self.kind == "group" else channels // 2
        return {"norm": nn.GroupNorm(math.gcd(channels, wanted or 1), channels, affine=self.affine)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        return m.norm(x)


@dataclass(frozen=True)
class LastNorm(Step):
    """Over the channels of every pixel, laid last."""

    kind: Literal["layer", "rms"]
    affine: Literal[True, False]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        kind = nn.LayerNorm if self.kind == "layer" else nn.RMSNorm
        return {"norm": kind(channels, eps=1e-5, elementwise_affine=self.affine)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        return m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class SpaceNorm(Step):
    """LayerNorm over (channels, height, width)."""

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        return {"norm": nn.LayerNorm((channels, side, side))}

    def run(self, m: Any, x: Tensor) -> Tensor:
        return m.norm(x)


@dataclass(frozen=True)
class Activation(Step):
    kind: Literal["relu", "gelu", "sigmoid", "relu_", "hardswish", "softplus"]

    def run(self, m: Any, x: Tensor) -> Tensor:
        return x.clone().relu_() if self.kind == "relu_" else getattr(F, self.kind)(x)


@dataclass(frozen=True)
class Prelu(Step):
    each: Literal[True, False]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        return {"act": nn.PReLU(channels if self.each else 1)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        return m.act(x)


@dataclass(frozen=True)
class Gate(Step):
    """One half of the channels gates the other."""

    via: Literal["chunk", "split", "glu", "slices", "unflatten", "view"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        return {"even": divisible(channels, 2), "half": (channels + 1) // 2}

    def run(self, m: Any, x: Tensor) -> Tensor:
        x = m.even(x)
        if self.via == "glu":
            return F.glu(x, 1)
        if self.via == "chunk":
            a, b = x.chunk(2, 1)
        elif self.via == "split":
            a, b = x.split(m.half, 1)
        elif self.via == "slices":
            a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        elif self.via == "unflatten":
            a, b = x.unflatten(1, (2, -1)).unbind(1)
        else:
            n, c, h, w = x.shape
            a, b = x.view(n, c // 2, 2, h, w).unbind(2)
        return a * b.sigmoid()


@dataclass(frozen=True)
class Shuffle(Step):
    groups: Literal[2, 3]
    via: Literal["view", "constants", "module"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        even = divisible(channels, self.groups)
        return {"even": even, "wide": shape_after(even, channels, 1)[0], "shuffle": nn.ChannelShuffle(self.groups)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        x = m.even(x)
        n, c, h, w = x.shape
        if self.via == "module":
            return m.shuffle(x)
        if self.via == "constants":
            return x.view(n, self.groups, m.wide // self.groups, h, w).transpose(1, 2).reshape(n, m.wide, h, w)
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@dataclass(frozen=True)
class Reorder(Step):
    kind: Literal["flip", "flip width", "flip and add", "roll", "swap halves", "odd first", "index"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
        return {"order": nn.Buffer(order)} if self.kind == "index" else {}

    def run(self, m: Any, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        match self.kind:
            case "flip":
                return x.flip(1)
            case "flip width":
                return x.flip(3)
            case "flip and add":
                return x + x.flip(1)
            case "roll":
                return x.roll(1, 1)
            case "swap halves":
                return torch.cat([x[:, half:], x[:, :half]], 1)
            case "odd first":
                return torch.cat([x[:, 1::2], x[:, ::2]], 1)
        return x.index_select(1, m.order)


@dataclass(frozen=True)
class Views(Step):
    """There and back, or one pixel less: by the sizes of the tensor, by constants, with holes."""

    via: Literal["flatten", "shape", "constants", "merge batch", "channels last"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        return {"wide": channels, "side": side}

    def run(self, m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        match self.via:
            case "flatten":
                return x.flatten(1).unflatten(1, (-1, h, w))
            case "shape":
                return x.reshape(n, c * h, w).view(n, c, h, w)
            case "constants":
                return x.reshape(-1, m.wide * m.side, m.side).sin().view(-1, m.wide, m.side, m.side)
            case "merge batch":
                return x.reshape(n * c, 1, h, w).tanh().view(n, -1, h, w)
        return x.permute(0, 2, 3, 1).reshape(-1, c).sigmoid().view(n, h, w, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class SqueezeExcite(Step):
    via: Literal["conv", "linear", "pixel", "softmax", "conv1d"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        if self.via == "linear":
            return {"down": nn.Linear(channels, 4), "up": nn.Linear(4, channels)}
        if self.via == "conv1d":
            return {"mix": nn.Conv1d(1, 1, 3, padding=1)}
        return {"down": nn.Conv2d(channels, 4, 1), "up": nn.Conv2d(4, 1 if self.via == "pixel" else channels, 1)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        if self.via == "linear":
            n, c, _, _ = x.shape
            return x * m.up(m.down(F.adaptive_avg_pool2d(x, 1).view(n, c)).relu()).sigmoid().view(n, c, 1, 1)
        if self.via == "conv1d":
            y = x.mean((2, 3))
            return x * m.mix(y[:, None]).sigmoid().transpose(1, 2)[..., None]
        y = x if self.via == "pixel" else x.mean((2, 3), keepdim=True)
        y = m.up(m.down(y).relu())
        return x * (y.softmax(1) if self.via == "softmax" else y.sigmoid())


@dataclass(frozen=True)
class Pool(Step):
    kind: Literal["avg", "max", "adaptive", "up", "to one and back"]

    def run(self, m: Any, x: Tensor) -> Tensor:
        if self.kind == "up":
            return F.interpolate(x, scale_factor=2, mode="bilinear")
        if self.kind == "to one and back":
            return x - F.adaptive_max_pool2d(x, 1)
        if self.kind == "adaptive":
            return F.adaptive_avg_pool2d(x, 3)
        return {"avg": F.avg_pool2d, "max": F.max_pool2d}[self.kind](x, 2 if x.shape[2] >= 4 else 1)


@dataclass(frozen=True)
class PixelShuffle(Step):
    kind: Literal["shuffle", "unshuffle", "view"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        return {"even": nn.Identity() if self.kind == "unshuffle" else divisible(channels, 4)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        x = m.even(x)
        n, c, h, w = x.shape
        if self.kind == "shuffle":
            return F.pixel_shuffle(x, 2)
        if self.kind == "view":
            return x.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)
        return F.pixel_unshuffle(x if h % 2 == 0 else F.pad(x, (0, 1, 0, 1)), 2)


@dataclass(frozen=True)
class Scale(Step):
    """A bare parameter, or a buffer of constants."""

    shape: Literal["channel", "one", "pixel", "element", "buffer", "last"]
    by: Literal["mul", "add"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        shape = {"channel": (channels, 1, 1), "one": (1,), "pixel": (side, side), "buffer": (channels, 1, 1),
                 "element": (1, channels, side, side), "last": (channels,)}[self.shape]
        values = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
        return {"scale": nn.Buffer(values) if self.shape == "buffer" else nn.Parameter(values)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.shape == "last" else x
        x = x * m.scale if self.by == "mul" else x + m.scale
        return x.movedim(-1, 1) if self.shape == "last" else x


@dataclass(frozen=True)
class Number(Step):
    """Numbers and constants that may come from the width."""

    kind: Literal["half", "root of width", "width", "ones", "ramp"]

    def run(self, m: Any, x: Tensor) -> Tensor:
        c = x.shape[1]
        match self.kind:
            case "half":
                return x * 0.5
            case "root of width":
                return x * c**-0.5
            case "width":
                return x + c
            case "ones":
                return x + torch.ones(c, 1, 1, dtype=x.dtype)
        return x * torch.linspace(0.5, 1, c, dtype=x.dtype).view(1, c, 1, 1)


@dataclass(frozen=True)
class Across(Step):
    """Computes across the channels (or, for contrast, not)."""

    kind: Literal["softmax", "softmax of space", "mean", "minus mean", "normalise", "cumsum", "sort", "max", "gram"]

    def run(self, m: Any, x: Tensor) -> Tensor:
        match self.kind:
            case "softmax":
                return x.softmax(1)
            case "softmax of space":
                return x.flatten(2).softmax(2).view(x.shape)
            case "mean":
                return x.mean(1, keepdim=True)
            case "minus mean":
                return x - x.mean(1, keepdim=True)
            case "normalise":
                return F.normalize(x, dim=1)
            case "cumsum":
                return x.cumsum(1)
            case "sort":
                return x.sort(1).values
            case "max":
                return x * x.amax(1, keepdim=True).sigmoid()
        y = x.flatten(2)
        return ((y @ y.transpose(1, 2)).softmax(-1) @ y).view(x.shape)


@dataclass(frozen=True)
class Slice(Step):
    kind: Literal["first", "last", "half", "step", "narrow", "select", "drop one", "assign"]

    def run(self, m: Any, x: Tensor) -> Tensor:
        match self.kind:
            case "first":
                return x[:, :3]
            case "last":
                return x[:, -3:]
            case "half":
                return x[:, : (x.shape[1] + 1) // 2]
            case "step":
                return x[:, ::2]
            case "narrow":
                return x.narrow(1, 0, min(2, x.shape[1]))
            case "select":
                return x.select(1, 0).unsqueeze(1)
            case "drop one":
                return x[:, 1:] if x.shape[1] > 1 else x
        y = x.clone()
        y[:, :2] = x[:, :2].sigmoid()
        return y


@dataclass(frozen=True)
class Widen(Step):
    kind: Literal["pad", "pad before", "zeros", "cat self", "repeat", "repeat_interleave", "expand", "coordinates"]

    def run(self, m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        match self.kind:
            case "pad":
                return F.pad(x, (0, 0, 0, 0, 0, 2))
            case "pad before":
                return F.pad(x, (0, 0, 0, 0, 1, 1))
            case "zeros":
                return torch.cat([x, torch.zeros(n, 2, h, w, dtype=x.dtype)], 1)
            case "cat self":
                return torch.cat([x, x.sigmoid()], 1)
            case "repeat":
                return x.repeat(1, 2, 1, 1)
            case "repeat_interleave":
                return x.repeat_interleave(2, 1)
            case "expand":
                return x[:, :, None].expand(n, c, 2, h, w).flatten(1, 2)
        ramp = torch.linspace(-1, 1, w, dtype=x.dtype).expand(n, 1, h, w)
        return torch.cat([ramp, x], 1)


@dataclass(frozen=True)
class Attention(Step):
    """Self-attention of the pixels, as it is written by hand, with a remembered number of heads."""

    heads: Literal[2, 3]
    size: Literal[4, 2]
    via: Literal["qkv", "separate", "fused", "head dim remembered", "heads outside", "relative bias", "einsum"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        inner = self.heads * self.size
        layers = {"num_heads": self.heads, "proj": nn.Linear(inner, channels), "scale": self.size**-0.5}
        if self.via == "head dim remembered":
            layers["head_dim"] = self.size
        if self.via == "relative bias":
            layers["bias"] = nn.Parameter(torch.randn(self.heads, side * side, side * side))
        if self.via in ("separate", "einsum"):
            return layers | {name: nn.Linear(channels, inner) for name in "qkv"}
        return layers | {"qkv": nn.Linear(channels, 3 * inner)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        t = tokens(x)
        n, length, _ = t.shape
        if self.via in ("separate", "einsum"):
            q, k, v = (layer(t).view(n, length, m.num_heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
        elif self.via == "head dim remembered":
            q, k, v = m.qkv(t).reshape(n, length, 3, -1, m.head_dim).permute(2, 0, 3, 1, 4)
        elif self.via == "heads outside":
            q, k, v = m.qkv(t).view(n, length, m.num_heads, -1).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = m.qkv(t).reshape(n, length, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.via == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.via == "einsum":
            weights = torch.einsum("...qd,...kd->...qk", q, k).softmax(-1)
            y = torch.einsum("nhqk,nhkd->nhqd", weights, v)
        else:
            scores = q @ k.transpose(-2, -1) * m.scale
            y = (scores + m.bias if self.via == "relative bias" else scores).softmax(-1) @ v
        return x + image(m.proj(y.transpose(1, 2).reshape(n, length, -1)), x.shape[2])


@dataclass(frozen=True)
class TorchAttention(Step):
    """torch's own module; the width is brought to a multiple of the heads."""

    heads: Literal[2, 1]
    normed: Literal[True, False]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        even = divisible(channels, self.heads)
        width = shape_after(even, channels, 1)[0]
        attend = nn.MultiheadAttention(width, self.heads, batch_first=True)
        return {"even": even, "attend": attend, "norm": nn.LayerNorm(width) if self.normed else nn.Identity()}

    def run(self, m: Any, x: Tensor) -> Tensor:
        x = m.even(x)
        y = m.norm(tokens(x))
        return x + image(m.attend(y, y, y, need_weights=False)[0], x.shape[2])


@dataclass(frozen=True)
class Mlp(Step):
    """Linear layers over the channels, over the pixels, or over both at once."""

    over: Literal["channels", "pixels", "all", "einsum", "weight"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        if self.over in ("einsum", "weight"):
            return {"weight": nn.Parameter(torch.randn(channels, 6))}
        n = {"channels": channels, "pixels": side * side, "all": channels * side * side}[self.over]
        return {"up": nn.Linear(n, 6), "down": nn.Linear(6, n)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        if self.over == "einsum":
            return torch.einsum("nchw,cd->ndhw", x, m.weight)
        if self.over == "weight":
            return (x.movedim(1, -1) @ m.weight).movedim(-1, 1)
        if self.over == "channels":
            return x + m.down(F.gelu(m.up(x.movedim(1, -1)))).movedim(-1, 1)
        start = 2 if self.over == "pixels" else 1
        return x + m.down(F.gelu(m.up(x.flatten(start)))).view(x.shape)


@dataclass(frozen=True)
class Twice(Step):
    """One convolution runs twice; or two share a weight."""

    share: Literal["module", "weight", "bias"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        a, b = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        if self.share == "weight":
            b.weight = a.weight
        if self.share == "bias":
            b.bias = a.bias
        return {"a": a, "b": a if self.share == "module" else b}

    def run(self, m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).relu())


@dataclass(frozen=True)
class Values(Step):
    """The forward looks at what it computes."""

    kind: Literal["branch", "number", "nonzero", "mask", "where"]

    def run(self, m: Any, x: Tensor) -> Tensor:
        match self.kind:
            case "branch":
                return x * 2 if x.mean() > 0 else x
            case "number":
                return x * x.detach().abs().mean().item()
            case "nonzero":
                return x * (x > 0).nonzero().shape[0]
            case "mask":
                return x.masked_fill(x < -1, 0.5)
        return torch.where(x > 0, x, x.flip(3).sigmoid())


# -- steps of steps ---------------------------------------------------------------------------------------------------

Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Residual(Step):
    """The body is added to its input; where the widths differ, to a projection of it or to its zero-padded self."""

    steps: Steps
    shortcut: Literal["project", "pad"]
    inplace: Literal[False, True]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        body = Chain(self.steps, channels, side)
        out, _ = shape_after(body, channels, side)
        if out == channels:
            return {"body": body, "short": nn.Identity()}
        if self.shortcut == "pad" and out > channels:
            return {"body": body, "short": nn.ZeroPad3d((0, 0, 0, 0, 0, out - channels))}
        return {"body": body, "short": nn.Conv2d(channels, out, 1)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        y = like(m.body(x), x)
        short = m.short(x)
        if self.inplace:
            y = y.clone()
            y += short
            return y
        return short + y


@dataclass(frozen=True)
class Join(Step):
    """Two branches side by side, added, multiplied, stacked or chosen between."""

    left: Steps
    right: Steps
    by: Literal["cat", "add", "mul", "stack mean", "cat tokens", "where"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        left, right = Chain(self.left, channels, side), Chain(self.right, channels, side)
        widths = [shape_after(branch, channels, side)[0] for branch in (left, right)]
        same = self.by == "cat" or widths[0] == widths[1]
        return {"left": left, "right": right, "match": nn.Identity() if same else nn.Conv2d(widths[1], widths[0], 1)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        a = m.left(x)
        b = like(m.match(m.right(x)), a)
        match self.by:
            case "cat":
                return torch.cat([a, b], 1)
            case "add":
                return a + b
            case "mul":
                return a * b.sigmoid()
            case "stack mean":
                return torch.stack([a, b]).mean(0)
            case "cat tokens":
                return torch.cat([a, b], 3)[..., ::2]
        return torch.where(a > b, a, b)


@dataclass(frozen=True)
class Halves(Step):
    """The first half goes through the body, the second past it."""

    steps: Steps
    via: Literal["chunk", "split", "slices"]

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        half = (channels + 1) // 2
        return {"even": divisible(channels, 2), "half": half, "body": Chain(self.steps, half, side)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        x = m.even(x)
        if self.via == "chunk":
            a, b = x.chunk(2, 1)
        elif self.via == "split":
            a, b = x.split([m.half, m.half], 1)
        else:
            a, b = x[:, : m.half], x[:, m.half :]
        return torch.cat([b, like(m.body(a), b)], 1)


@dataclass(frozen=True)
class Repeated(Step):
    """The same body, with the same weights, twice in a row; a layer in between brings the width back."""

    steps: Steps

    def layers(self, channels: int, side: int) -> Mapping[str, Any]:
        body = Chain(self.steps, channels, side)
        return {"body": body, "back": nn.Conv2d(shape_after(body, channels, side)[0], channels, 1)}

    def run(self, m: Any, x: Tensor) -> Tensor:
        y = like(m.back(m.body(x)), x)
        return like(m.back(m.body(y)), x)


# -- networks ---------------------------------------------------------------------------------------------------------

PLAIN: tuple[type[Step], ...] = (
    Conv, Norm, Activation, Depthwise, Prelu, Pool, LastNorm, Gate, SqueezeExcite, Scale, Mlp, Shuffle, Reorder, Views,
    PixelShuffle, Transposed, Attention, TorchAttention, Widen, Slice, Twice, Number, SpaceNorm, Across, Values,
)
OFTEN: tuple[type[Step], ...] = (Conv, Norm, Activation, Depthwise)
NESTED: tuple[tuple[type[Step], tuple[str, ...]], ...] = (
    (Residual, ("steps",)), (Join, ("left", "right")), (Halves, ("steps",)), (Repeated, ("steps",)),
)
"""Steps of steps, with the fields that hold these."""


@dataclass(frozen=True)
class Network:
    """A stem on three channels, steps, and a head."""

    stem: Literal[8, 6, 12]
    steps: Steps
    head: Literal["linear", "flatten", "conv", "attended", "two"]

    def build(self) -> nn.Module:
        return _Built(self)

    def example(self, batch: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


class _Built(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.kind = network.head
        self.stem = nn.Sequential(nn.Conv2d(3, network.stem, 3, padding=1), nn.ReLU())
        self.body = Chain(network.steps, network.stem, SIDE)
        channels, side = shape_after(self.body, network.stem, SIDE)
        if self.kind == "flatten":
            self.head = nn.Linear(channels * side * side, 5)
        elif self.kind == "conv":
            self.head = nn.Conv2d(channels, 5, 1)
        else:
            self.head = nn.Linear(channels, 5)
        if self.kind == "attended":
            self.query = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.stem(x))
        match self.kind:
            case "flatten":
                return self.head(x.flatten(1))
            case "conv":
                return self.head(x)
            case "attended":
                t = tokens(x)
                return self.head(((t @ self.query).softmax(1)[..., None] * t).sum(1))
            case "two":
                return {"logits": self.head(x.mean((2, 3))), "features": x.amax((2, 3))}
        return self.head(x.mean((2, 3)))


def networks(*, most: int = 5, leaves: int = 6) -> st.SearchStrategy[Network]:
    """Up to `most` steps in a row; one that holds others holds about `leaves` of them."""
    plain = st.one_of(*(st.builds(kind) for kind in (*OFTEN, *PLAIN)))
    step = st.recursive(
        plain,
        lambda inner: st.one_of(
            *(
                st.builds(kind, **dict.fromkeys(fields, st.lists(inner, min_size=1, max_size=3).map(tuple)))
                for kind, fields in NESTED
            )
        ),
        max_leaves=leaves,
    )
    return st.builds(Network, steps=st.lists(step, min_size=1, max_size=most).map(tuple))


# -- the promise ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What was found about a network for which the promise holds. `refused` is the class of the error, if any."""

    free: int = 0
    groups: int = 0
    pinned: int = 0
    compared: int = 0
    """Cuts, of the CUTS that are made, that were compared with the oracle: not those whose output is constant."""
    refused: str = ""
    blank: bool = False


CUTS = 4
"""How many `judge` makes of a network."""


class Broken(AssertionError):
    """The promise does not hold; the text says of which network."""


def judge(network: Network) -> Verdict:
    """All that surgery promises, on one network. Raises Broken."""
    torch.manual_seed(0)
    model = randomised(network.build()).double().eval()
    x = network.example()
    with torch.no_grad():
        dense = model(x)
    if not all(_varies(leaf) for leaf in _leaves(dense)):
        return Verdict(blank=True)  # dead or overflown: nothing can be compared
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        graph = surgery.trace(model, x)
    except surgery.SurgeryError as error:
        _ask("  at      " in str(error), network, f"an error without a place: {error}")
        return Verdict(refused=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    except Exception as error:
        raise Broken(f"trace raises {type(error).__name__}: {error}\nof {network!r}") from error
    try:
        _ask(all(torch.equal(before[n], v) for n, v in model.state_dict().items()), network, "trace changed the model")
        _judge_identity(network, model, graph, x, dense)
        _, *compared = _judge_cut(network, model, graph, lopsided_keep(graph), x)
        for seed in range(2):
            small, varies = _judge_cut(network, model, graph, random_keep(graph, seed), x)
            compared.append(varies)
        again = surgery.trace(small, x)
        compared.append(_judge_cut(network, small, again, random_keep(again, 2), x)[1])
    except Broken:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise Broken(f"{type(error).__name__}: {first}\nof {network!r}\n{graph.summary()}") from error
    return Verdict(graph.units, len(graph.groups), sum(len(pin.channels) for pin in graph.pinned), sum(compared))


def _judge_identity(network: Network, model: nn.Module, graph: surgery.ChannelGraph, x: Tensor, dense: Any) -> None:
    with torch.no_grad():
        for same in (surgery.cut(model, graph, {}), surgery.mask(model, graph, {})):
            pairs = zip(_leaves(dense), _leaves(same(x)), strict=True)
            _ask(all(torch.equal(a, b) for a, b in pairs), network, "keeping everything changes the output")


def _judge_cut(
    network: Network, model: nn.Module, graph: surgery.ChannelGraph, keep: Any, x: Tensor
) -> tuple[nn.Module, bool]:
    """The cut network, and whether there was anything to compare."""
    small = surgery.cut(model, graph, keep)
    with torch.no_grad():
        found = small(x)
        expected = gated_output(model, graph, keep, x)
    varies = all(_varies(leaf) for leaf in _leaves(expected))
    if varies:
        error = relative_error(expected, found)
        fact = f"the cut differs from the oracle by {error:.1e}; kept: {_spelled(keep)}\n{graph.summary()}"
        _ask(error < TOLERANCE, network, fact)
        surgery.check_equal(surgery.mask(model, graph, keep), small, x, tolerance=TOLERANCE)
    predicted, counted = surgery.SizeModel(graph).of(keep).params, sum(p.numel() for p in small.parameters())
    _ask(predicted == counted, network, f"{predicted} parameters predicted, {counted} counted")
    other = network.example(batch=3)
    with torch.no_grad():
        try:
            model(other)
        except Exception:  # the dense network is bound to its batch: so may be the cut one
            return small, varies
        small(other)
    return small, varies


def lopsided_keep(graph: surgery.ChannelGraph) -> dict[str, Tensor]:
    """The first three units of the first group closed, two of the second, one of the third: no halves stay alike."""
    counts = {group.name: min(3 - i % 3, group.units - 1) for i, group in enumerate(graph.groups)}
    return {group.name: torch.arange(group.units) >= counts[group.name] for group in graph.groups}


def _spelled(keep: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {''.join(str(int(flag)) for flag in flags)}" for name, flags in keep.items())


def _ask(holds: bool, network: Network, what: str) -> None:
    if not holds:
        raise Broken(f"{what}\nof {network!r}")


def _leaves(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def _varies(output: Tensor) -> bool:
    return bool(output.isfinite().all() and output.std() > 1e-6 * output.abs().max() > 0)
