"""Blocks cut from an order of tokens: `_order-` in algorithm strings."""

from dataclasses import replace

import pytest
import torch
from tests.oracle import masked_attention, random_qkv, token_mask
from tests.tiny_diffusers import tiny_wan_transformer

import nabla_attn as na
from nabla_attn.core.order import TokenLayout, block_order, tokens_in_order
from nabla_attn.core.token_orders import parse_order
from nabla_attn.core.window import build_first_frame_map
from nabla_attn.reference_map import reference_map

ORDERS = ["raster", "hwt", "tiles-2-4-4", "iwin-1-8-8", "morton", "hilbert", "gilbert", "slices-2"]
GRIDS = {
    "whole": na.TokenGrid(4, 8, 8),
    "ragged": na.TokenGrid(3, 11, 13),
    "one frame": na.TokenGrid(1, 11, 13),
    "clips": na.TokenGrid(5, 6, 7, segments=(3, 2)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", GRIDS)
def test_an_ordered_video_is_attended_as_one_row_of_its_tokens(order, name):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    found = na.nabla_attention(q, k, v, grid, f"nabla-0.6_block-1-4-4_order-{order}")
    tokens = tokens_in_order(grid, parse_order(order))
    for frames, clip in _clips(grid):
        mine = tokens[clip] - clip.start
        row = na.TokenGrid(1, 1, frames * grid.height * grid.width, block=na.BlockShape(1, 1, 16))
        ordered = [x[:, :, clip][:, :, mine] for x in (q, k, v)]
        expected = torch.empty_like(ordered[0])
        expected[:, :, mine] = na.nabla_attention(*ordered, row, "nabla-0.6")
        torch.testing.assert_close(found[:, :, clip], expected, atol=1e-9, rtol=0)


def _clips(grid):
    start = 0
    for frames in grid.segment_frames:
        end = start + frames * grid.height * grid.width
        yield frames, slice(start, end)
        start = end


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("rules", ["topk-0.3", "nabla-0.5_pair-union", "topk-0.3_tail-mean"])
def test_ordered_maps_equal_their_definition_and_backends_agree(name, rules):
    grid, config = GRIDS[name], na.parse(f"{rules}_block-1-4-4_order-hilbert")
    q, k, v = random_qkv(grid, num_text=5, dtype=torch.float64)
    layout = TokenLayout(grid.with_block(config.block, config.order), 0, 5)
    block_map = na.build_block_map(q, k, grid, config, text_after=5)
    count = layout.grid.num_blocks
    video = [x[:, :, : grid.num_tokens] for x in (q, k)]
    expected = reference_map(*video, TokenLayout(layout.grid), config)
    assert torch.equal(block_map.mask[:, :, :count, :count], expected)
    outs = [
        na.nabla_attention(q, k, v, grid, config, text_after=5, backend=backend)
        for backend in ("reference", "gather")
    ]
    torch.testing.assert_close(*outs, atol=1e-9, rtol=0)
    if config.tail is None:
        expected = masked_attention(q, k, v, token_mask(block_map, layout))
        torch.testing.assert_close(outs[0], expected, atol=1e-9, rtol=0)


def test_gradients_flow_through_an_order():
    grid, config = GRIDS["ragged"], "nabla-0.6_block-1-4-4_order-gilbert"
    inputs = [x.requires_grad_() for x in random_qkv(grid, dtype=torch.float64)]
    na.nabla_attention(*inputs, grid, config).square().sum().backward()
    layout = TokenLayout(grid.with_block((1, 4, 4), parse_order("gilbert")))
    mask = token_mask(na.build_block_map(*inputs[:2], grid, config), layout)
    exact = [x.detach().requires_grad_() for x in inputs]
    masked_attention(*exact, mask).square().sum().backward()
    for x, y in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-9, rtol=0)


def test_blocks_of_an_order_know_the_first_frame_of_every_clip():
    grid = replace(GRIDS["clips"], block=na.BlockShape(1, 4, 4), order=parse_order("hwt"))
    layout = TokenLayout(grid)
    slots = block_order(layout, torch.device("cpu")).to_raster.view(5, -1)
    expected = {int(slot) // 16 for slot in slots[[0, 3]].flatten()}
    found = build_first_frame_map(grid, torch.device("cpu"))
    assert set(found.nonzero().flatten().tolist()) == expected


def test_a_model_s_layers_may_have_an_order():
    model = tiny_wan_transformer()
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 12, 10),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
    }
    dense = model(**inputs).sample
    with na.apply(model, "nabla-1_block-1-4-4_order-hilbert"), torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, dense, atol=1e-4, rtol=0)
    with na.apply(model, "nabla-0.3_block-1-4-4_order-hilbert") as handle, torch.no_grad():
        assert (model(**inputs).sample - dense).abs().max() > 1e-4
        assert (handle.report().density < 0.9).all()


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_part_of_the_algorithm_s_name(order):
    text = f"nabla-0.7_block-1-4-4_order-{order}"
    config = na.parse(text)
    assert str(config) == text and config.order == parse_order(order)
    assert replace(config, order=order) == config
    assert na.parse("nabla-0.7") != config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nabla-0.7_order-peano", "Expected order-ORDER with one of raster, thw"),
        ("nabla-0.7_order-tiles-4-4", "'tiles-4-4' is not a token order"),
        ("nabla-0.7_order-slices-0", "at least 1"),
        ("order-hilbert", "an order needs a method that chooses blocks"),
        ("nabla-0.7_sta-3-3-3_order-hilbert", "sta-3-3-3 chooses blocks by their place"),
    ],
)
def test_orders_that_do_not_fit_say_why(text, said):
    with pytest.raises(ValueError, match=said):
        na.parse(text)


def test_maps_of_an_order_have_no_place_in_a_recording():
    from nabla_attn.generation.map_recorder import _block_of
    from nabla_attn.generation.request import GenerationRequest

    request = GenerationRequest(prompt="a dot", sparse_algo="nabla-0.7_order-hilbert")
    with pytest.raises(ValueError, match="without an order of tokens"):
        _block_of(request)
