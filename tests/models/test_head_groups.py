"""Heads of one layer with algorithms of their own: each as if it ran alone, in its place."""

from dataclasses import replace
from weakref import ref

import pytest
import torch
from tests.models.tiny_models import TINY, randn, relative_error, run

import nabla_attn as na
from nabla_attn.head_rules import Rule
from nabla_attn.models import map_cache
from nabla_attn.models.operator import _attend_op, attend_layer
from nabla_attn.models.plan import Layer, Plan, plan_key

GRID = na.TokenGrid(2, 11, 9)
# Neighbours and heads far apart; other blocks, a tail, a window, and dense.
ALGORITHMS = {
    (0, 3): "topk-0.2_tail-first",
    (1, 2): "nabla-0.4_block-2-4-4",
    (4,): "dense",
    (5,): "sta-1-1-1",
}
NUM_HEADS = 6


def mixed_plan(**changes):
    plan = Plan(grid=GRID, config=na.parse("dense"), text="after", telemetry=True, **changes)
    parts = (
        replace(plan.with_config(na.parse(text)), heads=heads) for heads, text in ALGORITHMS.items()
    )
    return replace(plan, groups=tuple(parts))


def layer_with(plan):
    layer = Layer("blocks.0.attn1", num_heads=NUM_HEADS)
    layer.current.key = plan_key(plan)
    layer.current.stats = torch.zeros(3, NUM_HEADS)
    return layer


def inputs():
    tensors = [randn(2, GRID.num_tokens + 4, NUM_HEADS, 16).roll(i, 1) for i in range(3)]
    text = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    return [x.clone().requires_grad_() for x in tensors], text


def test_heads_with_algorithms_of_their_own_run_as_if_alone():
    (q, k, v), text = inputs()
    layer = layer_with(mixed_plan())
    out = attend_layer(layer, q, k, v, text_valid=text)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    algorithms = {head: text for heads, text in ALGORITHMS.items() for head in heads}
    for head in range(NUM_HEADS):
        alone = [x[:, :, head : head + 1].detach().requires_grad_() for x in (q, k, v)]
        raster = (x.transpose(1, 2) for x in alone)
        options = {"text_after": 4, "text_valid": text}
        expected = na.nabla_attention(*raster, GRID, algorithms[head], **options).transpose(1, 2)
        mine = slice(head, head + 1)
        assert relative_error(out[:, :, mine], expected) < 1e-6
        wanted = torch.autograd.grad(expected.square().sum(), alone)
        for grad, whole in zip(wanted, grads, strict=True):
            assert relative_error(whole[:, :, mine], grad) < 3e-6
    density = layer.current.stats[0]
    assert density[4] == 1 and max(density[0], density[3]) < 0.3 < density[1] != density[2]
    assert (layer.current.stats[2] > 0).tolist() == [True, False, False, True, False, False]


def test_the_operator_keeps_its_contract_and_compiles():
    (q, k, v), text = inputs()
    key = plan_key(mixed_plan())
    torch.library.opcheck(_attend_op, (q, k, v, text, key, None, None, [], None, None))
    layer = layer_with(mixed_plan())
    expected = attend_layer(layer, q, k, v, text_valid=text)
    compiled = torch.compile(attend_layer, backend="aot_eager", fullgraph=True)
    out = compiled(layer, q, k, v, text_valid=text)
    assert torch.equal(out, expected)
    for mine, wanted in zip(
        torch.autograd.grad(out.sum(), (q, k, v)),
        torch.autograd.grad(expected.sum(), (q, k, v)),
        strict=True,
    ):
        assert relative_error(mine, wanted) < 3e-6


def test_observers_see_a_call_for_each_group_with_its_heads():
    (q, k, v), text = inputs()
    layer, seen = Layer("blocks.0.attn1", num_heads=NUM_HEADS), []
    layer.observers.append(seen.append)
    plan = mixed_plan()
    groups = tuple(replace(group, layer=ref(layer)) for group in plan.groups)
    layer.current.key = plan_key(replace(plan, groups=groups))
    attend_layer(layer, q, k, v, text_valid=text)
    found = {call.heads: str(call.config) for call in seen}
    assert found == {heads: text for heads, text in ALGORITHMS.items() if text != "dense"}
    for call in seen:
        assert torch.equal(call.q, q[:, :, list(call.heads)].transpose(1, 2))
        assert call.block_map.mask.shape[1] == len(call.heads)
        assert torch.equal(torch.arange(NUM_HEADS)[call.head_index], torch.tensor(call.heads))
        assert call.last_sample().block_map.mask.shape[-1] == call.block_map.mask.shape[-1]


def rules(**extra):
    return na.Schedule(
        algorithm=na.parse("nabla-0.5"),
        rules=(
            Rule(algorithm=na.parse("topk-0.1"), layers=(0,), heads=(1,), **extra),
            Rule(algorithm=na.parse("dense"), layers=(1,), heads=(0,)),
        ),
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox", "ltx"])
def test_models_follow_rules_for_heads_and_are_restored(name):
    model, given = TINY[name].build(), TINY[name].inputs(2, 11, 9)
    before = run(model, given)
    with na.apply(model, schedule=rules()) as handle:
        mixed = run(model, given)
        density = handle.report().density[0]
        handle.set_schedule("nabla-0.5")
        plain = run(model, given)
        assert relative_error(mixed, plain) > 1e-4
        with pytest.raises(ValueError, match="names head 7"):
            handle.set_schedule(
                replace(rules(), rules=(Rule(algorithm=na.parse("dense"), heads=(7,)),))
            )
    assert density[0, 1] < density[0, 0] < 1 and density[1, 0] == 1 > density[1, 1]
    assert torch.equal(run(model, given), before)


@torch.no_grad()
def test_all_heads_dense_is_the_models_own_attention():
    model, given = TINY["wan"].build(), TINY["wan"].inputs(2, 11, 9)
    before = run(model, given)
    every = (Rule(algorithm=na.parse("dense"), heads=(0,)), Rule(algorithm=na.parse("dense")))
    with na.apply(model, schedule=na.Schedule(algorithm=na.parse("nabla-0.3"), rules=every)):
        assert torch.equal(run(model, given), before)


def at(time, seed=0):
    given = TINY["wan"].inputs(2, 11, 13) | {"timestep": torch.full((2,), float(time))}
    noise = torch.Generator().manual_seed(seed)
    return given | {"hidden_states": torch.randn(given["hidden_states"].shape, generator=noise)}


@torch.no_grad()
def test_heads_of_a_rule_keep_their_maps_for_as_many_steps_as_it_says(monkeypatch):
    model, built = TINY["wan"].build(), []
    original = map_cache.select_blocks

    def count(q, *args, **options):
        built.append(q.shape[1])
        return original(q, *args, **options)

    monkeypatch.setattr(map_cache, "select_blocks", count)
    with na.apply(model, schedule=rules(reuse_steps=2)) as handle:
        maps = []
        handle.observe(
            lambda call: maps.append(call.block_map.mask) if call.heads == (1,) else None
        )
        counts = []
        for time in (900, 800, 700, 600):
            for branch in range(2):
                before = len(built)
                run(model, at(time, seed=branch))
                counts.append(len(built) - before)
        # Only the head with a rule keeps maps: of both branches, for two steps.
        assert counts == [1, 1, 0, 0, 1, 1, 0, 0] and set(built) == {1}
        first, other, again = maps[0], maps[2], maps[4]
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_rules_about_steps_do_not_apply_with_gradients():
    model, given = TINY["wan"].build().train(), TINY["wan"].inputs(2, 11, 9)
    by_step = Rule(algorithm=na.parse("topk-0.1"), heads=(1,), steps=(0,))
    schedule = na.Schedule(algorithm=na.parse("nabla-0.5"), rules=(by_step,))
    with na.apply(model, schedule=schedule):
        out = run(model, given)
    with na.apply(model, "nabla-0.5"):
        assert torch.equal(run(model, given), out)
    kept = na.Schedule(algorithm=na.parse("nabla-0.5"), rules=(replace(by_step, steps=None),))
    with na.apply(model, schedule=kept):
        assert not torch.equal(run(model, given), out)


@torch.no_grad()
def test_a_schedule_calibrated_for_another_model_or_size_is_refused():
    from nabla_attn.calibrated_for import CalibratedFor

    model, given = TINY["wan"].build(), TINY["wan"].inputs(2, 11, 9)
    made_for = CalibratedFor(
        model="WanTransformer3DModel", layers=2, heads=2, tokens=(2, 11, 9), steps=6
    )
    schedule = replace(rules(), calibrated_for=made_for)
    with na.apply(model, schedule=schedule):
        run(model, given)
        with pytest.raises(ValueError, match="tokens 2x11x9, here 2x8x9"):
            run(model, TINY["wan"].inputs(2, 8, 9))
    with pytest.raises(ValueError, match="heads 4, here 2"):
        na.apply(model, schedule=replace(rules(), calibrated_for=replace(made_for, heads=4)))
    warned = pytest.warns(UserWarning, match="tokens 2x11x9, here 2x8x9")
    with warned, na.apply(model, schedule=schedule, allow_mismatch=True):
        run(model, TINY["wan"].inputs(2, 8, 9))


@torch.no_grad()
def test_groups_that_keep_maps_for_different_steps_forget_their_own_only():
    model, seen = TINY["wan"].build(), {0: [], 1: []}
    two, three = (
        Rule(algorithm=na.parse("topk-0.1"), layers=(layer,), heads=(1,), reuse_steps=count)
        for layer, count in ((0, 2), (1, 3))
    )
    schedule = na.Schedule(algorithm=na.parse("nabla-0.5"), rules=(two, three))
    with na.apply(model, schedule=schedule) as handle:
        handle.observe(
            lambda call: (
                seen[call.layer].append(call.block_map.mask) if call.heads == (1,) else None
            )
        )
        for step, time in enumerate((900, 800, 700, 600, 500, 400)):
            run(model, at(time, seed=step))
    for layer, count in ((0, 2), (1, 3)):
        for step in range(1, 6):
            is_same = torch.equal(seen[layer][step], seen[layer][step - 1])
            assert is_same == (step % count > 0), (layer, step)
