"""The contract of methods: strings, the engine's part, orders, treatments, and a user's own."""

import pytest
import torch
from tests.oracle import ODD_GRIDS, random_qkv

import nabla_attn as na
from nabla_attn import methods
from nabla_attn.core.block_map import HeadOrder
from nabla_attn.methods import contract, parameters


@pytest.fixture
def own(monkeypatch):
    """Registers methods for one test."""
    monkeypatch.setattr(methods, "_OWN", {})
    return na.register_method


def near(q, k, grid, params, state):
    """Blocks at most some places apart."""
    index = torch.arange(grid.num_blocks)
    return ((index[:, None] - index).abs() <= params.reach)[None, None]


@pytest.mark.parametrize("name", methods.NAMES)
def test_every_method_holds_what_all_promise(name):
    method = methods.find(name)
    assert method.name == name and method.title and method.paper
    if "table" in method.needs:
        return
    # As many clusters as published would be more than the tokens here.
    na.testing.check_method(
        {"svg2": "svg2-0.9-5-9", "svoo": "svoo-0.9-5-9"}.get(name, method.example)
    )
    assert str(na.parse(method.published))


@pytest.mark.parametrize("algorithm", ["topk-0.1_nabla-0.2", "nabla-0.3_sta-1-1-3_tail-mean"])
def test_unions_hold_it_too(algorithm):
    na.testing.check_method(algorithm)


def test_a_method_of_ones_own_in_ten_lines(own):
    own("near", near, parameters=[parameters.count("reach", default=2)])
    assert len(na.testing.check_method("near-1")) == 9
    config = na.parse("near-2_sta-1-1-1")
    assert str(config) == "sta-1-1-1_near" and na.parse("near_sta-1-1-1") == config
    grid = na.TokenGrid(2, 16, 24)
    q, k, _ = random_qkv(grid)
    mask = na.build_block_map(q, k, grid, "near-1").mask
    assert torch.equal(mask[0, 0], torch.ones(12, 12).triu(-1).tril(1).bool())


def test_a_whole_row_of_ones_own(own):
    def keep(grid, params, state, device):
        return torch.eye(grid.num_blocks, dtype=torch.bool, device=device)

    own(contract.static(keep, name="own", title="each block itself"))
    na.testing.check_method(na.parse("own"))
    assert na.parse("own").is_adaptive is False and "own" in methods.names()


def test_check_method_finds_what_is_wrong(own):
    @own("leaky")
    def leaky(q, k, grid, params, state):
        # The first sample decides for all.
        scores = q[:1].unflatten(2, (grid.num_blocks, -1)).sum((3, 4))
        return (scores > scores.median())[..., None, :] | torch.eye(grid.num_blocks).bool()

    @own("empty")
    def empty(q, k, grid, params, state):
        return torch.zeros(1, 1, grid.num_blocks, grid.num_blocks, dtype=torch.bool)

    with pytest.raises(AssertionError, match="samples and heads must not depend"):
        na.testing.check_method("leaky")
    with pytest.raises(AssertionError, match="some row keeps nothing"):
        na.testing.check_method("empty")


@pytest.mark.parametrize("name", ["nabla", "tail", "My", "a-b", "2d", ""])
def test_names_that_cannot_be(own, name):
    with pytest.raises(ValueError, match=r"taken|small letters"):
        own(name, near)


def test_unknown_parameters_list_the_known(own):
    own("near", near, parameters=[parameters.count("reach")])
    with pytest.raises(ValueError, match=r"near has the parameters \['reach'\]: got 'far'"):
        na.parse("near-far=3")
    assert na.parse("near-reach=3") == na.parse("near-3")
    with pytest.raises(ValueError, match=r"Expected near-REACH such as near-1"):
        na.parse("near")
    with pytest.raises(ValueError, match="whole number"):
        methods.make_use("near", 2.5)
    with pytest.raises(ValueError, match="no method 'far'"):
        methods.make_use("far")


def test_negative_and_small_numbers_round_trip(own):
    rule = [parameters.number("level"), parameters.word("mode", ("row", "head"), default="row")]
    own("drop", lambda q, k, grid, params, state: near(q, k, grid, params, state), parameters=rule)
    for text in ("drop--10", "drop--0.00001", "drop-0", "drop-1000000", "drop-2.5-head"):
        assert str(na.parse(text)) == text
    assert str(na.parse("drop-3-row")) == "drop-3"


def test_methods_say_what_they_lack(own):
    own("byvalue", near, parameters=[parameters.count("reach", default=1)], needs=("values",))
    own("learnt", near, parameters=[parameters.count("reach", default=1)], needs=("table",))
    own("single", near, parameters=[parameters.count("reach", default=1)], packs=False)
    own("fixed", near, parameters=[parameters.count("reach", default=1)], is_trainable=False)
    grid = ODD_GRIDS["ragged"]
    q, k, v = random_qkv(grid)
    with pytest.raises(ValueError, match="chooses by values too"):
        na.build_block_map(q, k, grid, "byvalue")
    assert na.build_block_map(q, k, grid, "byvalue", v=v).density > 0
    with pytest.raises(ValueError, match="learnt needs a table"):
        na.build_block_map(q, k, grid, "learnt")
    packed = na.TokenGrid(4, grid.height, grid.width, segments=(2, 2))
    q, k, v = random_qkv(packed)
    with pytest.raises(ValueError, match="single takes one clip: got 2"):
        na.nabla_attention(q, k, v, packed, "single")
    own(contract.static(lambda grid, *_: torch.ones(1, 1), name="still", title="x", packs=False))
    with pytest.raises(ValueError, match="still takes one clip: got 2"):
        na.nabla_attention(q, k, v, packed, "still")
    with pytest.raises(ValueError, match="fixed is for inference"):
        na.nabla_attention(q.requires_grad_(), k, v, packed, "fixed")


def column_order(q, k, grid, params, state):
    """Odd heads in column order, where neighbours are those of a column."""
    raster = torch.arange(grid.num_tokens)
    columns = raster.view(grid.frames, grid.height, grid.width).permute(2, 0, 1).flatten()
    pad = grid.num_slots - grid.num_tokens
    orders = [columns if head % 2 else raster for head in range(q.shape[1])]
    tokens = torch.stack([torch.nn.functional.pad(x, (0, pad), value=-1) for x in orders])[None]
    slots = torch.stack([x.argsort() for x in orders])[None]
    order = HeadOrder(tokens, slots)
    return na.Selection(near(q, k, grid, params, state), order, order)


@pytest.mark.parametrize("num_text", [0, 7])
def test_heads_in_orders_of_their_own(own, num_text):
    own("columns", column_order, parameters=[parameters.count("reach", least=0, default=0)])
    grid = na.TokenGrid(2, 6, 10, block=na.BlockShape(1, 3, 5))
    q, k, v = random_qkv(grid, heads=4, num_text=num_text, dtype=torch.float64)
    out = na.nabla_attention(q, k, v, grid, "columns", text_before=num_text)
    block = grid.block.tokens
    place = torch.arange(grid.num_tokens)
    column = place.view(2, 6, 10).permute(2, 0, 1).flatten().argsort()
    for head, at in enumerate([place, column, place, column]):
        same = at[:, None] // block == at // block
        keep = torch.nn.functional.pad(same, (num_text, 0, num_text, 0), value=True)
        scores = q[:, head] @ k[:, head].mT / q.shape[-1] ** 0.5
        expected = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v[:, head]
        torch.testing.assert_close(out[:, head], expected)
    found = na.build_block_map(q, k, grid, "columns", text_before=num_text)
    total = (grid.num_tokens + num_text) ** 2
    kept = grid.num_tokens * block + 2 * num_text * grid.num_tokens + num_text**2
    assert found.density == pytest.approx(kept / total)
    assert found.sample(-1).density == pytest.approx(kept / total)


def test_what_a_method_does_beside_choosing(own):
    def select(q, k, grid, params, state):
        prepare = lambda q, k, v: (q, k, 2 * v)  # noqa: E731
        finish = lambda out, q, k, v: out + 1  # noqa: E731
        return na.Selection(near(q, k, grid, params, state), prepare=prepare, finish=finish)

    own("doubled", select, parameters=[parameters.count("reach", default=1)])
    own("near", near, parameters=[parameters.count("reach", default=1)])
    grid = ODD_GRIDS["ragged"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    plain = na.nabla_attention(q, k, v, grid, "near")
    torch.testing.assert_close(na.nabla_attention(q, k, v, grid, "doubled"), 2 * plain + 1)
    with pytest.raises(ValueError, match="cannot be joined"):
        na.nabla_attention(q, k, v, grid, "near_doubled")


def test_rows_say_known_words_only():
    with pytest.raises(ValueError, match="kind must be of"):
        contract.Method(name="x", title="x", select=near, kind="magic")
