"""What each ATen operator does to the names of channels: one row per operator.

An operator without a row pins what it touches, with its name as the reason. Nothing is guessed.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgery.contraction import CONTRACTION_RULES, CONTRACTIONS
from surgery.layers import LAYER_RULES, LAYERS
from surgery.movement import MOVEMENT_RULES
from surgery.names import NEUTRAL, dense, everywhere, varying
from surgery.rules import CannotFollow, Rule, elementwise, rows, tie_along

if TYPE_CHECKING:
    from surgery.call import Call


def arithmetic(call: "Call", *args: Any, **kwargs: Any) -> Tensor:
    """Element-wise with constants, which may have been computed from the number of channels."""
    result = elementwise(call, *args, **kwargs)
    if call.constants:
        numbers = [str(a) for a in args if isinstance(a, int | float)]
        what = f"the number {', '.join(numbers)}" if numbers else "a constant made in the forward"
        call.doubt(result, f"meets {what}", of_values=True)
    return result


# -- across positions -------------------------------------------------------------------------------------------------


def spatial(call: "Call", x: Tensor, *_: Any, **__: Any) -> Any:
    """Pools and resizes trailing axes; each channel stays by itself. Channels run along axis 1, or 0 unbatched."""
    axes = [a for a in range(x.dim()) if x.shape[a] != call.shape[a]] if len(call.shape) == x.dim() else []
    rank = int(call.name.split("pool")[-1][:1]) if "pool" in call.name else len(axes)
    mixed = set(range(x.dim() - rank, x.dim())) | set(axes)
    tie_along(call, x, mixed, "pools or resizes")
    for axis in mixed:
        x = x.narrow(axis, 0, 1)
    return x.expand(call.shape)


def spatial_with_indices(call: "Call", x: Tensor, *_: Any, **__: Any) -> list[Tensor]:
    return [spatial(call, x)] * 2


def sampled(call: "Call", x: Tensor, places: Tensor, *_: Any) -> Tensor:
    """Reads values between pixels (grid_sampler, roi_align): each channel of axis 1 by itself."""
    if (dense(places) != NEUTRAL).any() and varying(places):
        raise CannotFollow("samples at places that differ by channel")
    return call.spread(call.vector(x, 1), 1)


def mixing(call: "Call", x: Tensor, axes: Any = None, *rest: Any, **kwargs: Any) -> Any:
    """Combines elements along `axes` and keeps the shape (softmax, cumsum): harmless unless channels lie there."""
    axes = [axes] if isinstance(axes, int) else list(axes)
    tie_along(call, x, {a % x.dim() for a in axes}, "computes across")
    return x if isinstance(call.result, Tensor) else [x] * len(call.result)


def reduction(call: "Call", x: Tensor, axes: Any = None, *_: Any, **__: Any) -> Any:
    """Reduces `axes` (all, if None). Names that differ there (a stack of branches) are tied, unless all channels do."""
    axes = range(x.dim()) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    axes, rank = sorted(a % x.dim() for a in axes), x.dim()
    if varying(x) and set(varying(x)) <= set(axes):
        raise CannotFollow("reduces over the channels")
    for axis in reversed(axes):
        first = x.narrow(axis, 0, 1)
        if axis in varying(x):
            call.names.tie(first, x)
        x = first if len(call.shape) == rank else first.squeeze(axis)
    return x


def extreme(call: "Call", x: Tensor, *rest: Any, **kwargs: Any) -> Any:
    """max and min: of everything, of two tensors, or along an axis with the indices."""
    if rest and isinstance(rest[0], Tensor):
        return elementwise(call, x, *rest)
    result = reduction(call, x, *rest, **kwargs)
    return [result] * 2 if rest or kwargs else result


def vector_norm(call: "Call", x: Tensor, order: Any = 2, axes: Any = None, *_: Any, **__: Any) -> Any:
    return reduction(call, x, axes)


def variance_and_mean(call: "Call", x: Tensor, axes: Any = None, *_: Any, **__: Any) -> Any:
    return [reduction(call, x, axes)] * 2


# -- the rest ---------------------------------------------------------------------------------------------------------


def like(call: "Call", x: Tensor, *_: Any, **__: Any) -> Tensor:
    """As another tensor in its dtype or device, which have no channels."""
    return x


def constant(call: "Call", *_: Any, **__: Any) -> list[Tensor]:
    return [everywhere(NEUTRAL, t.shape) for t in _results(call)]


def nothing(call: "Call", *_: Any, **__: Any) -> list[Tensor]:
    """Only checks, or tells a shape."""
    return []


def python_value(call: "Call", *_: Any, **__: Any) -> list[Tensor]:
    """The forward goes on with a number, or decides by it."""
    call.became_python()
    return []


def data_dependent(call: "Call", *_: Any, **__: Any) -> Any:
    """Shapes that depend on values."""
    call.became_python()
    return constant(call)


def _results(call: "Call") -> list[Tensor]:
    return [call.result] if isinstance(call.result, Tensor) else list(call.result)


RULES: dict[str, Rule] = {
    **LAYER_RULES,
    **CONTRACTION_RULES,
    **rows(
        arithmetic,
        "add sub mul div divide multiply subtract true_divide pow rsub addcdiv addcmul celu clamp clamp_max clamp_min "
        "elu eq floor_divide fmod ge gt hardshrink hardtanh le leaky_relu lerp lt masked_fill maximum minimum ne "
        "remainder softplus softshrink threshold where",
    ),
    **rows(
        elementwise,
        "_to_copy abs acos alias alpha_dropout asin atan atan2 bitwise_and bitwise_not bitwise_or ceil clone "
        "contiguous copy cos detach dropout erf erfc exp expm1 feature_alpha_dropout feature_dropout fill floor frac "
        "gelu hardsigmoid hardswish heaviside isfinite isinf isnan lift_fresh lift_fresh_copy log log10 log1p log2 "
        "log_sigmoid logical_and logical_not logical_or logical_xor mish nan_to_num neg negative reciprocal relu relu6 "
        "resolve_conj resolve_neg round rrelu rsqrt selu sgn sigmoid sign silu sin sinh softsign sqrt square tan tanh "
        "trunc xlogy zero",
    ),
    **rows(like, "to type_as"),
    **MOVEMENT_RULES,
    **rows(
        spatial,
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d "
        "avg_pool3d max_pool1d max_pool2d max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa _upsample_nearest_exact2d",
    ),
    **rows(
        spatial_with_indices,
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices",
    ),
    **rows(sampled, "grid_sampler roi_align roi_pool"),
    **rows(mixing, "softmax log_softmax _softmax cumsum cumprod cummax cummin logcumsumexp"),
    **rows(reduction, "mean sum amax amin var std logsumexp any all prod nansum nanmean count_nonzero argmax argmin"),
    **rows(variance_and_mean, "var_mean std_mean"),
    **rows(extreme, "max min"),
    **rows(vector_norm, "linalg_vector_norm norm"),
    **rows(
        constant,
        "zeros ones full arange empty new_zeros new_ones new_full new_empty scalar_tensor eye linspace rand randn "
        "empty_like full_like ones_like rand_like randn_like zeros_like bernoulli tril_indices triu_indices meshgrid",
    ),
    **rows(nothing, "_assert_tensor_metadata _assert_scalar _assert_async size stride numel is_same_size"),
    **rows(python_value, "item is_nonzero _local_scalar_dense equal allclose"),
    **rows(data_dependent, "nonzero nonzero_numpy masked_select unique _unique2 unique_consecutive"),
}

WEIGHTED: dict[Rule, int] = {**LAYERS, **dict.fromkeys(CONTRACTIONS, -1)}
"""Rules that take parameters as such, with the argument that holds data (-1: none need). To others all are data."""
