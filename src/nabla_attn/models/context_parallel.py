"""Context parallelism (Ulysses) through diffusers: every rank has some tokens outside attention and
some heads of all tokens inside it. Maps are per head, so nothing else is shared.

Joint text stays whole on every rank; only its heads are shared out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nabla_attn.core.grid import TokenGrid


@dataclass(frozen=True)
class Ranks:
    """The processes that share one sequence.

    Attributes:
        group: Their process group.
    """

    group: Any

    @property
    def count(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Number of this process among them, from 0."""
        return dist.get_rank(self.group)


def ranks_of(model: nn.Module, grid: TokenGrid, heads: int) -> Ranks | None:
    """The ranks that `enable_parallelism` gave the model; None without it.

    Raises:
        ValueError: A kind of parallelism that block maps cannot follow, or tokens or heads that the
            ranks cannot share evenly.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        return None
    if config.ring_degree > 1:
        raise ValueError(
            "ring attention passes keys along piece by piece, so no rank sees the whole map that "
            "blocks are selected from. Use ContextParallelConfig(ulysses_degree=...)."
        )
    if config.ulysses_anything:
        raise ValueError("ulysses_anything shares tokens unevenly. Use a plain ulysses_degree.")
    ranks = Ranks(config._ulysses_mesh.get_group())
    for what, count in (("heads", heads), (f"tokens of {grid}", grid.num_tokens)):
        if count % ranks.count:
            raise ValueError(
                f"{count} {what} do not divide over {ranks.count} ranks. Choose a ulysses_degree "
                "that divides both."
            )
    return ranks


def shares_arguments(model: Any) -> bool:
    """Whether `enable_parallelism` took a plan that splits the arguments of the model's forward."""
    registry = getattr(model, "_diffusers_hook", None)
    return registry is not None and any(name.startswith("cp_input") for name in registry.hooks)


def keep_ranks_from(modules: Iterable[Any]) -> None:
    """Take context parallelism away from attention over keys that every rank has whole."""
    for module in modules:
        processor: Any = getattr(module, "processor", None)
        if getattr(processor, "_parallel_config", None) is not None:
            processor._parallel_config = None


def to_heads(x: Tensor, ranks: Ranks, before: int, after: int, order: Tensor | None) -> Tensor:
    """This rank's tokens of all heads -> all tokens of its heads.

    Args:
        x: [batch, tokens, heads, dim], the video's share of tokens between whole text.
        ranks: The ranks.
        before: Text tokens in front.
        after: Text tokens behind.
        order: The heads in the order in which ranks take them; None is as they are.
    """
    from diffusers.models.attention_dispatch import SeqAllToAllDim

    x = x if order is None else x.index_select(2, order)
    parts = list(x.split([before, x.shape[1] - before - after, after], dim=1))
    heads = x.shape[2] // ranks.count
    mine = slice(ranks.rank * heads, (ranks.rank + 1) * heads)
    parts[1] = SeqAllToAllDim.apply(ranks.group, parts[1].contiguous(), 2, 1)
    parts[0], parts[2] = parts[0][:, :, mine], parts[2][:, :, mine]
    return torch.cat(parts, dim=1)


def to_tokens(x: Tensor, ranks: Ranks, before: int, after: int, order: Tensor | None) -> Tensor:
    """Undo `to_heads`; every rank gets all heads of the text."""
    from diffusers.models.attention_dispatch import SeqAllToAllDim

    parts = list(x.split([before, x.shape[1] - before - after, after], dim=1))
    parts[1] = SeqAllToAllDim.apply(ranks.group, parts[1].contiguous(), 1, 2)
    for text in (0, 2):
        if parts[text].shape[1]:
            parts[text] = _gather(parts[text], 2, ranks)
        else:
            parts[text] = parts[text].repeat(1, 1, ranks.count, 1)
    x = torch.cat(parts, dim=1)
    return x if order is None else x.index_select(2, order.argsort())


def gather_tokens(x: Tensor, ranks: Ranks) -> Tensor:
    """The video's tokens of all ranks [batch, tokens, width], from this rank's share of them."""
    return _gather(x, 1, ranks)


def _gather(x: Tensor, axis: int, ranks: Ranks) -> Tensor:
    """The parts of all ranks along an axis; gradients are summed where they came from."""
    from torch.distributed import _functional_collectives as collectives

    # Renamed in torch 2.13.
    names = ("all_gather_single_autograd", "all_gather_tensor_autograd")
    gather = next(getattr(collectives, name) for name in names if hasattr(collectives, name))
    found: Tensor = gather(x.contiguous(), axis, ranks.group)
    return found


def gather_stats(stats: Tensor, ranks: Ranks, order: Tensor | None) -> Tensor:
    """Statistics [2, heads of this rank] -> [2, all heads], in the model's order."""
    parts = [torch.empty_like(stats) for _ in range(ranks.count)]
    dist.all_gather(parts, stats.contiguous(), group=ranks.group)
    every = torch.cat(parts, dim=1)
    return every if order is None else every.index_select(1, order.argsort())


def balanced_order(loads: list[float], num_ranks: int) -> list[int]:
    """Heads in an order whose equal shares have nearly equal loads.

    The heaviest head left goes to the lightest rank with room. Deterministic, so that all ranks
    agree.

    Args:
        loads: Work of every head, such as its density.
        num_ranks: Ranks that take equally many heads each.
    """
    room = len(loads) // num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for head in sorted(range(len(loads)), key=lambda head: -loads[head]):
        rank = min((r for r in range(num_ranks) if len(shares[r]) < room), key=totals.__getitem__)
        shares[rank].append(head)
        totals[rank] += loads[head]
    return [head for share in shares for head in share]


def imbalance(loads: list[float], num_ranks: int, order: list[int] | None = None) -> float:
    """Load of the busiest rank / mean load; 1 is even.

    Args:
        loads: Work of every head.
        num_ranks: Ranks that take equally many heads each, in `order`.
        order: The heads in the order in which ranks take them; None is as they are.
    """
    order = list(range(len(loads))) if order is None else order
    room = len(loads) // num_ranks
    totals = [sum(loads[h] for h in order[r * room : (r + 1) * room]) for r in range(num_ranks)]
    return max(totals) * num_ranks / sum(totals)
