"""Tiny networks, each named by its hazard. `free` says which layers must have a group; `pinned` words of the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import surgery
from surgery import ChannelGraph


@dataclass(frozen=True)
class Case:
    """`inputs` makes the example from a batch of `shape` where the forward takes more than that."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    free: tuple[str, ...] = ()
    pinned: str = ""
    inputs: Callable[[Tensor], Any] = lambda x: x

    def example(self, seed: int = 1, batch: int | None = None, dtype: torch.dtype = torch.float64) -> Any:
        shape = (batch or self.shape[0], *self.shape[1:])
        return self.inputs(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(12, 5),
        )


class Net(nn.Module):
    """A stem of 8 channels, `body` of the case, a head on 8 channels by default."""

    def __init__(self, head: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(head, 5)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Residual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        y = self.bn(self.b(F.relu(self.a(x))))
        y += x
        return F.relu_(y)


class ConcatThenAdd(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1) + self.c(x)


class DenseConcat(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.a(x)], 1)
        return torch.cat([y, self.b(F.relu(y))], 1)


class SelfConcat(Net):
    def __init__(self) -> None:
        super().__init__(16)

    def body(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.sigmoid()], 1)


class ChunkGate(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        u, v = self.a(x).chunk(2, 1)
        return u * v.sigmoid()


class BlurPool(Net):
    """A fixed filter for each of the channels, whose number the module remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.filter: Tensor
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", line.outer(line).repeat(8, 1, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.filter, stride=2, groups=self.channels)


class FixedMix(Net):
    """Channels read through a buffer, such as a cosine transform."""

    def __init__(self) -> None:
        super().__init__(head=6)
        self.mix: Tensor
        self.register_buffer("mix", torch.randn(6, 8, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.mix)


class RelativePositions(Net):
    """BoTNet's attention: every head is multiplied with the same table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_width, self.width = 3, 4, 12
        self.qkv, self.proj = nn.Conv2d(8, 36, 1), nn.Conv2d(12, 8, 1)
        self.positions = nn.Parameter(torch.randn(5, 4))

    def body(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = (t.reshape(n * self.num_heads, self.head_width, -1) for t in self.qkv(x).chunk(3, 1))
        q = q.transpose(1, 2)
        bias = (q @ self.positions.transpose(0, 1))[:, :, torch.arange(h * w) % 5]
        mixed = v @ (q @ k + bias).softmax(-1).transpose(1, 2)
        return self.proj(mixed.reshape(n, self.width, h, w))


class AsHighAsHeads(RelativePositions):
    """By chance the map is as high and wide, which the module remembers as well, as there are heads in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.height = self.across = 6

    def body(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = (t.reshape(n * self.num_heads, self.head_width, -1) for t in self.qkv(x).chunk(3, 1))
        q = q.transpose(1, 2)
        places = q.reshape(n * self.num_heads, self.height, self.across, -1).transpose(1, 2)
        scores = places.reshape(n * self.num_heads, h * w, -1) @ self.positions.transpose(0, 1)
        bias = scores.sum(2).reshape(n * self.num_heads, h * w, 1)  # no other axis here is as long as there are heads
        mixed = v @ (q @ k + bias).softmax(-1).transpose(1, 2)
        return self.proj(mixed.reshape(n, self.width, h, w))


class SplitHalves(Net):
    """CSPNet's way: half of the width that the module remembers."""

    def __init__(self) -> None:
        super().__init__(head=12)
        self.width = 12
        self.a, self.b = nn.Conv2d(8, 12, 1), nn.Conv2d(6, 6, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        u, v = self.a(x).split(self.width // 2, 1)
        return torch.cat([u, self.b(v).relu()], 1)


class SplitList(Net):
    """MixNet's way: parts of sizes that the module remembers in a list, two of them alike by chance."""

    def __init__(self) -> None:
        super().__init__(head=10)
        self.sizes = [3, 3, 4]
        self.a = nn.Conv2d(8, 10, 1)
        self.parts = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1) for n in self.sizes)

    def body(self, x: Tensor) -> Tensor:
        parts = self.a(x).relu().split(self.sizes, 1)
        return torch.cat([f(part) for f, part in zip(self.parts, parts, strict=True)], 1)


class SplitConstants(Net):
    def body(self, x: Tensor) -> Tensor:
        u, v = torch.split(x, [4, 4], 1)
        return torch.cat([v, u], 1)


class ChannelShuffle(Net):
    def body(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ChannelShuffleModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle, self.a = nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.a(self.shuffle(x)).relu()


class Flip(Net):
    def body(self, x: Tensor) -> Tensor:
        return x + x.flip(1)


class RollChannels(Net):
    def body(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 1)


class SliceChannels(Net):
    def __init__(self) -> None:
        super().__init__(4)

    def body(self, x: Tensor) -> Tensor:
        return x[:, :4]


class PixelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(2)

    def body(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


class ViewOfShape(Net):
    """Squeeze and excitation in its oldest spelling: sizes taken from the tensor, so they follow the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)

    def body(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * self.excite(self.squeeze(y).relu()).sigmoid().view(b, c, 1, 1)


class ViewConstant(Net):
    def body(self, x: Tensor) -> Tensor:
        return x.view(-1, 8, 64)[..., None]


class FlattenToLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(F.relu(self.a(x)), 1))


class StackMean(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.a(x)]).mean(0)


class MeanOverChannels(Net):
    def __init__(self) -> None:
        super().__init__(1)

    def body(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class BroadcastMask(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Conv2d(8, 1, 1)

    def body(self, x: Tensor) -> Tensor:
        return x * self.mask(x).sigmoid()


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.depth, self.point = nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 6, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.point(F.relu(self.depth(x)))


class FunctionalDepthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=8)


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.a = nn.Conv2d(8, 12, 3, groups=2)

    def body(self, x: Tensor) -> Tensor:
        return self.a(x).relu()


class Transposed(Net):
    def __init__(self) -> None:
        super().__init__(4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.depth = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6)
        self.down = nn.Conv2d(6, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.down(self.depth(self.up(x).relu()))


class Conv1dAnd3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv3d(3, 6, 1), nn.Conv1d(6, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x[:, :, None]).squeeze(2).flatten(2)
        return self.head(self.b(y.relu()).amax(2))


class SharedModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.a(self.a(x).relu())


class TiedWeight(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.b.weight = self.a.weight

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class BareScale(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.randn(1, 8, 8, 8))

    def body(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class BufferScale(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 8, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        return x * self.scale


class ConstantScale(Net):
    def body(self, x: Tensor) -> Tensor:
        return x * torch.linspace(1, 2, 8).view(1, 8, 1, 1)


class ConstantShortcut(Net):
    """The parameter-free shortcut of CIFAR ResNets: every second pixel, channels padded with zeros."""

    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(6, 16, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


class CoordinateConcat(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(9, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, x.shape[3]).expand(x.shape[0], 1, x.shape[2], -1)
        return self.a(torch.cat([x, ramp], 1)).relu()


class WriteIntoConstant(Net):
    def body(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x[:, :1]).expand(-1, 8, -1, -1).clone()
        out += x
        return out


class WeightNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))

    def body(self, x: Tensor) -> Tensor:
        return self.a(x).relu()


class NoGradStem(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.head(x.mean((2, 3)))


class Detach(Net):
    def body(self, x: Tensor) -> Tensor:
        return x + x.detach().sigmoid()


class TwoHeads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.other = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = self.stem(x)
        z = self.a(y)
        return {"feature": z, "logits": self.head(y.mean((2, 3))), "aux": self.other(z.mean((2, 3)))}


class GroupNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x)).relu()


class LayerNormMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.head((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))


class PreluSigmoid(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.norm, self.a = nn.PReLU(8), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.a(self.norm(self.act(x))).sigmoid()


class SoftmaxOverChannels(Net):
    def body(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class UnknownOperator(Net):
    def body(self, x: Tensor) -> Tensor:
        return x + x.sort(1).values


class NothingFree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x.mean((2, 3)))


class TwoInputs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.head((self.stem(x) + self.other(y)).mean((2, 3)))


class DictInput(Net):
    def forward(self, batch: dict[str, Tensor], *, gain: float = 1.0) -> Tensor:  # type: ignore[override]
        return self.head((gain * self.stem(batch["image"])).mean((2, 3)) * batch["weight"])


class LstmTail(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm = nn.Conv2d(8, 6, 1), nn.LSTM(6, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.a(self.stem(x)).flatten(2).transpose(1, 2))
        return self.head(y[:, -1])


class Einsum(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix = nn.Conv2d(8, 6, 1), nn.Parameter(torch.randn(8, 8))

    def body(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.mix) + self.a(x).sum(1, keepdim=True)


class Attention(nn.Module):
    """Written by hand: one projection to query, key and value, heads by a view with constants."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.embed, self.qkv, self.proj = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * 4**-0.5).softmax(-1) @ v
        return self.head(F.gelu(self.up(x + self.proj(y.transpose(1, 2).reshape(n, t, 8)))).mean(1))


class FusedAttention(Attention):
    def __init__(self) -> None:
        super().__init__(fused=True)


class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.head(self.up(x + self.attend(x, x, x, need_weights=False)[0]).relu().mean(1))


class ClassToken(nn.Module):
    """A learnt token and learnt positions, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head((x + self.down(F.gelu(self.up(x))))[:, 0])


class Registers(ClassToken):
    """Several learnt tokens as one parameter, beside others, under a norm over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.norm = nn.Parameter(torch.randn(1, 3, 8)), nn.LayerNorm(8)
        self.position = nn.Parameter(torch.randn(1, 7, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))


class DataParallel(nn.DataParallel[Plain]):
    def __init__(self) -> None:
        super().__init__(Plain())


class FrozenParts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a = torchvision.ops.FrozenBatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.stem.requires_grad_(False)

    def body(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x)).relu()


class FunctionalConv(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8, 3, 3)), nn.Parameter(torch.randn(6))
        self.a = nn.Conv2d(6, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.a(F.conv2d(x, self.weight, self.bias, padding=1).relu())


class Unused(Net):
    """A layer that is never called, and a parameter that no operator meets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle, self.spare = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(8))

    def body(self, x: Tensor) -> Tensor:
        return self.a(x).relu()


class ResizeNormalise(Net):
    """A skip that is resized by a recomputed scale, features of unit length at each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(6, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.a(x).relu(), scale_factor=2.0, mode="bilinear", recompute_scale_factor=True)
        return x + F.interpolate(F.normalize(self.b(y), dim=2), size=x.shape[2:], mode="nearest")


class NormaliseChannels(Net):
    def body(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class WhereMask(Net):
    def body(self, x: Tensor) -> Tensor:
        low = x.mean((2, 3), keepdim=True)
        return torch.where(x > low, x, low * 0.1).masked_fill(x < -1, 0.5)


class WhereAcross(Net):
    """A mask of one channel, computed from all of them."""

    def body(self, x: Tensor) -> Tensor:
        return torch.where(x.amax(1, keepdim=True) > 1, x, x.new_zeros(()))


class AssignSlice(Net):
    def body(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :4] = 0
        return y


class AssignSpace(Net):
    def body(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 2:4] = 0
        y[:, :, :, 1] += 1
        return y


class AddToSlice(Net):
    def body(self, x: Tensor) -> Tensor:
        y = x * 1
        y[:, :4] += x[:, 4:]
        return y


class AssignChannels(Net):
    """A buffer of zeros filled branch by branch."""

    def __init__(self) -> None:
        super().__init__(12)
        self.a = nn.Conv2d(8, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 12, *x.shape[2:])
        y[:, :8] = x
        y[:, 8:] = self.a(x)
        return y


class C2f(Net):
    """Chunk, a list that grows by each block, concatenation: YOLO's block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def body(self, x: Tensor) -> Tensor:
        parts = list(self.a(x).chunk(2, 1))
        parts.extend(block(parts[-1]).relu() for block in self.blocks)
        return self.b(torch.cat(parts, 1)).relu()


class RepeatChannels(Net):
    def __init__(self) -> None:
        super().__init__(32)

    def body(self, x: Tensor) -> Tensor:
        return torch.cat([x.repeat(1, 2, 1, 1), x.repeat_interleave(2, 1)], 1)


class ExpandChannels(Net):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.a = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.a(x + self.one(x).expand(-1, 8, -1, -1)).relu()


class PlainAttribute(Net):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.linspace(0.5, 1.5, 8, dtype=torch.float64).view(8, 1, 1)

    def body(self, x: Tensor) -> Tensor:
        return x * self.gain


class MixedOutput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.other = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = self.stem(x)
        return [self.head(y.mean((2, 3))), None, (self.other(self.a(y).mean((2, 3))), {"feature": y[:, 2:4]})]


class PixelUnshuffle(Net):
    def __init__(self) -> None:
        super().__init__(32)

    def body(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)


class Gather(Net):
    """Channels picked by a constant list."""

    def body(self, x: Tensor) -> Tensor:
        return x[:, [7, 6, 5, 4, 3, 2, 1, 0]] + x.index_select(1, torch.arange(8))


class BatchedMatmul(Net):
    """Second-order pooling: channels against channels."""

    def __init__(self) -> None:
        super().__init__(64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2)
        return self.head((y @ y.transpose(1, 2)).flatten(1))


class SumOfHeads(Net):
    """Two linear layers in a row without anything between; sums over a list."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(8, 8, 1, bias=False) for _ in range(3))

    def body(self, x: Tensor) -> Tensor:
        return sum(part(x) for part in self.parts) / len(self.parts)  # type: ignore[no-any-return]


class DropPath(Net):
    """Dropout of several kinds, and statistics that are not tracked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
        self.drop = nn.Sequential(nn.Dropout2d(0.3), nn.AlphaDropout(0.2), torchvision.ops.StochasticDepth(0.5, "row"))

    def body(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.a(x)))


class ScaleByWidth(Net):
    """A number computed from the number of channels, as the default scale of attention is."""

    def body(self, x: Tensor) -> Tensor:
        return x * x.shape[1] ** -0.5


class ScaleByIndex(Net):
    """A constant that follows the width, but whose values belong to positions."""

    def body(self, x: Tensor) -> Tensor:
        return x * torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)


class ScaleByNumber(Net):
    def body(self, x: Tensor) -> Tensor:
        return 1 - (x * 0.3 + 2) / 5


class SqueezeExcite(Net):
    """A gate per channel from the mean of all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.a = torchvision.ops.SqueezeExcitation(8, 4), nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.a(self.squeeze(x))


class ResizedPositions(nn.Module):
    """Learnt positions on a grid of another size, as in vision transformers that take images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)
        self.position = nn.Parameter(torch.randn(1, 3, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        grid = F.interpolate(self.position.permute(0, 3, 1, 2), y.shape[2:], mode="bilinear")
        return self.head((y + grid).relu().mean((2, 3)))


class WidthOfTheInput(nn.Module):
    """Attention that gives its result the shape of what came in, and counts its heads in a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 5)
        self.attend = _WidthOfTheInput()

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2)
        y = y + self.attend(y)
        return self.head((y + self.mlp(y).relu()).mean(1))


class _WidthOfTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale = 4, 2**-0.5
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (self.scale * q @ k.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, c))


class TinyHead(Net):
    """A number computed from the width, before a head so small that no output shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return 1e4 + self.b(y * y.shape[1] ** -0.5)


class RampOfWidth(Net):
    """A constant as wide as the channels, computed from their number, one of whose values does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
        return self.a(x + 1e-7 * ramp.view(-1, 1, 1))


class Whitening(Net):
    """Runs on real values only: no Cholesky factor of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x).flatten(2)
        factor = torch.linalg.cholesky(y @ y.transpose(1, 2))
        return self.b(x) * factor.diagonal(dim1=1, dim2=2).sum(1)[:, None, None, None]


class TransposedTie(Net):
    """A weight read by a layer and, transposed, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.a(self.stem(x).mean((2, 3))).relu(), self.a.weight.t()))


class TileAndGlu(Net):
    def body(self, x: Tensor) -> Tensor:
        return F.glu(x.tile(1, 2, 1, 1), 1)


class Checkpointed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False)
        return y.relu()


class DynamicBranch(Net):
    def body(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x * 2
        return x


class PythonNumber(Net):
    def body(self, x: Tensor) -> Tensor:
        return x * float(x.max().item())


class TokenMixing(nn.Module):
    """MLP-Mixer: a layer over tokens does the same for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.tokens, self.back = nn.Linear(16, 6), nn.Linear(6, 16)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.back(F.gelu(self.tokens(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class RememberedHeads(nn.Module):
    """Attention as most libraries write it: the head count, their width and the product are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.RMSNorm(8)
        self.attend = RememberedAttention()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.head((x + self.attend(self.norm(x))).mean(1))


class RememberedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.width, self.all_width = 3, 4, 12
        self.q, self.k, self.v, self.o = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, self.num_heads, self.width).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, t, self.all_width))


class BiasedHeads(RememberedHeads):
    """The same with a bias per head, looked up in a table by relative position, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = BiasedAttention()


class BiasedAttention(RememberedAttention):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(31, 3))
        self.register_buffer("index", (torch.arange(16)[:, None] - torch.arange(16) + 15).flatten())

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, self.num_heads, self.width).transpose(1, 2) for f in (self.q, self.k, self.v))
        bias = self.table[self.index].view(t, t, -1).permute(2, 0, 1).unsqueeze(0)
        y = (q @ k.transpose(-2, -1) * 0.5 + bias).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, t, self.all_width))


class GroupNorms(Net):
    """One norm group over the width, and more groups than channels in one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.four, self.plain = nn.GroupNorm(1, 8), nn.GroupNorm(4, 8), nn.InstanceNorm2d(6)
        self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.four(self.b(self.plain(self.a(self.one(x)).relu()))).relu()


class SwapHalves(Net):
    """Slices at a computed half: any cut moves the half."""

    def body(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([x[:, half:], x[:, :half]], 1)


class TrainingHead(Net):
    """An auxiliary head that runs in training only, and reads a width that is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = self.stem(x)
        logits = self.head(y.mean((2, 3)))
        return (logits, self.aux(y).mean((2, 3))) if self.training else logits


class UntakenPath(Net):
    """A layer behind a switch: the trace cannot see what it would read."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.switched = nn.Conv2d(8, 8, 1), False

    def body(self, x: Tensor) -> Tensor:
        return self.extra(x) if self.switched else x


class BoxedBranch(Net):
    """A part that decides by values, in a network that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.choose, self.b = nn.Conv2d(8, 6, 1), Chooser(), nn.Conv2d(6, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.choose(self.a(x)))


class Chooser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.mean() > 0 else self.right(x)


class GruTail(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.gru = nn.Conv2d(8, 6, 1), nn.GRU(6, 4, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.a(self.stem(x)).flatten(2).transpose(1, 2))
        return self.head(y[:, -1])


ZOO: dict[str, Case] = {
    "plain": Case(Plain, (2, 3, 8, 8), free=("0", "3")),
    "residual": Case(Residual, (2, 3, 8, 8), free=("stem.0", "a")),
    "concat_then_add": Case(ConcatThenAdd, (2, 3, 8, 8), free=("stem.0", "a", "b")),
    "dense_concat": Case(DenseConcat, (2, 3, 8, 8), free=("stem.0", "a", "b")),
    "self_concat": Case(SelfConcat, (2, 3, 8, 8), free=("stem.0",)),
    "chunk_gate": Case(ChunkGate, (2, 3, 8, 8), free=("stem.0", "a")),
    "blur_pool": Case(BlurPool, (2, 3, 8, 8), free=("stem.0",)),
    "fixed_mix": Case(FixedMix, (2, 3, 8, 8), pinned="buffer"),
    "relative_positions": Case(RelativePositions, (2, 3, 4, 4), free=("stem.0", "qkv", "proj")),
    "as_high_as_heads": Case(AsHighAsHeads, (2, 3, 6, 6), free=("stem.0", "qkv", "proj")),
    "split_halves": Case(SplitHalves, (2, 3, 8, 8), free=("stem.0", "a")),
    "split_list": Case(SplitList, (2, 3, 8, 8), free=("stem.0", "a", "parts.0", "parts.1", "parts.2")),
    "split_constants": Case(SplitConstants, (2, 3, 8, 8), pinned="split"),
    "channel_shuffle": Case(ChannelShuffle, (2, 3, 8, 8), free=("stem.0",)),
    "channel_shuffle_module": Case(ChannelShuffleModule, (2, 3, 8, 8), free=("stem.0", "a")),
    "flip": Case(Flip, (2, 3, 8, 8), free=("stem.0",)),
    "roll_channels": Case(RollChannels, (2, 3, 8, 8), pinned="roll"),
    "slice_channels": Case(SliceChannels, (2, 3, 8, 8), pinned="slice"),
    "pixel_shuffle": Case(PixelShuffle, (2, 3, 8, 8), free=("stem.0",)),
    "view_of_shape": Case(ViewOfShape, (2, 3, 8, 8), free=("stem.0", "squeeze")),
    "view_constant": Case(ViewConstant, (2, 3, 8, 8), pinned="view"),
    "flatten_to_linear": Case(FlattenToLinear, (2, 3, 8, 8), free=("a",)),
    "stack_mean": Case(StackMean, (2, 3, 8, 8), free=("stem.0",)),
    "mean_over_channels": Case(MeanOverChannels, (2, 3, 8, 8), pinned="reduces over the channels"),
    "broadcast_mask": Case(BroadcastMask, (2, 3, 8, 8), free=("stem.0",), pinned="broadcasts"),
    "depthwise": Case(Depthwise, (2, 3, 8, 8), free=("stem.0", "point")),
    "functional_depthwise": Case(FunctionalDepthwise, (2, 3, 8, 8), pinned="group count"),
    "grouped": Case(Grouped, (2, 3, 8, 8), free=("stem.0", "a")),
    "transposed": Case(Transposed, (2, 3, 8, 8), free=("stem.0", "up", "down")),
    "conv_1d_3d": Case(Conv1dAnd3d, (2, 3, 8, 8), free=("a", "b")),
    "shared_module": Case(SharedModule, (2, 3, 8, 8), free=("stem.0",)),
    "tied_weight": Case(TiedWeight, (2, 3, 8, 8), free=("stem.0",)),
    "bare_scale": Case(BareScale, (2, 3, 8, 8), free=("stem.0",)),
    "buffer_scale": Case(BufferScale, (2, 3, 8, 8), free=("stem.0",)),
    "constant_scale": Case(ConstantScale, (2, 3, 8, 8), pinned="constant"),
    "constant_shortcut": Case(ConstantShortcut, (2, 3, 8, 8), free=("a",), pinned="pads"),
    "coordinate_concat": Case(CoordinateConcat, (2, 3, 8, 8), free=("stem.0", "a")),
    "write_into_constant": Case(WriteIntoConstant, (2, 3, 8, 8), pinned="constant"),
    "weight_norm": Case(WeightNorm, (2, 3, 8, 8), pinned="itself computed"),
    "no_grad_stem": Case(NoGradStem, (2, 3, 8, 8), free=("stem.0",)),
    "detach": Case(Detach, (2, 3, 8, 8), free=("stem.0",)),
    "two_heads": Case(TwoHeads, (2, 3, 8, 8), free=("stem.0",), pinned="model output"),
    "group_norm": Case(GroupNorm, (2, 3, 8, 8), free=("stem.0", "a")),
    "layer_norm_mlp": Case(LayerNormMlp, (2, 3, 8, 8), free=("embed", "up")),
    "prelu_sigmoid": Case(PreluSigmoid, (2, 3, 8, 8), free=("stem.0", "a")),
    "softmax_over_channels": Case(SoftmaxOverChannels, (2, 3, 8, 8), pinned="across the channels"),
    "unknown_operator": Case(UnknownOperator, (2, 3, 8, 8), pinned="sort"),
    "nothing_free": Case(NothingFree, (2, 3, 8, 8)),
    "two_inputs": Case(TwoInputs, (2, 3, 8, 8), free=("stem.0",), inputs=lambda x: (x, x[:, :2] * 2)),
    "dict_input": Case(
        DictInput, (2, 3, 8, 8), free=("stem.0",),
        inputs=lambda x: {"batch": {"image": x, "weight": x[:, :1, 0, 0]}, "gain": 2.0},
    ),
    "lstm_tail": Case(LstmTail, (2, 3, 8, 8), free=("stem.0",), pinned="lstm"),
    "einsum": Case(Einsum, (2, 3, 8, 8), free=("stem.0", "mix"), pinned="sum"),
    "attention": Case(
        Attention, (2, 3, 4, 4), free=("embed", "up"), pinned="reshape at the model's forward to (2, 16, 3, 2, 4)"
    ),
    "fused_attention": Case(FusedAttention, (2, 3, 4, 4), free=("embed", "up"), pinned="reshape at the model's"),
    "multihead_attention": Case(MultiheadAttention, (2, 3, 4, 4), free=("embed", "attend.in_proj_weight", "up")),
    "class_token": Case(ClassToken, (2, 3, 8, 8), free=("embed", "up")),
    "registers": Case(Registers, (2, 3, 8, 8), free=("embed", "up")),
    "data_parallel": Case(DataParallel, (2, 3, 8, 8), free=("module.0", "module.3")),
    "frozen_parts": Case(FrozenParts, (2, 3, 8, 8), free=("stem.0", "a")),
    "functional_conv": Case(FunctionalConv, (2, 3, 8, 8), free=("stem.0", "weight", "a")),
    "unused": Case(Unused, (2, 3, 8, 8), free=("stem.0", "a")),
    "resize_normalise": Case(ResizeNormalise, (2, 3, 8, 8), free=("stem.0", "a")),
    "normalise_channels": Case(NormaliseChannels, (2, 3, 8, 8), pinned="channels"),
    "where_mask": Case(WhereMask, (2, 3, 8, 8), free=("stem.0",)),
    "where_across": Case(WhereAcross, (2, 3, 8, 8), pinned="channels"),
    "assign_slice": Case(AssignSlice, (2, 3, 8, 8), pinned="slice"),
    "assign_space": Case(AssignSpace, (2, 3, 8, 8), free=("stem.0",)),
    "add_to_slice": Case(AddToSlice, (2, 3, 8, 8), pinned="slice"),
    "assign_channels": Case(AssignChannels, (2, 3, 8, 8), pinned="into a constant"),
    "c2f": Case(C2f, (2, 3, 8, 8), free=("stem.0", "a", "blocks.0", "blocks.1", "b")),
    "repeat_channels": Case(RepeatChannels, (2, 3, 8, 8), free=("stem.0",)),
    "expand_channels": Case(ExpandChannels, (2, 3, 8, 8), free=("a",)),
    "plain_attribute": Case(PlainAttribute, (2, 3, 8, 8), pinned="constant"),
    "mixed_output": Case(MixedOutput, (2, 3, 8, 8), free=("a",), pinned="slice"),
    "pixel_unshuffle": Case(PixelUnshuffle, (2, 3, 8, 8), free=("stem.0",)),
    "gather": Case(Gather, (2, 3, 8, 8), pinned="index"),
    "batched_matmul": Case(BatchedMatmul, (2, 3, 8, 8), pinned="matmul"),
    "sum_of_heads": Case(SumOfHeads, (2, 3, 8, 8), free=("stem.0",)),
    "scale_by_width": Case(ScaleByWidth, (2, 3, 8, 8), pinned="meets the number 0.353"),
    "scale_by_index": Case(ScaleByIndex, (2, 3, 8, 8), pinned="constant"),
    "squeeze_excite": Case(SqueezeExcite, (2, 3, 8, 8), free=("stem.0", "squeeze.fc1", "a")),
    "resized_positions": Case(ResizedPositions, (2, 3, 8, 8), free=("embed",)),
    "width_of_the_input": Case(WidthOfTheInput, (2, 3, 8, 8), free=("embed",)),
    "tiny_head": Case(TinyHead, (2, 3, 8, 8), free=("stem.0",), pinned="meets the number 0.35"),
    "ramp_of_width": Case(RampOfWidth, (2, 3, 8, 8), pinned="is another one after a cut"),
    "whitening": Case(Whitening, (2, 3, 8, 8), free=("stem.0",), pinned="matmul"),
    "scale_by_number": Case(ScaleByNumber, (2, 3, 8, 8), free=("stem.0",)),
    "transposed_tie": Case(TransposedTie, (2, 3, 8, 8), pinned="also element by element"),
    "tile_and_glu": Case(TileAndGlu, (2, 3, 8, 8), free=("stem.0",)),
    "checkpointed": Case(Checkpointed, (2, 3, 8, 8), free=("stem.0", "a")),
    "dynamic_branch": Case(DynamicBranch, (2, 3, 8, 8), pinned="DynamicBranch.body, line"),
    "python_number": Case(PythonNumber, (2, 3, 8, 8), pinned="PythonNumber.body, line"),
    "token_mixing": Case(TokenMixing, (2, 3, 8, 8), free=("embed", "up"), pinned="applied to each channel"),
    "remembered_heads": Case(RememberedHeads, (2, 3, 4, 4), free=("embed", "attend.q")),
    "biased_heads": Case(BiasedHeads, (2, 3, 4, 4), free=("embed", "attend.q")),
    "group_norms": Case(GroupNorms, (2, 3, 8, 8), free=("stem.0", "a", "b")),
    "swap_halves": Case(SwapHalves, (2, 3, 8, 8), pinned="slice at the model's forward takes channels 4:"),
    "training_head": Case(TrainingHead, (2, 3, 8, 8), free=("stem.0",)),
    "untaken_path": Case(UntakenPath, (2, 3, 8, 8), free=("stem.0",), pinned="not run in the traced forward"),
    "boxed_branch": Case(BoxedBranch, (2, 3, 8, 8), free=("stem.0", "b"), pinned="Chooser.forward, line"),
    "gru_tail": Case(GruTail, (2, 3, 8, 8), free=("stem.0", "a"), pinned="gru"),
    "drop_path": Case(DropPath, (2, 3, 8, 8), free=("stem.0",)),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with every parameter and statistic random, so that no check passes by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                scale = 0.5 if tensor.dim() < 2 else 1.5 / tensor[0].numel() ** 0.5
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(1 + 0.3 * noise.abs() if "var" in name else scale * noise)
    return model


def traced(name: str) -> tuple[nn.Module, ChannelGraph, Any]:
    """A case in eval mode and float64, anew; its graph, which is plain data, once for all tests; and its example."""
    return randomised(ZOO[name].build()).double().eval(), _graph(name), ZOO[name].example()


@cache
def _graph(name: str) -> ChannelGraph:
    return surgery.trace(randomised(ZOO[name].build()).double().eval(), ZOO[name].example())


def short_densenet() -> nn.Module:
    """DenseNet-121's blocks, four layers deep: what takes time in it is the number of layers alone."""
    return torchvision.models.DenseNet(16, (4, 4, 4, 4), 32)
