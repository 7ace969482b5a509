"""How float32 becomes int8 for a target: which numbers are signed, how many bits are used, what becomes int8."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from export.errors import NotQuantizable
from export.machine import instruction_sets

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operators that are worth it: they multiply weights."""


@dataclass(frozen=True)
class Recipe:
    """Weights are always symmetric int8, with a scale per channel.

    `weight_bits` is 8 or 7; `operators` those whose tensors become int8, empty for all that onnxruntime can; `options`
    the quantizer's extra ones.
    """

    activations: Literal["uint8", "int8"]
    weight_bits: Literal[7, 8] = 8
    operators: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


# x86: onnxruntime's fast kernels multiply unsigned with signed bytes (signed with signed: 2 to 3 times slower). Without
# VNNI they add two products in 16 bits, which saturate (VPMADDUBSW): with 8-bit weights a ResNet-20 fell from 30 to
# 16 dB and 3.7 % of its answers changed, with 7 bits it keeps 27 dB. onnxruntime calls that reduce_range.
#
# TensorRT: takes zero points of 0 only, wants the inputs of weighted layers quantized and not their outputs, so that
# what follows is fused into them, and refuses biases in int32, so that these stay float32.
RECIPES = {
    "x86-vnni": Recipe("uint8"),
    "x86-avx2": Recipe("uint8", weight_bits=7),
    "tensorrt": Recipe(
        "int8",
        operators=WEIGHTED,
        options={
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
        },
    ),
}
TARGETS = ("x86", *RECIPES)


def resolved(target: str) -> str:
    """The name of the target's recipe. "x86" is this CPU: x86-vnni if it has VNNI, else x86-avx2, safe on any x86.

    Raises:
        NotQuantizable: an unknown target.
    """
    if target not in TARGETS:
        raise NotQuantizable(
            f"target {target!r} is not known", at="target", effect="nothing was written",
            fix=f"use one of {', '.join(map(repr, TARGETS))}",
        )
    if target == "x86":
        return "x86-vnni" if has_vnni() else "x86-avx2"
    return target


def has_vnni() -> bool:
    """Whether this CPU sums products of bytes in 32 bits."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(instruction_sets())
