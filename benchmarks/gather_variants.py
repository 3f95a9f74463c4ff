"""Other ways to gather on a CPU, checked and then timed in turn beside ours and diffusers' NABLA.

python -m benchmarks.gather_variants

How far neighbouring rows of the map agree is counted, since that bounds what sharing can gain.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.baselines import Baselines
from nabla_attn.attention import build_block_map, nabla_attention
from nabla_attn.backends import gather
from nabla_attn.backends.scratch import Scratch
from nabla_attn.backends.workers import for_each
from nabla_attn.bench.attention import measure_attention
from nabla_attn.bench.contenders import Contender
from nabla_attn.bench.report import section
from nabla_attn.bench.suite import make_record
from nabla_attn.bench.workloads import Inputs, Workload, make_inputs, workload
from nabla_attn.core.block_map import BlockMap
from nabla_attn.core.grid import TokenGrid

CPU = torch.device("cpu")
# Of the bytes of one product's scores.
BUCKETS = {"half": 0.5, "twice": 2.0, "four times": 4.0}


def pairs_share_a_copy(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, **_: object) -> Tensor:
    """Two neighbouring query blocks gather what either keeps; a bias hides what one does not."""
    mask, block = block_map.mask, block_map.block_tokens
    own = mask.unflatten(2, (-1, 2)).flatten(0, 2)
    pairs = replace(block_map, mask=mask.unflatten(2, (-1, 2)).any(dim=3))

    def run(rows: list[Tensor], bucket: gather._Bucket, scratch: Scratch) -> Tensor:
        queries = gather._take_blocks(rows[0], bucket.rows, scratch, "queries")
        keys = gather._gather(rows[1], bucket, scratch, "keys or values")
        scores = gather._scaled_product(queries, keys, 1 / sqrt(q.shape[-1]), scratch, "scores")
        columns = (bucket.columns % mask.shape[-1]).view(len(queries), 1, -1).expand(-1, 2, -1)
        hidden = ~own[bucket.rows].gather(2, columns)[:, :, None, :, None]
        scores.view(len(queries), 2, block, -1, block).masked_fill_(hidden, float("-inf"))
        torch.softmax(scores, dim=-1, out=scores)
        values = gather._gather(rows[2], bucket, scratch, "keys or values")
        return torch.bmm(scores, values, out=queries)

    return _attend(run, q, k, v, pairs, query_tokens=2 * block)


def runs_are_views(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, **_: object) -> Tensor:
    """Neighbouring key blocks are read where they lie, one product a run; values are gathered."""
    block, scale = block_map.block_tokens, 1 / sqrt(q.shape[-1])

    def run(rows: list[Tensor], bucket: gather._Bucket, scratch: Scratch) -> Tensor:
        queries = gather._take_blocks(rows[0], bucket.rows, scratch, "queries")
        keys, kept = rows[1].flatten(0, 1), bucket.columns.view(len(queries), -1)
        scores = scratch.take("scores", (*queries.shape[:2], kept.shape[1] * block), q.dtype)
        for query, line, columns in zip(queries, scores, kept.tolist(), strict=True):
            for start, end in _runs(columns):
                part = line[:, start * block : end * block]
                first = columns[start] * block
                view = keys[first : first + part.shape[1]]
                torch.addmm(part, query, view.mT, beta=0, alpha=scale, out=part)
        torch.softmax(scores, dim=-1, out=scores)
        values = gather._gather(rows[2], bucket, scratch, "keys or values")
        return torch.bmm(scores, values, out=queries)

    return _attend(run, q, k, v, block_map)


def _runs(columns: list[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of numbers that follow each other."""
    start = 0
    for end in range(1, len(columns) + 1):
        if end == len(columns) or columns[end] != columns[end - 1] + 1:
            yield start, end
            start = end


def divided_at_the_end(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, **_: object) -> Tensor:
    """Probabilities stay unnormalised, and the output is divided by their sum."""
    scale = 1 / sqrt(q.shape[-1])

    def run(rows: list[Tensor], bucket: gather._Bucket, scratch: Scratch) -> Tensor:
        queries = gather._take_blocks(rows[0], bucket.rows, scratch, "queries")
        keys = gather._gather(rows[1], bucket, scratch, "keys or values")
        scores = gather._scaled_product(queries, keys, scale, scratch, "scores")
        scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
        total = scores.sum(dim=-1, keepdim=True)
        values = gather._gather(rows[2], bucket, scratch, "keys or values")
        return torch.bmm(scores, values, out=queries).div_(total)

    return _attend(run, q, k, v, block_map)


def _attend(
    run: Callable[[list[Tensor], gather._Bucket, Scratch], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    query_tokens: int | None = None,
) -> Tensor:
    """A forward whose buckets are computed by `run`, from rows of queries, keys and values."""
    block = block_map.block_tokens
    sizes = (query_tokens or block, block, block)
    rows = [gather._as_rows(x, size) for x, size in zip((q, k, v), sizes, strict=True)]
    out = torch.zeros_like(rows[0])
    buckets = gather._Buckets(block_map, q.dtype, None)

    def attend_slice(part: tuple[slice, slice], scratch: Scratch) -> None:
        bucket = buckets.bucket(*part)
        out.index_copy_(0, bucket.rows, run(rows, bucket, scratch))

    for_each(attend_slice, buckets.slices, q.device)
    return out.view(q.shape)


WAYS = {
    "pairs share a copy": pairs_share_a_copy,
    "runs are views": runs_are_views,
    "divided at the end": divided_at_the_end,
}


class Variants(Baselines):
    """diffusers' NABLA, and other ways to gather."""

    def attention(
        self, grid: TokenGrid, inputs: Inputs, device: torch.device, *, needs_grad: bool
    ) -> list[Contender]:
        """All of `WAYS`, and other sizes of buckets."""
        found = super().attention(grid, inputs, device, needs_grad=needs_grad)
        reason = "it has no backward" if needs_grad else None
        if reason is None and (grid.is_ragged or grid.num_blocks % 2):
            reason = "it takes an even number of whole blocks"
        for name, attend in WAYS.items():
            own = mock.patch.object(gather, "attend", attend)
            found.append(_contender(name, own, grid, inputs, reason))
        for name, factor in BUCKETS.items():
            size = int(gather.CPU_BYTES_PER_THREAD * factor)
            sized = mock.patch.object(gather, "CPU_BYTES_PER_THREAD", size)
            found.append(_contender(f"buckets of {name} the size", sized, grid, inputs, None))
        return found


def _contender(
    name: str,
    patch: AbstractContextManager[Any],
    grid: TokenGrid,
    inputs: Inputs,
    reason: str | None,
) -> Contender:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with patch:
            return nabla_attention(q, k, v, grid, inputs.config, backend="gather")

    return Contender(f"ours (gather, {name})", None if reason else run, reason)


def count_sharing(block_map: BlockMap) -> dict[str, float]:
    """What rows of a map share.

    Returns:
        The share of pairs of neighbouring rows that keep the same blocks, how many times more
        products a pair has that attends what either keeps, and the blocks of a row's run.
    """
    mask = block_map.mask
    first, second = mask.unflatten(2, (-1, 2)).unbind(dim=3)
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[..., :-1]
    return {
        "equal_pairs": (first == second).all(dim=-1).double().mean().item(),
        "products_of_unions": 2 * (first | second).sum().item() / mask.sum().item(),
        "blocks_a_run": mask.sum().item() / starts.sum().item(),
    }


def measure(
    work: Workload, density: float, *, backward: bool = False, rounds: int = 5
) -> dict[str, Any]:
    """Check and time all ways at one density, and count what rows share."""
    result = measure_attention(
        work, density, CPU, backward=backward, rounds=rounds, baselines=Variants()
    )
    inputs = make_inputs(work, density, CPU)
    shared = count_sharing(build_block_map(inputs.q, inputs.k, work.grid, inputs.config))
    return result | {"shared": shared}


def main(arguments: list[str] | None = None) -> None:
    """Measure both data types and directions, save the record and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, help="of 32x32 tokens; default: 16, 16,384 tokens")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("out/gather_variants.json"))
    options = parser.parse_args(arguments)
    base = workload("toy-16k")
    if options.frames:
        base = base.with_grid(TokenGrid(options.frames, 32, 32))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for backward in (False, True):
            work = replace(base, dtype=dtype)
            sys.stderr.write(f"{dtype}, {'forward+backward' if backward else 'forward'}\n")
            run = measure(work, options.density, backward=backward, rounds=options.rounds)
            results.append(run)
    config = {"workload": "gather variants", "rounds": options.rounds}
    record = make_record("bench", config, results, CPU)
    record.save(options.output)
    sys.stdout.write(section(record))
    sys.stdout.write(f"Rows share: {results[0]['shared']}\nrecord: {options.output}\n")


if __name__ == "__main__":
    main()
