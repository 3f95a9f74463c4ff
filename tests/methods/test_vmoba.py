import itertools

import pytest
import torch
from tests.oracle import masked_attention, random_qkv

import nabla_attn as na
from nabla_attn.attention import attend
from nabla_attn.block_selection import select_blocks
from nabla_attn.core.order import TokenLayout
from nabla_attn.methods import Moment, find, make_use
from nabla_attn.methods.vmoba import chunk_of_tokens, keep_chunks

GRIDS = {
    "whole": na.TokenGrid(4, 6, 8, block=na.BlockShape(1, 3, 2)),
    "ragged": na.TokenGrid(3, 5, 7, block=na.BlockShape(1, 2, 3)),
    "one frame": na.TokenGrid(1, 9, 6, block=na.BlockShape(1, 3, 3)),
}
SHAPES = "3-1-2-2-2-2-2"


def run(q, k, v, grid, algorithm, layer):
    def select(*args, **kwargs):
        return select_blocks(*args, **kwargs, moment=Moment(layer=layer, num_layers=6))

    return attend(q, k, v, TokenLayout(grid), na.parse(algorithm), select=select)


def chunks_by_definition(grid, layer):
    """The chunk of every token for the numbers of SHAPES."""
    places = itertools.product(range(grid.frames), range(grid.height), range(grid.width))
    length = -(-grid.num_tokens // 3)
    half = [-(-size // 2) for size in (grid.frames, grid.height, grid.width)]
    found = []
    for index, (t, h, w) in enumerate(places):
        kind = layer % 3
        cell = (h // half[1], w // half[2])
        found.append(
            (index // length,) if kind == 0 else cell if kind == 1 else (t // half[0], *cell)
        )
    return torch.tensor([sorted(set(found)).index(each) for each in found])


def kept_by_definition(q, k, chunks, *, threshold=None, top=0, scope="row"):
    """Chunks that each token attends, [heads, tokens, chunks], pair by pair."""
    heads, tokens, _ = q.shape
    means = torch.stack([k[:, chunks == c].mean(dim=1) for c in chunks.unique()], dim=1)
    gate = torch.einsum("hsd,hcd->hsc", q, means)
    count = gate.shape[-1]
    groups = {}
    for h, s, c in itertools.product(range(heads), range(tokens), range(count)):
        key = {"row": (h, s), "column": c, "head": h, "all": 0}[scope]
        groups.setdefault(key, []).append((h, s, c))
    kept = torch.zeros_like(gate, dtype=torch.bool)
    for pairs in groups.values():
        values = {pair: gate[pair].item() for pair in pairs}
        own = {pair for pair in pairs if chunks[pair[1]] == pair[2]}
        if top:
            order = sorted(pairs, key=lambda p: (p not in own, -values[p]))
            chosen = order[: top * len(pairs) // count]
        else:
            low, high = min(values.values()), max(values.values())
            span = high - low if high - low > 1e-6 else 1.0
            shares = {pair: (value - low) / span for pair, value in values.items()}
            total = sum(shares.values())
            missing = max(0, threshold - sum(shares[p] for p in own) / total)
            chosen, sum_ = [], 0.0
            for pair in sorted((p for p in pairs if p not in own), key=lambda p: -shares[p]):
                chosen.append(pair)
                sum_ += shares[pair] / total
                if sum_ >= missing:
                    break
        for pair in {*chosen, *own}:
            kept[pair] = True
    return kept


def token_pairs(found, grid):
    """Who attends whom under a map in head orders, [batch, heads, tokens, tokens]."""
    block = found.block_tokens
    pairs = torch.zeros(*found.mask.shape[:2], grid.num_tokens + 1, grid.num_tokens + 1).bool()
    for sample, head in itertools.product(*map(range, found.mask.shape[:2])):
        q, k = (order.tokens[sample, head] for order in (found.q_order, found.kv_order))
        full = found.mask[sample, head].repeat_interleave(block, 0).repeat_interleave(block, 1)
        pairs[sample, head][q[:, None], k] = full
    return pairs[..., :-1, :-1]


RULES = [
    {"threshold": 0.3, "scope": "row"},
    {"threshold": 0.5, "scope": "column"},
    {"threshold": 0.25, "scope": "head"},
    {"threshold": 0.4, "scope": "all"},
    {"top": 2, "scope": "row"},
    {"top": 1, "scope": "head"},
    {"top": 2, "scope": "all"},
]


def written(rule, gate="tokens"):
    return f"vmoba-{rule.get('threshold', 1)}-{rule['scope']}-{rule.get('top', 0)}-{gate}-{SHAPES}"


@pytest.mark.parametrize("layer", [0, 1, 5])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_every_token_attends_its_chunks(name, rule, layer):
    grid = GRIDS[name]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    chunks = chunks_by_definition(grid, layer)
    wanted = kept_by_definition(q[0], k[0], chunks, **rule)[..., chunks]
    # Blocks of one token are the published form.
    out, found = run(q, k, v, grid, f"{written(rule)}_block-1-1-1", layer)
    assert torch.equal(token_pairs(found, grid)[0], wanted)
    torch.testing.assert_close(out[0], masked_attention(q[0], k[0], v[0], wanted))
    # Larger ones attend what any of their tokens does, and no more.
    out, found = run(q, k, v, grid, written(rule), layer)
    pairs = token_pairs(found, grid)[0]
    assert not (wanted & ~pairs).any()
    blocks = found.q_order.tokens[0, 0].view(-1, grid.block.tokens)
    for block in blocks:
        tokens = block[block >= 0]
        assert len(chunks[tokens].unique()) == 1
        assert torch.equal(pairs[:, tokens[0]], wanted[:, tokens].any(dim=1))
    torch.testing.assert_close(out[0], masked_attention(q[0], k[0], v[0], pairs))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_pooled_gates_ask_for_the_mean_query(layer):
    grid = GRIDS["ragged"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    rule = {"threshold": 0.4, "scope": "row"}
    found = run(q, k, v, grid, written(rule, "pooled"), layer)[1]
    blocks = found.q_order.tokens[0, 0].view(-1, grid.block.tokens)
    chunks = chunks_by_definition(grid, layer)
    for row, block in enumerate(blocks):
        tokens = block[block >= 0]
        mean = q[0, :, tokens].mean(dim=1, keepdim=True).expand(-1, grid.num_tokens, -1)
        wanted = kept_by_definition(mean, k[0], chunks, **rule)[:, tokens[0]][:, chunks]
        pairs = token_pairs(found, grid)[0][:, tokens[0]]
        assert torch.equal(pairs, wanted), row


def test_ties_and_the_borders_of_the_share():
    grid = GRIDS["whole"]
    q, k, v = random_qkv(grid, dtype=torch.float64)
    dense = na.nabla_attention(q, k, v, grid, "dense")
    one = na.nabla_attention(q, k, v, grid, "vmoba-0.1-row-0-tokens-1")
    torch.testing.assert_close(one, dense)
    # Equal likes: nothing tells chunks apart, so all are kept.
    flat = run(q, torch.zeros_like(k), v, grid, written(RULES[0]), 1)[1]
    assert flat.density == 1
    # All but the scope's lowest, whose normalised like is nothing.
    whole = run(q, k, v, grid, f"{written({'threshold': 1, 'scope': 'row'})}_block-1-1-1", 2)[1]
    chunks = chunks_by_definition(grid, 2)
    lost = (~token_pairs(whole, grid)[0]).long()
    per_row = torch.stack([lost[..., chunks == c].amax(-1) for c in chunks.unique()]).sum(0)
    assert per_row.max() == 1


@pytest.mark.parametrize(
    ("threshold", "published"), [(0.15, 0.13), (0.25, 0.19), (0.35, 0.27), (0.5, 0.39)]
)
def test_densities_of_random_tokens_lie_near_the_published(threshold, published):
    # 93 frames of 576 x 1024 pixels. What the authors measured on is not stated.
    params = find("vmoba").params(make_use("vmoba", threshold).values)
    chunks = chunk_of_tokens((24, 36, 64), (params.runs, params.tubes, params.tiles), 1)
    own = torch.nn.functional.one_hot(chunks)
    q, k = torch.randn(2, 1, 1, len(chunks), 128)
    means = (own.float() / own.sum(0)).T @ k
    kept = keep_chunks(q @ means.mT, own.bool(), params)
    density = (kept.float() @ own.sum(0).float()).mean().item() / len(chunks)
    assert density == pytest.approx(published, abs=0.04)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="scopes row, head and all: got top 2 and scope column"):
        na.parse("vmoba-0.25-column-2")
    with pytest.raises(ValueError, match=r"along frames must be 1: got \(2, 3, 3\)"):
        na.parse("vmoba-0.25-tubes=2-3-3")
    grid = na.TokenGrid(4, 8, 8, segments=(2, 2))
    with pytest.raises(ValueError, match="takes one clip: got 2"):
        na.nabla_attention(*random_qkv(grid), grid, "vmoba-0.25")
    whole = GRIDS["whole"]
    with pytest.raises(ValueError, match="order of its own, with which no window"):
        na.nabla_attention(*random_qkv(whole), whole, "vmoba-0.25_sta-1-1-1")
