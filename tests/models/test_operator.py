"""The attention call itself: grouped queries, masks, and models inside wrappers."""

from weakref import ref

import pytest
import torch
from tests.models.tiny_models import TINY, randn, relative_error, run
from torch.utils._python_dispatch import TorchDispatchMode

import nabla_attn as na
from nabla_attn.core.order import TokenLayout
from nabla_attn.models.modules import num_heads, unwrap
from nabla_attn.models.operator import attend_layer
from nabla_attn.models.plan import Layer, Plan, plan_key
from nabla_attn.models.ports import AllegroPort, CogVideoXPort, CosmosPort, EasyAnimatePort
from nabla_attn.models.processor import _nabla, make_processor, text_valid_of

GRID = na.TokenGrid(2, 11, 9)


def layer_with(text=None, **changes):
    layer = Layer("blocks.0.attn1")
    plan = Plan(grid=GRID, config=na.parse("nabla-0.5"), text=text, **changes)
    layer.current.key = plan_key(plan)
    return layer


def test_grouped_queries_repeat_keys():
    q, k, v = (randn(2, GRID.num_tokens, heads, 16) for heads in (4, 2, 2))
    repeated = (x.repeat_interleave(2, dim=2) for x in (k, v))
    assert torch.equal(
        attend_layer(layer_with(), q, k, v), attend_layer(layer_with(), q, *repeated)
    )


def test_observers_see_the_call():
    layer, seen = Layer("blocks.3.attn1", model="transformer", index=3), []
    layer.observers.append(seen.append)
    plan = Plan(grid=GRID, config=na.parse("nabla-0.4"), layer=ref(layer))
    layer.current.key, layer.current.step = plan_key(plan), 7
    q, k, v = (randn(2, GRID.num_tokens, 3, 8) for _ in range(3))
    attend_layer(layer, q, k, v)
    (call,) = seen
    assert (call.model, call.layer, call.step) == ("transformer", 3, 7)
    raster = [x.transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(call.k, raster[1]) and str(call.config) == "nabla-0.4"
    used = na.build_block_map(*raster[:2], GRID, "nabla-0.4")
    assert torch.equal(call.block_map.mask, used.mask)
    # Under guidance in one batch, the last sample is the one with the prompt.
    last = call.last_sample()
    assert torch.equal(last.block_map.mask, used.mask[1:]) and last.scale == 8**-0.5
    assert torch.equal(last.v, na.to_blocks(raster[2][1:], GRID))
    # Another algorithm is seen in its own blocks.
    other = na.parse("nabla-0.4_block-2-2-3")
    wanted = na.build_block_map(*(x[1:] for x in raster[:2]), GRID, other)
    assert torch.equal(call.last_sample(other).block_map.mask, wanted.mask)


def test_masks_are_read_as_padded_keys():
    query = randn(2, 5, 1, 4)
    keep = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    assert text_valid_of(None, query) is None
    for mask in (keep, keep[:, None, None], (~keep)[:, None, None] * -10000.0):
        assert torch.equal(text_valid_of(mask, query), keep)
    assert text_valid_of(keep[:1], query).shape == (2, 5)
    with pytest.raises(ValueError, match=r"got \(2, 3, 5, 5\)"):
        text_valid_of(keep.new_ones(2, 3, 5, 5), query)


def test_text_may_be_given_alone_or_with_the_video():
    q = randn(2, GRID.num_tokens + 4, 2, 16)
    text = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    video = text.new_ones(2, GRID.num_tokens)
    for side, valid in (("after", [video, text]), ("before", [text, video])):
        alone = attend_layer(layer_with(side), q, q, q, text_valid=text)
        assert torch.equal(
            alone, attend_layer(layer_with(side), q, q, q, text_valid=torch.cat(valid, 1))
        )
        assert not torch.equal(alone, attend_layer(layer_with(side), q, q, q))


def test_history_counts_as_kept_text_in_front():
    plan = Plan(grid=GRID, config=na.parse("nabla-0.1"), text="after", prefix=5)
    assert plan.layout(GRID.num_tokens + 12) == TokenLayout(GRID, 5, 7)


class LargeMasks(TorchDispatchMode):
    """Records bool tensors of tokens x tokens or more."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.found = tokens, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for value in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(value) and value.dtype == torch.bool and value.ndim >= 2:
                rows, columns = value.shape[-2:]
                if rows >= self.tokens and columns >= self.tokens:
                    self.found.append((func, value.shape))
        return out


@torch.no_grad()
def test_hunyuan15_builds_no_mask_of_tokens_by_tokens():
    model, inputs = TINY["hunyuan15"].build(), TINY["hunyuan15"].inputs(3, 16, 16)
    with LargeMasks(3 * 16 * 16) as its_own:
        run(model, inputs)
    assert its_own.found
    for algorithm in ("dense", "nabla-0.5"):
        with na.apply(model, algorithm), LargeMasks(3 * 16 * 16) as ours:
            run(model, inputs)
        assert ours.found == []


def test_allegro_adds_the_residual_where_the_module_asks_for_it():
    model, inputs = TINY["allegro"].build(num_layers=1), TINY["allegro"].inputs(2, 8, 9)
    model.transformer_blocks[0].attn1.residual_connection = True
    with torch.no_grad():
        dense = run(model, inputs)
        with na.apply(model, "nabla-1"):
            assert relative_error(run(model, inputs), dense) < 3e-6


def test_what_cannot_be_attended_is_refused():
    q = randn(1, GRID.num_tokens, 2, 16)
    with pytest.raises(ValueError, match="a mask over video tokens"):
        attend_layer(layer_with(), q, q, q, text_valid=torch.ones(1, GRID.num_tokens).bool())
    with pytest.raises(ValueError, match="got 190 tokens for 2x11x9 = 198"):
        attend_layer(layer_with("after"), q[:, :190], q[:, :190], q[:, :190])
    with pytest.raises(ValueError, match="no causal order and no dropout"):
        _nabla(q, q, q, is_causal=True, _parallel_config=layer_with())
    for port in (AllegroPort, CogVideoXPort, CosmosPort, EasyAnimatePort):
        with pytest.raises(ValueError, match="mask"):
            port(None, layer_with())(None, q, q, attention_mask=q)


def test_modules_that_do_not_say_their_heads_are_named():
    with pytest.raises(ValueError, match="Linear does not say its number of heads"):
        num_heads(torch.nn.Linear(1, 1))


def test_processors_without_a_door_are_refused():
    with pytest.raises(ValueError, match="object does not go through diffusers' attention"):
        make_processor(object(), Layer("attn"))


@torch.no_grad()
def test_models_inside_wrappers():
    model, inputs = TINY["wan"].build(), TINY["wan"].inputs(2, 8, 9)
    expected = run(model, inputs)
    parallel = torch.nn.DataParallel(model)
    assert unwrap(parallel) is model
    na.apply(parallel, "nabla-0.3")
    assert relative_error(run(model, inputs), expected) > 1e-3
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))
    assert unwrap(adapted) is model
    with na.apply(adapted, "nabla-1"):
        assert relative_error(run(adapted, inputs), expected) < 3e-6
    compiled = torch.compile(adapted, backend="eager")
    with na.apply(compiled, "nabla-0.3"):
        assert relative_error(run(compiled, inputs), expected) > 1e-3


@pytest.mark.parametrize("backend", ["auto", "gather", "reference"])
@pytest.mark.parametrize("algorithm", ["dense", "nabla-0.5"])
def test_models_and_the_function_attend_alike(algorithm, backend):
    q, k, v = (randn(2, GRID.num_tokens + 4, 3, 16) for _ in range(3))
    text = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    layer = Layer("blocks.0.attn1")
    plan = Plan(grid=GRID, config=na.parse(algorithm), text="after", backend=backend)
    layer.current.key = plan_key(plan)
    out = attend_layer(layer, q, k, v, text_valid=text)
    options = {"text_after": 4, "text_valid": text, "backend": backend}
    raster = (x.transpose(1, 2) for x in (q, k, v))
    expected = na.nabla_attention(*raster, GRID, algorithm, **options).transpose(1, 2)
    assert torch.equal(out, expected)
