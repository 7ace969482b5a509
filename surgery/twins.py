"""Twins: modules whose forward fixes a width, written again so that every width follows the cut.

A twin has the parameters of its original under the same names and computes the same. A trace looks at the twin; a cut
turns a module into its twin only where it takes something away. Everything else is left as it is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.shufflenetv2 import InvertedResidual
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


def heads(x: Tensor, count: int, channels: int) -> Tensor:
    """(..., tokens, heads * channels) -> (..., heads, tokens, channels)."""
    return x.unflatten(-1, (count, channels)).transpose(-3, -2)


def joined(x: Tensor) -> Tensor:
    """The inverse of `heads`."""
    return x.transpose(-3, -2).flatten(-2)


class PlainAttention(nn.MultiheadAttention):
    """Multi-head attention whose head count is free of the embedding width; no fused path, no packed views."""

    head_dim: int

    @staticmethod
    def remember(attention: nn.MultiheadAttention) -> dict[str, Any]:
        return {"head_dim": attention.head_dim, "_qkv_same_embed_dim": False}

    @staticmethod
    def fits(attention: nn.MultiheadAttention) -> bool:
        return attention.bias_k is None and not attention.add_zero_attn

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() == 3 and not self.batch_first:
            turned = {id(t): t.transpose(0, 1) for t in (query, key, value)}  # the same tensor stays the same
            query, key, value = (turned[id(t)] for t in (query, key, value))
        q, k, v = (heads(t, self.num_heads, self.head_dim) for t in self._projected(query, key, value))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = F.dropout(weights, self.dropout, self.training) @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self.out_proj(joined(y))
        return (y.transpose(0, 1) if query.dim() == 3 and not self.batch_first else y), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight: Tensor | None = self.in_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
        given = {id(t): t for t in (query, key, value)}
        parts = {i: F.linear(t, weight, self.in_proj_bias).chunk(3, -1) for i, t in given.items()}
        return tuple(parts[id(t)][i] for i, t in enumerate((query, key, value)))

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one to be added to the scores, (batch, heads or 1, queries, keys)."""
        found: Tensor | None = None
        if mask is not None:
            found = _additive(mask, q.dtype)
            if found.dim() == 3:
                found = found.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            keys = _additive(padding, q.dtype)[..., None, None, :]
            found = keys if found is None else found + keys
        return found


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


class PlainWindowAttention(ShiftedWindowAttention):
    """Swin's attention in shifted windows; the head width is remembered instead of taken from the embedding."""

    head_dim: int

    @staticmethod
    def remember(attention: Any) -> dict[str, Any]:
        return {"head_dim": attention.qkv.out_features // 3 // attention.num_heads}

    def forward(self, x: Tensor) -> Tensor:
        """(n, height, width, channels) -> the same shape, or as many channels as `proj` writes."""
        height, width = x.shape[1:3]
        (wh, ww), shift = self.window_size, list(self.shift_size)
        x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
        rows, columns = x.shape[1] // wh, x.shape[2] // ww
        shift = [0 if count == 1 else by for count, by in zip((rows, columns), shift, strict=True)]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        x = x.unflatten(1, (rows, wh)).unflatten(3, (columns, ww)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = self._within(x, self._apart(rows, columns, shift, x) if any(shift) else None)
        x = x.unflatten(1, (rows, columns)).unflatten(3, (wh, ww)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            x = x.roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _within(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """Attention inside of each window: (n, windows, tokens, channels)."""
        bias = self.get_relative_position_bias()
        q, k, v = (heads(t, self.num_heads, self.head_dim) for t in self._qkv(x).chunk(3, -1))
        scores = self._scores(q, k) + bias
        weights = (scores if apart is None else scores + apart).softmax(-1)
        y = F.dropout(weights, self.attention_dropout, self.training) @ v
        return F.dropout(self.proj(joined(y)), self.dropout, self.training)

    def _qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)

    def _apart(self, rows: int, columns: int, shift: list[int], x: Tensor) -> Tensor:
        """-100 between tokens that only the cyclic shift brought into one window, (windows, 1, tokens, tokens)."""
        wh, ww = self.window_size
        region = []
        for count, size, by in ((rows, wh, shift[0]), (columns, ww, shift[1])):
            place = torch.arange(count * size, device=x.device)
            last, moved = (count - 1) * size, count * size - by
            region.append((place >= last).long() + (place >= moved).long() if by else place * 0)
        places = region[0][:, None] * 3 + region[1]
        places = places.unflatten(0, (rows, wh)).unflatten(2, (columns, ww)).transpose(1, 2).flatten(2).flatten(0, 1)
        differ = places[:, None, :, None] != places[:, None, None, :]
        return torch.zeros(differ.shape, dtype=x.dtype, device=x.device).masked_fill(differ, -100.0)


class PlainWindowAttentionV2(ShiftedWindowAttentionV2, PlainWindowAttention):
    """Swin v2's: cosine scores with a learnt scale per head, keys without a bias."""

    forward = PlainWindowAttention.forward

    def _qkv(self, x: Tensor) -> Tensor:
        if self.qkv.bias is None:
            return self.qkv(x)
        q, k, v = self.qkv.bias.chunk(3)
        return F.linear(x, self.qkv.weight, torch.cat((q, torch.zeros_like(k), v)))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=4.605170185988092).exp()  # log(100)
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale


class PlainRelativeAttention(RelativePositionalMultiHeadAttention):
    """MaxViT's attention with a learnt bias per offset."""

    @staticmethod
    def remember(attention: Any) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """(n, windows, tokens, channels) -> the same shape, or as many channels as `merge` writes."""
        q, k, v = (heads(t, self.n_heads, self.head_dim) for t in self.to_qkv(x).chunk(3, -1))
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge(joined(scores.softmax(-1) @ v))


class PlainShuffleBlock(InvertedResidual):
    """ShuffleNet's block with its split and its shuffle written as a size and an order of channels."""

    left: int
    order: Tensor

    @staticmethod
    def remember(block: Any) -> dict[str, Any]:
        half = block.branch2[-3].out_channels
        order = torch.arange(2 * half, device=block.branch2[0].weight.device).view(2, half).T.reshape(-1)
        return {"left": half, "order": order}

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            parts = x[:, : self.left], self.branch2(x[:, self.left :])
        else:
            parts = self.branch1(x), self.branch2(x)
        return torch.cat(parts, 1).index_select(1, self.order)


TWINS: dict[type[nn.Module], Any] = {
    nn.MultiheadAttention: PlainAttention,
    ShiftedWindowAttention: PlainWindowAttention,
    ShiftedWindowAttentionV2: PlainWindowAttentionV2,
    RelativePositionalMultiHeadAttention: PlainRelativeAttention,
    InvertedResidual: PlainShuffleBlock,
}


def twin_(module: nn.Module, original: nn.Module) -> None:
    """Turn `module`, a copy of `original` that may already be smaller, into the twin, if its class has one."""
    twin = TWINS.get(type(original))
    if twin is None or not getattr(twin, "fits", lambda _: True)(original):
        return
    module.__class__ = twin
    for name, value in twin.remember(original).items():
        if isinstance(value, Tensor):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)


@contextlib.contextmanager
def twinned(model: nn.Module) -> Iterator[None]:
    """Every module that has a twin is one inside; afterwards the model is as before."""
    before = [(m, type(m), dict(m.__dict__), dict(m._buffers)) for m in model.modules() if type(m) in TWINS]
    try:
        for module, *_ in before:
            twin_(module, module)
        yield
    finally:
        for module, plain, attributes, buffers in before:
            module.__class__ = plain
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
