"""Which key blocks each query block keeps: scores -> bool, without sorting.

A row keeps its blocks above a crossing value and, among those equal to it, the first few. The
crossing value is found by bisection over the bit patterns of floats, which ascend as they do, and
in short rows, where many operations on little cost the most, by trying every value.

A score of minus infinity marks a pair that must not be kept, of two packed clips for example. A row
in which something is not a number keeps all, so that the output tells.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nabla_attn.shapes import Bool, Float

NUM_PASSES = 32
"""How often a selection reads every probability, about."""

FEW = 32
"""Blocks of a row that are compared in pairs instead."""

ROUNDINGS: dict[str, Callable[[float], int]] = {
    # 0.1 * 30 is 3.0000000000000004 in binary: shave rounding off before going up.
    "up": lambda count: math.ceil(count * (1 - 1e-12)),
    "down": int,
    "nearest": round,
}
"""Ways to make a number of blocks of a share; published code uses all three."""

SCOPES = ("row", "column", "head", "all")
"""What `select_by_normalised_share` compares: the key blocks of one query block, the query blocks
of all heads for one key block, all pairs of a head, all pairs of a sample."""

# Floats sort like the integers that share their bits, negative ones once their order is turned.
_BITS = {
    torch.float32: (torch.int32, 31, 0x7F80_0000),
    torch.float64: (torch.int64, 63, 0x7FF0_0000_0000_0000),
}
# What lies closer together than this is flat (VMoBA's constant).
_FLAT = 1e-6


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
    kept = _keep_until(probs, _mass_of(probs), threshold)
    # Rounding must not let a row fall short of 1.
    return kept | (threshold >= 1)


def select_within_mass(
    probs: Float[Tensor, "*rows kv_blocks"], threshold: float
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep as many highest blocks of each row as hold at most `threshold` together.

    The block that crosses the threshold is left out, unless it is the first; ties go to the lower
    index, and 1 keeps all.

    Args:
        probs: Rows that sum to 1, fp32 or fp64.
        threshold: Kept mass in (0, 1].

    Raises:
        ValueError: The threshold is outside (0, 1].

    Source: SpargeAttn, thu-ml/SpargeAttn@bfd980b spas_sage_attn/utils.py get_block_map_meansim.
    """
    check_share("threshold", threshold)
    if threshold == 1:
        return torch.ones_like(probs, dtype=torch.bool)
    kept = _keep_until(probs, _mass_of(probs), probs.new_tensor(threshold), round_ties=torch.floor)
    return kept | first_highest(probs)


def select_past_mass(
    probs: Float[Tensor, "*rows kv_blocks"], threshold: float, *, num_least: int = 1
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the highest blocks of each row until they hold more than `threshold`.

    The block that crosses the threshold is kept, and where the mass of some is the threshold itself
    one more; ties go to the lower index, and 1 keeps all. Rows are sorted.

    Args:
        probs: Rows that sum to 1, fp32 or fp64.
        threshold: Kept mass in (0, 1].
        num_least: How many blocks are kept whatever they hold.

    Raises:
        ValueError: The threshold is outside (0, 1].

    Source: Jenga, dvlab-research/Jenga@6905150 hyvideo/modules/attention_block_triton_diffres.py;
    SVG2, svg-project/Sparse-VideoGen@5ce7b01 svg/kmeans_utils.py:865.
    """
    check_share("threshold", threshold)
    if threshold == 1:
        return torch.ones_like(probs, dtype=torch.bool)
    values, index = probs.sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(values.cumsum(dim=-1)[..., :-1], (1, 0))
    kept = before <= threshold
    kept[..., :num_least] = True
    return torch.zeros_like(kept).scatter_(-1, index, kept) | _is_broken(probs)


def select_top_share(
    scores: Float[Tensor, "*rows kv_blocks"], share: float, *, rounding: str = "up"
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the highest `share` of each row's blocks, at least one.

    Args:
        scores: Rows of fp32 or fp64, of which only the order counts. Ties go to the lower index.
        share: Kept blocks / all blocks, in (0, 1].
        rounding: One of `ROUNDINGS`.

    Raises:
        ValueError: The share is outside (0, 1], or the rounding is unknown.
    """
    num_kept = count_of_share(share, scores.shape[-1], rounding)
    return select_top(scores, scores.new_tensor(num_kept))


def select_top(
    scores: Float[Tensor, "*rows kv_blocks"], num_kept: Tensor
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the `num_kept` highest blocks, one number for all rows or one per row; see above."""
    return _keep_until(scores, lambda above: above.to(scores.dtype), num_kept)


def first_highest(scores: Float[Tensor, "*rows kv_blocks"]) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep the highest block of each row, the first of those that are equal."""
    is_highest = scores == scores.amax(dim=-1, keepdim=True)
    return is_highest & (is_highest.cumsum(dim=-1) == 1)


def select_above_mean(
    scores: Float[Tensor, "*rows kv_blocks"],
    num_deviations: float,
    *,
    deviation: Float[Tensor, "*rows 1"] | None = None,
) -> Bool[Tensor, "*rows kv_blocks"]:
    """Keep what lies above a row's mean by more than a number of standard deviations.

    Equal scores are kept or dropped together. A row with nothing above that keeps its highest
    block, the first of those that are equal.

    Args:
        scores: Rows of fp32 or fp64; minus infinity counts neither for the mean nor the deviation.
        num_deviations: How many standard deviations; negative ones keep more than half.
        deviation: The rows' standard deviation where it is known otherwise; None computes it.

    Source: Sol-Attn (arXiv:2607.24027).
    """
    is_allowed = scores > float("-inf")
    count, zero = is_allowed.sum(dim=-1, keepdim=True), scores.new_zeros(())
    mean = torch.where(is_allowed, scores, zero).sum(dim=-1, keepdim=True) / count
    if deviation is None:
        squares = torch.where(is_allowed, (scores - mean).square(), zero)
        deviation = (squares.sum(dim=-1, keepdim=True) / count).sqrt()
    kept = scores > mean + num_deviations * deviation
    return kept | first_highest(scores) | _is_broken(scores)


def select_by_quantile(
    scores: Float[Tensor, "*heads q_blocks kv_blocks"], dropped_share: float
) -> Bool[Tensor, "*heads q_blocks kv_blocks"]:
    """Keep the pairs of a head that reach the quantile of all of its scores.

    Of n pairs in order, those from number int(dropped_share * n) on are kept, and all that equal
    the lowest of them. A row of which nothing is kept keeps its highest block, the first of those
    that are equal.

    Args:
        scores: Scores of fp32 or fp64, comparable between rows; minus infinity is not counted.
        dropped_share: Dropped pairs / all pairs, in [0, 1).

    Raises:
        ValueError: The share is outside [0, 1).

    Source: Draft attention (arXiv:2505.14708), shawnricecake/draft-attention@f3c81d5.
    """
    if not 0 <= dropped_share < 1:
        raise ValueError(f"dropped_share must be in [0, 1): got {dropped_share}.")
    pairs = scores.flatten(-2)
    is_allowed = scores > float("-inf")
    count = is_allowed.flatten(-2).sum(dim=-1, keepdim=True)
    num_kept = count - (dropped_share * count.double()).long()
    crossing = _crossing_value(pairs, lambda above: above, num_kept)[..., None]
    kept = is_allowed & (scores >= crossing)
    return kept | first_highest(scores) | _is_broken(scores)


def select_by_normalised_share(
    scores: Float[Tensor, "batch heads q_blocks kv_blocks"],
    threshold: float,
    *,
    own: Bool[Tensor, "q_blocks kv_blocks"],
    scope: str = "row",
) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
    """Keep own blocks, and the fewest highest others that bring their sum to a share of the total.

    Scores are first brought into [0, 1] within the scope, by its lowest and highest. At least one
    other is kept, the one that reaches the share included; ties go to the lower index in the order
    of heads, query blocks and key blocks. A scope in which all scores are equal keeps everything.

    Args:
        scores: Scores of fp32 or fp64; pairs of minus infinity are neither counted nor kept.
        threshold: The share, in (0, 1].
        own: Pairs that are kept whatever their score: a query block and the block that it is in.
        scope: One of `SCOPES`.

    Raises:
        ValueError: The threshold is outside (0, 1], or the scope is unknown.

    Source: VMoBA (arXiv:2506.23858), KwaiVGI/VMoBA@4da72ff src/vmoba.py:53-339.
    """
    check_share("threshold", threshold)
    _check_known("scope", scope, SCOPES)
    pairs, always = (_to_scope(x, scope) for x in (scores, own.expand(scores.shape)))
    zero = pairs.new_zeros(())
    is_allowed = pairs > float("-inf")
    low = pairs.masked_fill(~is_allowed, float("inf")).amin(dim=-1, keepdim=True)
    span = pairs.amax(dim=-1, keepdim=True) - low
    shares = (pairs - low) / torch.where(span <= _FLAT, span.new_ones(()), span)
    shares = torch.where(is_allowed, shares, zero)
    total = shares.sum(dim=-1, keepdim=True)
    target = threshold * total - torch.where(always, shares, zero).sum(dim=-1, keepdim=True)
    # What is not to choose from stands behind everything else.
    others = torch.where(always | ~is_allowed, -shares.new_ones(()), shares)
    kept = _keep_until(others, _mass_of(others.clamp_min(0)), target)
    kept = (kept | always | (total == 0)) & (is_allowed | _is_broken(pairs))
    return _from_scope(kept, scope, scores.shape)


def count_of_share(share: float, num_blocks: int, rounding: str = "up") -> int:
    """Number of blocks that make up a share, at least one.

    Raises:
        ValueError: The share is outside (0, 1], or the rounding is unknown.
    """
    check_share("share", share)
    _check_known("rounding", rounding, ROUNDINGS)
    return max(1, ROUNDINGS[rounding](share * num_blocks))


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1]: got {value}.")


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; expected one of {tuple(known)}.")


def _to_scope(x: Tensor, scope: str) -> Tensor:
    """Pairs [batch, heads, q_blocks, kv_blocks] with those of one scope along the last axis."""
    if scope == "column":
        return x.permute(0, 3, 1, 2).flatten(2)
    return x.flatten({"row": 3, "head": 2, "all": 1}[scope])


def _from_scope(x: Tensor, scope: str, shape: torch.Size) -> Tensor:
    if scope == "column":
        return x.unflatten(2, shape[1:3]).permute(0, 2, 3, 1)
    return x.view(shape)


def _is_broken(scores: Tensor) -> Tensor:
    """Whether something in a row is not a number."""
    return scores.isnan().any(dim=-1, keepdim=True)


def _mass_of(probs: Tensor) -> Callable[[Tensor], Tensor]:
    zero = probs.new_zeros(())
    return lambda above: torch.where(above, probs, zero)


def _keep_until(
    values: Tensor,
    weigh: Callable[[Tensor], Tensor],
    target: Tensor,
    round_ties: Callable[[Tensor], Tensor] = torch.ceil,
) -> Tensor:
    """Keep the fewest highest values of each row whose weights reach the target."""
    crossing = _crossing_value(values, weigh, target)
    above, ties = values > crossing, values == crossing
    missing = target - weigh(above).sum(dim=-1, keepdim=True)
    weight = weigh(ties).amax(dim=-1, keepdim=True)
    # A row that never reaches the target divides by zero: infinity, so all ties are kept. Nothing
    # missing and nothing to weigh is not a number: one is kept.
    num_ties = round_ties((missing / weight).nan_to_num(nan=1.0, posinf=float("inf")))
    if round_ties is torch.ceil:
        num_ties = num_ties.clamp_min(1)
    # Counted in floats, which are written without a detour over bools where this is compiled; once
    # their number is known, so that a GPU counts and compares in one loop.
    rank = torch.where(ties & (num_ties == num_ties), 1.0, 0.0).to(values.dtype).cumsum(dim=-1)
    return above | (ties & (rank <= num_ties)) | _is_broken(values)


def _crossing_value(values: Tensor, weigh: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """The lowest value of each row such that what lies above it weighs less than the target."""
    integer, num_bits, infinity = _BITS[values.dtype]
    bits = _turn_negative(values.view(integer), num_bits)
    high = bits.amax(dim=-1, keepdim=True)
    lowest = -infinity - 1
    # What is compiled serves rows of any length, and pays little for an operation.
    if not torch.compiler.is_compiling() and values.shape[-1] <= FEW:
        # It is one of few: all are tried at once.
        each = bits.movedim(-1, 0)[..., None]
        is_light = weigh(bits > each).sum(dim=-1, keepdim=True) < target
        crossing = torch.where(is_light, each, high).amin(dim=0)
        falls_short = weigh(bits >= lowest).sum(dim=-1, keepdim=True) < target
        high = torch.where(falls_short, lowest, crossing)
    else:
        low = torch.full_like(high, lowest - 1)
        for _ in range(num_bits + 1):
            # Their mean, without a sum that would not fit.
            middle = (low & high) + ((low ^ high) >> 1)
            is_light = weigh(bits > middle).sum(dim=-1, keepdim=True) < target
            low, high = torch.where(is_light, low, middle), torch.where(is_light, middle, high)
    # A row that never reaches the target crosses at minus infinity.
    return _turn_negative(high.clamp_min(lowest), num_bits).view(values.dtype)


def _turn_negative(bits: Tensor, num_bits: int) -> Tensor:
    """Integers that ascend as the floats of these bits do, and back."""
    return bits ^ ((bits >> num_bits) & torch.iinfo(bits.dtype).max)
