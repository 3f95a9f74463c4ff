import pytest
import torch
from tests.oracle import masked_attention, random_qkv, token_mask

import nabla_attn as na
from nabla_attn.attention import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout
from nabla_attn.core.quantise import scale_of, to_e4m3
from nabla_attn.methods import Moment

GRIDS = {
    "whole": na.TokenGrid(3, 8, 12, block=na.BlockShape(1, 4, 4)),
    "ragged": na.TokenGrid(5, 7, 9, block=na.BlockShape(2, 4, 4)),
    "one frame": na.TokenGrid(1, 9, 9, block=na.BlockShape(1, 3, 3)),
}


def e4m3_numbers():
    """All numbers of the format from 0 on: 4 bits of exponent, 3 of mantissa."""
    small = [m / 8 * 2**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2 ** (e - 7) for e in range(1, 16) for m in range(8)]
    # The last is not a number.
    return torch.tensor(small + normal[:-1], dtype=torch.float64)


def rounded(x, scale):
    """The nearest number of the format, of two the one with an even mantissa."""
    table = e4m3_numbers()
    size = (x.abs() / scale).clamp(max=448)
    distance = (size[..., None] - table).abs()
    odd = torch.arange(len(table)) % 2
    best = (distance + odd * 1e-12).argmin(dim=-1)
    return table[best] * x.sign() * scale


def attention_at(q, k, v, grid, algorithm, step, num_steps=20, **options):
    def select(*args, **kwargs):
        return select_blocks(*args, **kwargs, moment=Moment(step=step, num_steps=num_steps))

    layout = TokenLayout(grid, 0, options.pop("text_after", 0))
    return attend(q, k, v, layout, na.parse(algorithm), select=select, **options)


def test_numbers_are_those_of_the_format():
    assert e4m3_numbers().max() == 448 and len(e4m3_numbers()) == 127
    x = torch.cat([torch.linspace(-500, 500, 4001), torch.linspace(-0.02, 0.02, 801)]).double()
    ones = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(to_e4m3(x, ones), rounded(x, 1.0), atol=1e-9, rtol=1e-6)


def test_scales_of_nothing_are_finite_and_gradients_pass_straight_through():
    zero = torch.zeros(1, 1, 4, 2)
    out = to_e4m3(zero, scale_of(zero, (2, 3)))
    assert torch.equal(out, zero)
    x = torch.randn(1, 1, 4, 2, requires_grad=True)
    to_e4m3(x, scale_of(x, (2, 3))).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * to_e4m3(x, scale_of(x, (2, 3))).detach())


@pytest.mark.parametrize(
    ("step", "side", "tiles"), [(0, 1, 4), (4, 1, 4), (5, 3, 1), (14, 3, 1), (15, 2, 2)]
)
@pytest.mark.parametrize("name", GRIDS)
def test_windows_and_scales_by_the_step(name, step, side, tiles):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, batch=2, dtype=torch.float64)
    out, found = attention_at(q, k, v, grid, "fps-3-3-3-0.3", step)
    assert torch.equal(found.mask, na.build_block_map(q, k, grid, f"sta-{side}-{side}-{side}").mask)
    block = grid.block.tokens * tiles
    qs, ks = (na.to_blocks(x, grid).split(block, dim=2) for x in (q, k))
    scales = [[x.abs().amax((2, 3), keepdim=True) / 448 for x in parts] for parts in (qs, ks)]
    near = [
        na.to_raster(torch.cat([rounded(x, s) for x, s in zip(*each, strict=True)], dim=2), grid)
        for each in zip((qs, ks), scales, strict=True)
    ]
    values = rounded(v, v.abs().amax(2, keepdim=True) / 448)
    mask = na.build_block_map(q, k, grid, f"sta-{side}-{side}-{side}")
    expected = masked_attention(*near, values, token_mask(mask, grid))
    # Scales are fp32.
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_windows_grow_into_the_second_part_and_shrink_behind_it():
    grid = na.TokenGrid(9, 20, 20, block=na.BlockShape(1, 4, 4))
    q, k, v = random_qkv(grid)
    kept = [attention_at(q, k, v, grid, "fps-9-5-5", step)[1].density for step in (0, 10, 19)]
    assert kept[0] < kept[2] < kept[1]


def test_precision_is_a_word_of_its_own_and_the_step_may_be_unknown():
    grid = GRIDS["whole"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    plain = na.nabla_attention(q, k, v, grid, "fps-3-3-3-0.5-0.25-0.75-full")
    torch.testing.assert_close(plain, na.nabla_attention(q, k, v, grid, "sta-3-3-3"))
    coarse = na.nabla_attention(q, k, v, grid, "fps-3-3-3")
    error = (coarse - plain).abs().max()
    assert 1e-4 < error < 0.5


def test_padded_text_has_no_part_in_scales():
    grid = GRIDS["whole"]
    q, k, v = random_qkv(grid, batch=2, num_text=5, dtype=torch.float64)
    valid = torch.tensor([[True] * 3 + [False] * 2] * 2)
    outs = []
    for size in (1.0, 1e4):
        k[:, :, -2:], v[:, :, -2:] = size, size
        outs.append(na.nabla_attention(q, k, v, grid, "fps-3-3-3", text_after=5, text_valid=valid))
    assert torch.equal(outs[0][:, :, :-5], outs[1][:, :, :-5])


def test_parts_out_of_order_and_packed_clips_are_refused():
    with pytest.raises(ValueError, match=r"first part .* must end before the second: got first"):
        na.parse("fps-3-3-3-0.5-0.8-0.2")
    grid = na.TokenGrid(4, 8, 8, segments=(2, 2))
    with pytest.raises(ValueError, match="takes one clip: got 2"):
        na.nabla_attention(*random_qkv(grid), grid, "fps-3-3-3")
