"""PAROAttention: each head in the order of axes that suits it, a static mask, and integer tiles.

Calibration cuts exact attention into blocks in all six orders of the axes. An order is good whose
blocks are mostly empty or alike within: the one with the least

    a * (1 - sparse) / sum over orders + (1 - a) * quant / sum over orders

is taken, where `sparse` is the share of blocks nearly all of whose entries are tiny, and `quant`
the mean of a block's largest entry over its mean. The paper takes the least of a sum in which
`sparse` itself stands, which would favour orders with few empty blocks; here more count as better.
"""

from base64 import b64decode, b64encode
from functools import lru_cache
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.head_orders import named_order, order_of_heads
from nabla_attn.core.order import TokenLayout, to_raster
from nabla_attn.core.quantise import to_integers
from nabla_attn.core.select import count_of_share
from nabla_attn.methods.contract import Method, Selection, State, table_of_size
from nabla_attn.methods.parameters import number, share, word

ORDERS = tuple(map("".join, permutations("thw")))
LARGEST = {"int8": 127, "int4": 7}
TINY, NEARLY_ALL = 1e-3, 0.9
"""An entry below the first is tiny, a block with that share of tiny entries empty (the paper's)."""


def _select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    table = table_of_size("paro", grid, state)
    if table["share"] != params.share:
        raise ValueError(
            f"the table of paro keeps a share of {table['share']}: got paro-{params.share}. "
            "Calibrate again for this share."
        )
    heads = list(range(len(table["orders"]))) if state.heads is None else list(state.heads)
    masks = table["masks"][_stage(state.step, table["steps"])]
    count = -(-grid.num_tokens // grid.block.tokens)
    mask = torch.stack([_unpack(masks[head], count) for head in heads]).to(q.device)
    order = order_of_heads([table["orders"][head] for head in heads], grid, q.device)
    if params.bits == "full":
        return Selection(mask[None], q_order=order, kv_order=order)
    text = None if state.valid is None else state.valid[:, grid.num_slots :]

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(_by_blocks(x, grid, params.bits, text) for x in (q, k, v))  # type: ignore[return-value]

    return Selection(mask[None], q_order=order, kv_order=order, prepare=prepare)


def _by_blocks(x: Tensor, grid: TokenGrid, bits: str, text: Tensor | None) -> Tensor:
    """x rounded to integers, with one scale for each block of slots."""
    valid = None
    if text is not None:
        valid = torch.nn.functional.pad(text, (x.shape[2] - text.shape[1], 0), value=True)
        valid = valid[:, None, :, None].unflatten(2, (-1, grid.block.tokens))
    blocks = x.unflatten(2, (-1, grid.block.tokens))
    return to_integers(blocks, LARGEST[bits], valid).flatten(2, 3)


def _stage(step: int | None, num_steps: int) -> int:
    """Which mask a step has: its own in the first half, one for all in the second."""
    half = num_steps // 2
    return half if step is None else min(step, half)


def _pack(mask: Tensor) -> str:
    return b64encode(np.packbits(mask.flatten().numpy()).tobytes()).decode()


@lru_cache(maxsize=4096)
def _unpack(text: str, num_blocks: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(b64decode(text), np.uint8), count=num_blocks**2)
    return torch.from_numpy(bits.astype(bool)).view(num_blocks, num_blocks)


class Calibration:
    """Sums of blocks and metrics of each order, over the calls of one layer in dense runs."""

    def __init__(self, params: SimpleNamespace, grid: TokenGrid) -> None:
        self.params, self.grid, self.num_steps = params, grid, 1
        self.sums: dict[tuple[int, str], Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        self.num_calls = 0

    def observe(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> None:
        """Cut one call's attention in the blocks of each order."""
        self.num_steps = state.num_steps or 1
        stage = _stage(state.step, self.num_steps)
        self.num_calls += 1
        q, k = (to_raster(x, TokenLayout(self.grid))[0] for x in (q, k))
        for name in ORDERS:
            tokens = named_order(name, self.grid, q.device).tokens[0, 0]
            sums, metrics = cut_attention(q * state.scale, k, tokens, self.grid.block.tokens)
            key = (stage, name)
            self.sums[key] = self.sums.get(key, 0) + sums.cpu()
            self.metrics[name] = self.metrics.get(name, 0) + metrics.cpu()

    def entry(self) -> Any:
        """Orders and masks of the layer's heads."""
        metrics = torch.stack([self.metrics[name] for name in ORDERS]) / self.num_calls
        chosen = choose_orders(metrics, self.params.weight)
        orders = [ORDERS[index] for index in chosen.tolist()]
        stages = sorted({stage for stage, _ in self.sums})
        masks = [
            [
                _pack(highest_blocks(self.sums[stage, name][head], self.params.share))
                for head, name in enumerate(orders)
            ]
            for stage in stages
        ]
        block = self.grid.block.tokens
        sizes = [self.grid.frames, self.grid.height, self.grid.width]
        found = {"tokens": sizes, "block": block, "steps": self.num_steps}
        return found | {"share": self.params.share, "orders": orders, "masks": masks}


def cut_attention(q: Tensor, k: Tensor, tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Sums of attention's blocks [heads, blocks, blocks], and both metrics [2, heads].

    Args:
        q: Scaled queries of one sample in raster order [heads, tokens, dim].
        k: Keys.
        tokens: The token of every slot of an order, -1 where it is empty.
        block: Slots of a block.
    """
    taken, is_token = tokens.clamp_min(0), (tokens >= 0).to(q.dtype)
    keys, pairs = k[:, taken].transpose(-1, -2), is_token.view(-1, block).sum(dim=1)
    sums, empty, alike = [], [], []
    for rows, here in zip(taken.split(block), is_token.split(block), strict=True):
        scores = (q[:, rows] @ keys).masked_fill(is_token == 0, float("-inf"))
        probs = scores.softmax(dim=-1) * here[:, None]
        cut = probs.unflatten(-1, (-1, block))
        total, area = cut.sum(dim=(1, 3)), pairs * here.sum()
        is_tiny = (cut < TINY) & (here[:, None, None] * is_token.view(-1, block) > 0)
        sums.append(total)
        empty.append(is_tiny.sum(dim=(1, 3)) >= NEARLY_ALL * area)
        alike.append(cut.amax(dim=(1, 3)) / (total / area).clamp_min(1e-30))
    both = [torch.stack(x, dim=1).to(q.dtype).mean(dim=(1, 2)) for x in (empty, alike)]
    return torch.stack(sums, dim=1), torch.stack(both)


def choose_orders(metrics: Tensor, weight: float) -> Tensor:
    """The best order of each head, from both metrics of all orders [orders, 2, heads]."""
    sparse, quant = metrics.unbind(1)
    parts = [x / x.sum(dim=0).clamp_min(1e-30) for x in (1 - sparse, quant)]
    return (weight * parts[0] + (1 - weight) * parts[1]).argmin(dim=0)


def highest_blocks(sums: Tensor, share: float) -> Tensor:
    """The share of all blocks with the highest sums, and the highest block of each row."""
    count = count_of_share(share, sums.numel())
    index = sums.flatten().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(sums.numel(), dtype=torch.bool)
    mask[index] = True
    return mask.view(sums.shape).scatter(1, sums.argmax(dim=1, keepdim=True), True)


METHOD = Method(
    name="paro",
    title="an order of axes and a static mask for each head, integers in tiles",
    select=_select,
    calibrate=Calibration,
    parameters=(
        share("share", "kept blocks / all blocks of a head", example=0.3),
        word("bits", ("full", "int8", "int4"), default="full"),
        number("weight", least=0, most=1, default=0.5),
    ),
    kind="calibrated",
    exactness="reconstructed",
    ours="the weight of the two metrics; empty blocks count as good, against the paper's sign; the "
    "share is of each head, and every row keeps a block; integers are emulated for q, k and v, and "
    "not for probabilities, which backends do not show",
    paper="arXiv:2506.16054",
    published="paro-0.3-int8",
    needs=("step", "table"),
    is_trainable=False,
    keeps_constants=False,
    packs=False,
    takes_order=False,
)
