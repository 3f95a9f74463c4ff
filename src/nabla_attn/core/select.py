"""Which key blocks each query block keeps: probabilities -> bool, without sorting.

A row keeps its blocks above a crossing value and, among those equal to it, the first few. The
crossing value is found by bisection over the bit patterns of floats, which ascend as they do.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nabla_attn.shapes import Bool, Float

NUM_PASSES = 32
"""How often a selection reads every probability, about."""

# Floats of one sign sort like the integers that share their bits.
_BITS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


def select_by_mass(
    probs: Float[Tensor, "*rows kv_blocks"], threshold: float | Float[Tensor, "q_blocks 1"]
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the fewest highest blocks of each row whose mass reaches `threshold`.

    The block that crosses the threshold is kept, ties go to the lower index, and 1 keeps all.

    Args:
        probs: Rows that sum to 1, fp32 or fp64.
        threshold: Kept mass in (0, 1]; a tensor with one value per row is not checked, and a new
            value recompiles nothing.

    Raises:
        ValueError: The threshold is outside (0, 1].

    Source: arXiv:2507.13546 Alg. 1 lines 7-10; reference wan/modules/attention.py:272-276.
    """
    if not isinstance(threshold, Tensor):
        check_share("threshold", threshold)
        threshold = torch.tensor(threshold, dtype=probs.dtype, device=probs.device)
    zero = probs.new_zeros(())
    kept = _keep_until(probs, lambda above: torch.where(above, probs, zero), threshold)
    # Rounding must not let a row fall short of 1.
    return kept | (threshold >= 1)


def select_top_share(
    probs: Float[Tensor, "*rows kv_blocks"], share: float
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the highest `share` of each row's blocks, rounded up, so at least one.

    Args:
        probs: Rows of fp32 or fp64 that are not negative; only the order counts. Ties go to the
            lower index.
        share: Kept blocks / all blocks, in (0, 1].

    Raises:
        ValueError: The share is outside (0, 1].
    """
    num_kept = count_of_share(share, probs.shape[-1])
    return select_top(probs, torch.tensor(num_kept, dtype=probs.dtype, device=probs.device))


def select_top(
    probs: Float[Tensor, "*rows kv_blocks"], num_kept: Tensor
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the `num_kept` highest blocks, one number for all rows or one per row; see above."""
    return _keep_until(probs, lambda above: above.to(probs.dtype), num_kept)


def count_of_share(share: float, num_blocks: int) -> int:
    """Blocks that make up a share, rounded up, at least one.

    Raises:
        ValueError: The share is outside (0, 1].
    """
    check_share("share", share)
    # 0.1 * 30 is 3.0000000000000004 in binary: shave rounding off before going up.
    return max(1, math.ceil(share * num_blocks * (1 - 1e-12)))


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1]: got {value}.")


def _keep_until(values: Tensor, weigh: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Keep the fewest highest values of each row whose weights reach the target."""
    crossing = _crossing_value(values, weigh, target)
    above, ties = values > crossing, values == crossing
    missing = target - weigh(above).sum(dim=-1, keepdim=True)
    weight = weigh(ties).amax(dim=-1, keepdim=True)
    # A row that never reaches the target divides by zero: infinity, so all ties are kept.
    num_ties = (missing / weight).ceil().clamp_min(1)
    # Counted in floats, which are written without a detour over bools where this is compiled.
    rank = torch.where(ties, 1.0, 0.0).to(values.dtype).cumsum(dim=-1)
    # A row that is not a number keeps all, so that the output tells.
    return above | (ties & (rank <= num_ties)) | values[..., :1].isnan()


def _crossing_value(values: Tensor, weigh: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """The lowest value of each row such that what lies above it weighs less than the target."""
    integer, num_bits = _BITS[values.dtype]
    bits = values.view(integer)
    high = bits.amax(dim=-1, keepdim=True)
    low = torch.full_like(high, -1)
    for _ in range(num_bits):
        middle = (low + high) >> 1
        is_light = weigh(bits > middle).sum(dim=-1, keepdim=True) < target
        low, high = torch.where(is_light, low, middle), torch.where(is_light, middle, high)
    return high.view(values.dtype)
