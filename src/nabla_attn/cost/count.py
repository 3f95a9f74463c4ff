"""The work of any module, counted on the meta device: nothing is computed and nothing allocated."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nabla_attn.cost.work import MatrixShape, Operator, Work

POINTWISE = {
    **dict.fromkeys(("relu", "hardtanh", "clamp", "clamp_min", "leaky_relu", "abs", "neg"), 1),
    **dict.fromkeys(("add", "sub", "mul", "div", "rsub", "pow", "maximum", "minimum", "where"), 1),
    **dict.fromkeys(("rsqrt", "sqrt", "hardsigmoid"), 2),
    "hardswish": 3,
    **dict.fromkeys(("sigmoid", "tanh", "exp", "log", "elu"), 4),
    **dict.fromkeys(("silu", "softplus", "_softmax", "_safe_softmax", "_log_softmax"), 5),
    **dict.fromkeys(("gelu", "mish"), 6),
}
"""Operations per element of the result."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


REDUCTIONS = _names(
    "mean sum amax amin max min var std _adaptive_avg_pool2d argmax linalg_vector_norm "
)
POOLS = _names("max_pool2d_with_indices avg_pool2d max_pool2d_with_indices_backward ")
COPIES = _names(
    "cat clone copy constant_pad_nd index index_select gather roll stack _to_copy repeat "
    "flip upsample_nearest2d upsample_bilinear2d pixel_shuffle pixel_unshuffle embedding "
)
NORMS = _names("native_layer_norm native_group_norm _fused_rms_norm ")
BATCH_NORMS = _names(
    "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit "
    "cudnn_batch_norm batch_norm "
)
"""Folded into the convolution before them, so they cost nothing."""

FREE = _names(
    "view _unsafe_view reshape _reshape_alias expand t transpose permute unsqueeze "
    "squeeze select slice split split_with_sizes chunk unbind alias detach as_strided "
    "unflatten narrow empty empty_like zeros ones zeros_like ones_like new_empty "
    "new_zeros new_ones arange full full_like lift_fresh scalar_tensor empty_strided fill "
    "zero movedim swapaxes view_as_real diagonal unfold "
)
"""Views, and tensors that do not depend on the input."""


def count(module: nn.Module, *inputs: Tensor | tuple[int, ...], **keywords: Any) -> Work:
    """Count the work of one forward pass, in evaluation mode.

    Batch norms count as folded into the convolution before them, activations as fused with it. The
    module is left as it was; parameters may lie anywhere, the meta device included.

    Args:
        module: The module to count.
        *inputs: Positional arguments: tensors, or shapes of float tensors such as (1, 3, 224, 224).
        **keywords: Keyword arguments; tensors among them are moved to the meta device.

    Returns:
        The operators and their sums. Operators without a rule are named in `unknown`.

    Raises:
        RuntimeError: The module needs the values of its input, which the meta device has not.
    """
    tensors = [
        item.to("meta") if isinstance(item, Tensor) else torch.zeros(item, device="meta")
        for item in inputs
    ]
    named = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in keywords.items()}
    # Tied parameters must stay tied, which a dictionary of all names would not keep.
    state = {
        name: value.detach().to("meta")
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    modes = [(part, part.training) for part in module.modules()]
    counter = _Counter()
    try:
        module.eval()
        with torch.no_grad(), torch.device("meta"), counter:
            torch.func.functional_call(module, state, tuple(tensors), named)
    finally:
        for part, mode in modes:
            part.training = mode
    return Work(tuple(counter.operators), counter.unknown)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.unknown: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        rule = _rule(name)
        if rule is None:
            self.unknown[name] = self.unknown.get(name, 0) + 1
        elif rule is not _free:
            self.operators.append(rule(name.rstrip("_"), args, _first_tensor(result)))
        return result


Rule = Callable[[str, Any, Tensor], Operator]


def _rule(name: str) -> Rule | None:
    # In-place operators end in an underscore and cost what the others do.
    plain = name.rstrip("_")
    for names, rule in RULES:
        if plain in names:
            return rule
    if name.startswith("_scaled_dot_product"):
        return _attention
    return None


def _convolution(name: str, args: Any, out: Tensor) -> Operator:
    x, weight, groups, is_transposed = args[0], args[1], args[8], args[6]
    moved, inner = x.numel() + out.numel(), x.shape[1] // groups
    taps, columns = math.prod(weight.shape[2:]), out.shape[1] // groups
    # A transposed convolution multiplies every pixel of its input with every tap.
    pixels = (x if is_transposed else out).numel() // (x if is_transposed else out).shape[1]
    if inner == 1 and groups > 1:
        macs = pixels * groups * columns * taps
        return Operator("depthwise", None, moved, macs, weight.numel(), out.numel())
    shape = MatrixShape(groups, pixels, inner, columns, taps)
    return Operator(name, shape, moved, 0, weight.numel(), out.numel())


def _product(name: str, args: Any, out: Tensor) -> Operator:
    left, right = (args[1], args[2]) if name in ("addmm", "baddbmm") else (args[0], args[1])
    batch = left.shape[0] if left.dim() == 3 else 1
    has_weights = name in ("addmm", "mm")
    shape = MatrixShape(batch, left.shape[-2], left.shape[-1], right.shape[-1])
    moved = left.numel() + out.numel() + (0 if has_weights else right.numel())
    return Operator(name, shape, moved, 0, right.numel() if has_weights else 0, out.numel())


def _attention(name: str, args: Any, out: Tensor) -> Operator:
    q, k, v = args[:3]
    pairs = q.shape[:-1].numel() * k.shape[-2]
    # Both products of attention as one: inner dimension of the first, columns of the second.
    shape = MatrixShape(q.shape[:-2].numel(), q.shape[-2], q.shape[-1] + v.shape[-1], k.shape[-2])
    moved = q.numel() + k.numel() + v.numel() + out.numel()
    return Operator("attention", shape, moved, POINTWISE["_softmax"] * pairs, 0, out.numel())


def _batch_norm(name: str, args: Any, out: Tensor) -> Operator:
    return Operator("batch_norm", elements=out.numel(), is_kernel=False)


def _norm(name: str, args: Any, out: Tensor) -> Operator:
    return Operator(name, None, 2 * out.numel(), 4 * out.numel(), 0, out.numel(), False)


def _pointwise(name: str, args: Any, out: Tensor) -> Operator:
    others = [x for x in args[1:] if isinstance(x, Tensor) and 1 < x.numel() == out.numel()]
    moved = out.numel() * len(others)
    return Operator(
        name, None, moved, POINTWISE[name] * out.numel(), 0, out.numel(), is_kernel=False
    )


def _reduction(name: str, args: Any, out: Tensor) -> Operator:
    size = args[0].numel()
    return Operator(name, None, size, size, 0, out.numel())


def _pool(name: str, args: Any, out: Tensor) -> Operator:
    kernel = args[1] if isinstance(args[1], list | tuple) else (args[1],) * 2
    taps = math.prod(kernel if len(kernel) > 1 else (*kernel, *kernel))
    return Operator(name, None, args[0].numel() + out.numel(), taps * out.numel(), 0, out.numel())


def _copy(name: str, args: Any, out: Tensor) -> Operator:
    return Operator(name, None, 2 * out.numel(), 0, 0, out.numel(), is_kernel=False)


def _free(name: str, args: Any, out: Tensor) -> Operator:
    raise AssertionError(name)


RULES: tuple[tuple[Any, Rule], ...] = (
    (frozenset({"convolution", "_convolution"}), _convolution),
    (frozenset({"mm", "addmm", "bmm", "baddbmm"}), _product),
    (BATCH_NORMS, _batch_norm),
    (NORMS, _norm),
    (POINTWISE, _pointwise),
    (REDUCTIONS, _reduction),
    (POOLS, _pool),
    (COPIES, _copy),
    (FREE, _free),
)


def _first_tensor(result: Any) -> Tensor:
    while isinstance(result, tuple | list):
        if not result:
            return torch.empty(0, device="meta")
        result = result[0]
    return result if isinstance(result, Tensor) else torch.empty(0, device="meta")
