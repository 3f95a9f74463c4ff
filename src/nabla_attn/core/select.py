"""Which key blocks each query block keeps: probabilities -> bool."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def select_by_mass(
    probs: Float[Tensor, "*rows kv_blocks"], threshold: float
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the fewest highest blocks of each row whose mass reaches `threshold`.

    The block that crosses the threshold is kept, ties go to the lower index, and 1 keeps all.

    Args:
        probs: rows that sum to 1, fp32 or fp64.
        threshold: kept mass in (0, 1].

    Raises:
        ValueError: the threshold is outside (0, 1].

    Source: arXiv:2507.13546 Alg. 1 lines 7-10; reference wan/modules/attention.py:272-276.
    """
    check_share("threshold", threshold)
    if threshold == 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    mass_above = ordered.cumsum(dim=-1) - ordered
    keep = mass_above < threshold
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def select_top_share(
    probs: Float[Tensor, "*rows kv_blocks"], share: float
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the highest `share` of each row's blocks, rounded up, so at least one.

    Args:
        probs: any score per block; only the order counts. Ties go to the lower index.
        share: kept blocks / all blocks, in (0, 1].

    Raises:
        ValueError: the share is outside (0, 1].
    """
    check_share("share", share)
    # 0.1 * 30 is 3.0000000000000004 in binary: shave rounding off before going up.
    num_kept = max(1, math.ceil(share * probs.shape[-1] * (1 - 1e-12)))
    index = probs.sort(dim=-1, descending=True, stable=True).indices[..., :num_kept]
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, index, True)


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1]: got {value}.")
