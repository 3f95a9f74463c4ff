"""Measure which blocks to keep when dropped ones are estimated: every rule with every tail.

python -m benchmarks.rules; then `python -m benchmarks.pages` makes the table. It continues with the
prompts that its record does not have yet.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import typer
from torch import Tensor

import nabla_attn as na
from benchmarks.tails import earlier, recorded_settings
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.exact import TAILS, BlockSums, sum_blocks
from nabla_attn.core.order import block_order, to_blocks
from nabla_attn.core.select import count_of_share, select_top
from nabla_attn.generation.call import sample
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.methods import Moment
from nabla_attn.models import AttentionCall
from nabla_attn.moving_shapes.scene import describe, held_out_scenes
from nabla_attn.record import RunRecord, collect_versions, describe_device

SHARES = (0.05, 0.1, 0.2)
"""Kept blocks / all blocks at which the oracles choose."""

RULES = (
    *("topk-0.05", "topk-0.1", "topk-0.2"),
    *(f"nabla-{mass}" for mass in (0.05, 0.1, 0.2, 0.3, 0.5)),
    *(f"nabla-{mass}_topk-0.03" for mass in (0.05, 0.1, 0.2, 0.3, 0.5)),
    *("sol-2.5", "sol-2", "sol-1.5", "sol-1", "sol-0.5"),
    *("pisa-0.06", "pisa-0.12", "pisa-0.225"),
    *("ear-0.05", "ear-0.1", "ear-0.2", "ear-0.3", "ear-0.5"),
    *("subblock-0.05-16-1", "subblock-0.1-16-1", "subblock-0.2-16-1"),
    *("dfs-0.06", "dfs-0.12", "dfs-0.225"),
    *("xattn-0.05", "xattn-0.1", "xattn-0.2", "xattn-0.4"),
    *("draft-0.05", "draft-0.1", "draft-0.2", "draft-0.25"),
    *("sparge-0.06", "sparge-0.12", "sparge-0.225"),
    *("ssta-2", "ssta-4", "ssta-8"),
)
"""Each rule at several settings, so that errors can be read at equal densities."""

ORACLES = ("exact mass", "exact residual")
NUM_BLOCKS, NUM_TOKENS = 4, 16
"""Query blocks drawn of each call, and queries of each of them."""


def main(
    frames: int = 33,
    steps: int = 6,
    guidance: float = 3.0,
    num_prompts: int = 16,
    output: Path = Path("benchmarks/results/rule_error.json"),
) -> None:
    """Measure density, recall and error of every rule and tail, prompt by prompt."""
    pipeline = load_pipeline("builtin")
    request, settings = recorded_settings(pipeline, frames, steps, guidance)
    config = settings | {"workload": "rules", "rules": list(RULES), "oracles": list(ORACLES)}
    config |= {"num_blocks": NUM_BLOCKS, "num_tokens": NUM_TOKENS}
    results = earlier(output, config)
    for index, scene in enumerate(held_out_scenes(num_prompts)[len(results) :], len(results)):
        prompt = describe(scene)
        rows = measure(pipeline, replace(request, prompt=prompt, seed=index))
        results.append({"prompt": prompt, "rows": rows})
        device = describe_device(pipeline.device)
        numbers = {"results": results}
        RunRecord("rule_error", config, 0, collect_versions(), device, numbers).save(output)
        sys.stderr.write(f"{prompt}\n")


def measure(pipeline: Any, request: GenerationRequest) -> list[dict[str, Any]]:
    """Return density, recall and error of every rule and tail, means over a dense run's calls."""
    found: dict[tuple[str, str | None], list[tuple[float, float, float]]] = defaultdict(list)

    def observe(call: AttentionCall) -> None:
        for index in range(len(call.q)):
            for rule, tail, *numbers in _measure_sample(call, index):
                found[rule, tail].append(tuple(numbers))  # type: ignore[arg-type]

    with na.apply(pipeline, "nabla-1") as handle:
        handle.observe(observe)
        sample(pipeline, request, output_type="latent")
    names = ("density", "recall", "error")
    return [
        {"rule": rule, "tail": tail, "calls": len(calls)}
        | {
            name: round(fmean(values), 6)
            for name, values in zip(names, zip(*calls, strict=True), strict=True)
        }
        for (rule, tail), calls in found.items()
    ]


@dataclass(frozen=True, eq=False)
class _Queries:
    """Drawn query blocks of one head, and their exact attention.

    Attributes:
        sums: The sums of all of their tokens.
        blocks: The drawn blocks.
        owner: Which of them each token is of.
        rows: The tokens on which errors are measured.
    """

    sums: BlockSums
    blocks: Tensor
    owner: Tensor
    rows: Tensor

    def mean_of_blocks(self, x: Tensor) -> Tensor:
        """Means over the tokens of each drawn block."""
        shares = torch.nn.functional.one_hot(self.owner, len(self.blocks)).to(x.dtype)
        return (shares / shares.sum(dim=0)).T @ x

    @cached_property
    def measured(self) -> BlockSums:
        """The sums of the tokens on which errors are measured."""
        s, rows = self.sums, self.rows
        return BlockSums(s.masses[rows], s.values[rows], s.summaries[rows], s.means, s.rise[rows])

    @cached_property
    def exact(self) -> Tensor:
        """Their exact output."""
        return self.measured.attend(torch.ones_like(self.measured.masses, dtype=torch.bool), None)


def _measure_sample(
    call: AttentionCall, index: int
) -> Iterator[tuple[str, str | None, float, float, float]]:
    """Yield rule, tail, density, recall and error for one sample of a call."""
    layout, step = call.layout, call.step or 0
    tokens = [x[index : index + 1] for x in (call.q, call.k, call.v)]
    if not call.is_block_order:
        tokens = [to_blocks(x, layout) for x in tokens]
    q, k, v = tokens
    counts = block_order(layout, q.device).counts
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    heads = list(_draw(q[0], k[0], v[0], counts, scale, seed=1000 * step + call.layer))
    for rule in RULES:
        moment = Moment(step=step, layer=call.layer)
        config = na.parse(rule)
        mask = select_blocks(q, k, layout, config, scale=scale, v=v, moment=moment).mask[0]
        for tail in TAILS:
            yield rule, tail, *_numbers(heads, mask, counts, tail)
    for oracle, tail in product(ORACLES, TAILS):
        scores = [_oracle(head, oracle, tail) for head in heads]
        for share in SHARES:
            number = scores[0].new_tensor(count_of_share(share, counts.numel()))
            kept = [select_top(each, number) for each in scores]
            yield f"{oracle} {share}", tail, *_numbers(heads, kept, counts, tail)


def _draw(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float, *, seed: int
) -> Iterator[_Queries]:
    """Yield drawn queries of every head, the same blocks of all heads."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(counts.numel(), generator=generator)[:NUM_BLOCKS]
    block = q.shape[1] // counts.numel()
    slots = [torch.arange(int(counts[i])) + int(i) * block for i in drawn]
    owner = torch.arange(len(drawn)).repeat_interleave(counts[drawn])
    picked = [torch.randperm(len(part), generator=generator)[:NUM_TOKENS] for part in slots]
    starts = counts[drawn].cumsum(0) - counts[drawn]
    rows = torch.cat([part + start for part, start in zip(picked, starts, strict=True)])
    for query, key, value in zip(q, k, v, strict=True):
        sums = sum_blocks(query[torch.cat(slots)], key, value, counts, scale=scale)
        yield _Queries(sums, drawn, owner, rows)


def _oracle(head: _Queries, name: str, tail: str | None) -> Tensor:
    """Return what the drawn blocks choose by [drawn blocks, blocks]."""
    if name == "exact residual":
        return head.mean_of_blocks(head.sums.residuals(tail))
    masses = head.sums.masses
    return head.mean_of_blocks(masses / masses.sum(dim=-1, keepdim=True))


def _numbers(
    heads: list[_Queries], masks: Any, counts: Tensor, tail: str | None
) -> tuple[float, float, float]:
    """Return density, recall and relative error of the output, means over heads and queries."""
    found = []
    for head, mask in zip(heads, masks, strict=True):
        mine = mask[head.blocks] if len(mask) == counts.numel() else mask
        kept, sums = mine[head.owner[head.rows]], head.measured
        density = (kept * counts).sum() / (len(kept) * counts.sum())
        recall = torch.where(kept, sums.masses, 0).sum(dim=-1) / sums.masses.sum(dim=-1)
        error = (sums.attend(kept, tail) - head.exact).norm(dim=-1) / head.exact.norm(dim=-1)
        found.append((float(density), float(recall.mean()), float(error.mean())))
    means = [fmean(values) for values in zip(*found, strict=True)]
    return means[0], means[1], means[2]


if __name__ == "__main__":
    typer.run(main)
