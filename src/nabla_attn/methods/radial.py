"""Radial attention: bands around a token's place, narrower the further apart two frames are."""

from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.neighbours import clip_of_frames, places_of_blocks
from nabla_attn.methods.contract import State, static
from nabla_attn.methods.parameters import number, word


def band_width(distance: int, frame_tokens: int, decay: float, block_tokens: int) -> int:
    """How far apart places of two frames may be; -1 where no pair is kept."""
    if distance <= 1:
        return frame_tokens
    length = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
    if length < block_tokens and distance % int(block_tokens / length):
        return -1
    return int(max(length * decay, block_tokens))


def _keep(grid: TokenGrid, params: SimpleNamespace, state: State, device: torch.device) -> Tensor:
    return _map(grid, params.decay, params.sink == "first", device)


@lru_cache(maxsize=16)
def _map(grid: TokenGrid, decay: float, has_sink: bool, device: torch.device) -> Tensor:
    """Blocks in whose pairs of frames most of the columns that hold a kept pair are well filled."""
    per_frame, block = grid.height * grid.width, grid.block.tokens
    frame, place = places_of_blocks(grid)
    widths = torch.tensor([band_width(d, per_frame, decay, block) for d in range(grid.frames)])
    clip, first = clip_of_frames(grid)
    is_token = frame.flatten() >= 0
    k_frame, k_place = frame.flatten()[is_token], place.flatten()[is_token]
    k_block = torch.arange(grid.num_blocks).repeat_interleave(frame.shape[1])[is_token]
    # A part is what a key block holds of one frame.
    parts, part = (k_block * grid.frames + k_frame).unique(return_inverse=True)
    with torch.inference_mode(False), torch.no_grad():
        kept = torch.zeros(grid.num_blocks, grid.num_blocks, dtype=torch.bool)
        for row, (frames, places) in enumerate(zip(frame, place, strict=True)):
            mine = frames[frames >= 0].unique().tolist()
            if len(mine) > 2:
                raise ValueError(
                    f"radial takes blocks of tokens of at most 2 frames: got {len(mine)} in blocks "
                    f"of {grid.block}. Use blocks of one frame, such as _block-1-8-16."
                )
            for at in mine:
                # Rows of this frame before every place.
                rows = torch.bincount(places[frames == at], minlength=per_frame)
                before = torch.nn.functional.pad(rows.cumsum(0), (1, 0))
                width = widths[(k_frame - at).abs()]
                if has_sink:
                    width = width.masked_fill(k_frame == first[at], per_frame)
                low = (k_place - width).clamp_min(0)
                high = (k_place + width).clamp_max(per_frame - 1)
                filled = before[high + 1] - before[low.clamp_max(per_frame)]
                filled = filled.masked_fill((width < 0) | (clip[k_frame] != clip[at]), 0)
                some, well = torch.zeros(2, len(parts), dtype=torch.long)
                some.index_add_(0, part, (filled > 0).long())
                well.index_add_(0, part, (3 * filled > (frames >= 0).sum()).long())
                kept[row, parts[5 * well > 3 * some] // grid.frames] = True
        return kept.to(device)


METHOD = static(
    _keep,
    name="radial",
    title="bands of places that narrow with the distance of frames",
    parameters=(
        number("decay", least=0, example=0.2),
        word("sink", ("first", "none"), default="first"),
    ),
    exactness="code",
    ours="blocks of any shape in one or two frames, their number of tokens in place of 128; "
    "a frame's last block is kept by the same rule where 128 does not divide its tokens",
    paper="arXiv:2506.19852",
    code="mit-han-lab/radial-attention@72788d4 radial_attn/attn_mask.py:67-180",
    licence="Apache-2.0",
    published="radial-0.2_block-1-8-16_order-raster",
    takes_order=True,
)
