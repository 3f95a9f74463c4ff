import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nabla_attn as na
from nabla_attn.core.order import tokens_in_order
from nabla_attn.core.token_orders import NAMES, TokenOrder, invert_order, parse_order

AXES = ["thw", "twh", "htw", "hwt", "wth", "wht"]
side = st.integers(1, 9)


@st.composite
def order_names(draw):
    name = draw(st.sampled_from(NAMES))
    num_sides = {"tiles": 3, "iwin": 3, "tubes": 2, "slices": 1}.get(name, 0)
    return "-".join([name, *(str(draw(side)) for _ in range(num_sides))])


def coordinates(tokens, sizes):
    _, height, width = sizes
    rows, columns = tokens // width % height, tokens % width
    return torch.stack([tokens // (height * width), rows, columns], dim=-1)


def steps(name, sizes):
    """How far the token at each position lies from the one before, along rows and columns."""
    at = coordinates(parse_order(name).permutation(*sizes), sizes)
    return (at[1:] - at[:-1]).abs().sum(dim=1)


@given(
    name=order_names(), sizes=st.tuples(st.integers(1, 7), st.integers(1, 19), st.integers(1, 19))
)
@example(name="hilbert", sizes=(1, 1, 1))
@example(name="gilbert", sizes=(1, 1, 1))
@example(name="iwin-1-8-8", sizes=(1, 11, 13))
def test_every_order_is_a_permutation_with_an_inverse_and_a_name(name, sizes):
    tokens = parse_order(name).permutation(*sizes)
    everything = torch.arange(sizes[0] * sizes[1] * sizes[2])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.sort().values, everything)
    assert torch.equal(invert_order(tokens)[tokens], everything)
    assert str(parse_order(name)) == name


@pytest.mark.parametrize("name", AXES)
def test_axis_orders_run_from_the_slowest_axis_to_the_fastest(name):
    sizes = {"t": 3, "h": 4, "w": 5}
    expected = []
    for at in itertools.product(*(range(sizes[axis]) for axis in name)):
        t, h, w = (at[name.index(axis)] for axis in "thw")
        expected.append((t * 4 + h) * 5 + w)
    assert parse_order(name).permutation(3, 4, 5).tolist() == expected


def test_token_major_puts_the_frames_of_a_patch_side_by_side():
    tokens = parse_order("hwt").permutation(3, 2, 2)
    assert tokens.tolist() == [patch + frame * 4 for patch in range(4) for frame in range(3)]
    raster = torch.arange(12)
    assert torch.equal(parse_order("raster").permutation(3, 2, 2), raster)


@given(sizes=st.tuples(side, side, side), sides=st.tuples(side, side, side))
def test_tiles_and_interleaved_windows_group_tokens_as_defined(sizes, sides):
    def group(kind, token):
        at = coordinates(torch.tensor(token), sizes).tolist()
        if kind == "tiles":
            return [x // s for x, s in zip(at, sides, strict=True)]
        return [x % -(-n // s) for x, n, s in zip(at, sizes, sides, strict=True)]

    for kind in ("tiles", "iwin"):
        expected = sorted(range(sizes[0] * sizes[1] * sizes[2]), key=lambda x: (group(kind, x), x))
        assert TokenOrder(kind, sides).permutation(*sizes).tolist() == expected


def test_interleaved_windows_permute_an_axis_as_published():
    # h -> (h mod Hg) * M + h // Hg, with Hg = H / M (arXiv:2507.18405).
    tokens = parse_order("iwin-1-4-1").permutation(1, 12, 1)
    assert torch.equal(invert_order(tokens), torch.tensor([h % 3 * 4 + h // 3 for h in range(12)]))
    # 11 rows in windows of 4: three windows, of 4, 4 and 3 rows.
    assert parse_order("iwin-1-4-1").permutation(1, 11, 1).tolist() == [
        *(0, 3, 6, 9),
        *(1, 4, 7, 10),
        *(2, 5, 8),
    ]


def test_tubes_are_tiles_through_all_frames():
    tubes = parse_order("tubes-3-4").permutation(5, 11, 13)
    assert torch.equal(tubes, parse_order("tiles-5-3-4").permutation(5, 11, 13))


def test_morton_sorts_by_interleaved_bits():
    def code(token):
        bits = [f"{x:04b}" for x in coordinates(torch.tensor(token), (5, 11, 13)).tolist()]
        return "".join(itertools.chain.from_iterable(zip(*bits, strict=True)))

    expected = sorted(range(5 * 11 * 13), key=code)
    assert parse_order("morton").permutation(5, 11, 13).tolist() == expected


def test_curves_equal_those_of_published_code(golden):
    recorded = golden("token_orders.npz")
    assert len(recorded.files) == 10
    for key in recorded.files:
        name, sizes = key.split("_")
        tokens = parse_order(name).permutation(*map(int, sizes.split("x")))
        assert tokens.tolist() == recorded[key].tolist(), key


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_steps_of_hilbert_s_curve_lead_to_neighbours_in_cubes_and_squares(size):
    assert (steps("hilbert", (size, size, size)) == 1).all()
    assert (steps("hilbert", (1, size, size)) == 1).all()


even = st.integers(1, 12).map(lambda half: 2 * half)


@given(sizes=st.tuples(even, even, even))
def test_steps_of_the_gilbert_curve_lead_to_neighbours_at_even_sizes(sizes):
    assert (steps("gilbert", sizes) == 1).all()


@given(height=st.integers(1, 40), width=st.integers(2, 40))
def test_a_gilbert_curve_of_one_frame_has_at_most_one_diagonal_step(height, width):
    found = steps("gilbert", (1, height, width))
    has_diagonal = max(height, width) % 2 == 1 and min(height, width) % 2 == 0
    assert (found > 1).sum() == has_diagonal
    assert (found <= 2).all()


@given(sizes=st.tuples(*[st.integers(2, 16)] * 3))
def test_a_gilbert_curve_of_odd_sizes_has_few_and_short_diagonal_steps(sizes):
    found = steps("gilbert", sizes)
    assert (found <= 4).all()
    assert (found > 1).float().mean() <= 0.25


@pytest.mark.parametrize("name", ["tiles-4-4-4", "morton", "hilbert", "gilbert", "slices-4"])
@pytest.mark.parametrize("sizes", [(8, 16, 24), (5, 22, 26)])
def test_tokens_of_a_block_lie_closer_than_in_raster_order(name, sizes):
    def spread(name):
        at = coordinates(parse_order(name).permutation(*sizes), sizes).double()
        blocks = at[: len(at) // 64 * 64].unflatten(0, (-1, 64))
        return blocks.var(dim=1, correction=0).sum(dim=-1).mean()

    assert spread(name) < 0.5 * spread("raster")
    # Interleaved windows are the opposite on purpose.
    assert spread("iwin-4-4-4") > spread("raster")


def test_slices_begin_near_the_end_of_the_slice_before():
    sizes = (6, 8, 10)
    at = coordinates(parse_order("slices-2").permutation(*sizes), sizes)
    assert at[:, 0].unflatten(0, (3, 160)).amax(dim=1).tolist() == [1, 3, 5]
    ends, begins = at[159:-1:160], at[160::160]
    assert torch.equal(ends[:, 1:], begins[:, 1:])


def test_packed_clips_are_ordered_apart():
    grid = na.TokenGrid(5, 4, 6, segments=(3, 2))
    tokens = tokens_in_order(grid, parse_order("gilbert"))
    first = parse_order("gilbert").permutation(3, 4, 6)
    second = parse_order("gilbert").permutation(2, 4, 6)
    assert torch.equal(tokens, torch.cat([first, second + 3 * 24]))


@pytest.mark.parametrize(
    "bad",
    ["", "peano", "tiles-4-4", "hilbert-2", "slices", "tiles-4-4-x", "tiles--4-4-4", "slices-²"],
)
def test_unknown_orders_list_the_known(bad):
    with pytest.raises(ValueError, match=f"'{bad}' is not a token order. Expected raster, thw"):
        parse_order(bad)


def test_sides_of_an_order_are_positive():
    with pytest.raises(ValueError, match="at least 1: got 'slices-0'"):
        parse_order("slices-0")
