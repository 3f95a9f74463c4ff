"""One map for several steps or both guidance branches: which calls build, and what must fit."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from tests.models.tiny_models import TINY, relative_error, run

import nabla_attn as na
from nabla_attn.models import map_cache, operator, remove
from nabla_attn.models.applied import applied_to
from nabla_attn.models.map_cache import pack_bits, unpack_bits

WAN = TINY["wan"]
GRID = (3, 11, 13)


def schedule(**rules):
    return na.Schedule(algorithm=na.parse("nabla-0.5"), **rules)


@pytest.fixture
def model():
    return WAN.build()


@pytest.fixture
def built(monkeypatch):
    """Batch of every map that is built."""
    batches, original = [], map_cache.select_blocks

    def count(q, *args, **options):
        batches.append(q.shape[0])
        return original(q, *args, **options)

    for module in (map_cache, operator):
        monkeypatch.setattr(module, "select_blocks", count)
    return batches


def at(time, tiny=WAN, seed=0, grid=GRID):
    inputs = tiny.inputs(*grid) | {"timestep": torch.full((2,), float(time))}
    noise = torch.Generator().manual_seed(seed)
    shape = inputs["hidden_states"].shape
    return inputs | {"hidden_states": torch.randn(shape, generator=noise)}


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_bits_come_back(columns):
    mask = torch.rand(2, 3, 5, columns) < 0.4
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == -(-columns // 8)
    assert torch.equal(unpack_bits(packed, columns), mask)


def test_schedule_says_so_and_reads_back():
    rules = schedule(reuse_steps=3, reuse_guidance=True)
    assert "one map for 3 steps; one map for both guidance branches" in str(rules)
    assert na.Schedule.from_json(rules.to_json()) == rules
    assert not schedule().reuses_maps and str(schedule()) == "nabla-0.5"
    with pytest.raises(ValueError, match="reuse_steps must be a whole number, 1 or more: got 0"):
        schedule(reuse_steps=0)
    with pytest.raises(ValueError, match="reuse_guidance must be true or false: got 1"):
        schedule(reuse_guidance=1)


@torch.no_grad()
def test_heads_are_shared_out_anew_only_with_new_maps(model):
    # A rank's maps are those of its heads.
    with na.apply(model, schedule=schedule(reuse_steps=2)):
        fresh = []
        for time in (900, 900, 800, 700, 600):
            run(model, at(time))
            fresh.append(applied_to(model).planner.reuse.is_fresh)
    assert fresh == [True, False, False, True, False]


@torch.no_grad()
def test_pairs_of_queries_share_a_map(model):
    density = {}
    for pair in (None, "union", "pool"):
        with na.apply(model, na.SparseConfig(threshold=0.4, pair_queries=pair)) as handle:
            run(model, at(900, grid=(3, 16, 16)))
            density[pair] = handle.report().mean_density
    assert density[None] < density["union"] < 1 and 0 < density["pool"] < 1


@torch.no_grad()
def test_off_by_default(model, built):
    na.apply(model, "nabla-0.5")
    for time in (900, 900, 800):
        run(model, at(time))
    assert len(built) == 6


@torch.no_grad()
@pytest.mark.parametrize(
    ("rules", "new"),
    [
        # Two calls a step; 1 where the call builds its maps.
        ({"reuse_guidance": True}, [1, 0, 1, 0, 1, 0, 1, 0]),
        ({"reuse_steps": 2}, [1, 1, 0, 0, 1, 1, 0, 0]),
        ({"reuse_steps": 3, "reuse_guidance": True}, [1, 0, 0, 0, 0, 0, 1, 0]),
        ({"reuse_steps": 3, "dense_first_steps": 1}, [0, 0, 1, 1, 0, 0, 1, 1]),
    ],
    ids=str,
)
def test_calls_that_build(model, built, rules, new):
    handle = na.apply(model, schedule=schedule(**rules))
    counts = []
    for generation in range(2):
        for time in (900, 800, 700, 600):
            for branch in range(2):
                before = len(built)
                run(model, at(time, seed=10 * generation + branch))
                counts.append(len(built) - before)
    assert counts == [2 * count for count in new + new]
    report = handle.report()
    assert report.density.isfinite().all()
    served = [not any(new[i : i + 2]) for i in range(0, 8, 2)]
    is_dense = (report.density == 1).all(dim=(1, 2)).tolist()
    expected = [reused and not dense for reused, dense in zip(served, is_dense, strict=True)]
    assert report.kept_mass.isnan().any(dim=2).all(dim=1).tolist() == expected


@torch.no_grad()
def test_the_reused_map_is_the_first_one(model):
    seen = []

    with na.apply(model, schedule=schedule(reuse_steps=2)) as handle:
        handle.observe(lambda call: seen.append(call.block_map.mask))
        for time in (900, 800, 700):
            run(model, at(time, seed=time))
    first, second, third = seen[0:2], seen[2:4], seen[4:6]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@torch.no_grad()
def test_equal_tokens_give_equal_output(model):
    inputs = [at(900), at(900)]
    with na.apply(model, "nabla-0.5"):
        expected = run(model, inputs[0])
    with na.apply(model, schedule=schedule(reuse_guidance=True)):
        assert all(torch.equal(run(model, each), expected) for each in inputs)


@torch.no_grad()
def test_maps_that_do_not_fit_are_built(model, built):
    rules = schedule(reuse_steps=9, step_overrides={2: na.parse("nabla-0.3")})
    na.apply(model, schedule=rules)
    run(model, at(900))
    run(model, {key: value[:1] for key, value in at(800).items()})
    run(model, at(700))
    run(model, at(600, grid=(2, 16, 9)))
    assert len(built) == 8


@pytest.mark.parametrize("name", ["cogvideox", "mochi"])
@torch.no_grad()
def test_guidance_in_one_batch_uses_the_conditional_half(name, built):
    tiny = TINY[name]
    model = tiny.build()
    inputs = at(900, tiny)
    with na.apply(model, "nabla-0.5"):
        fresh = run(model, inputs)
    built.clear()
    handle = na.apply(model, schedule=schedule(reuse_guidance=True))
    out = run(model, inputs)
    assert built == [1, 1]
    density, mass = handle.report().density, handle.report().kept_mass
    assert density.isfinite().all() and mass.isfinite().all()
    # Up to the first difference of tokens, the half with the prompt is untouched.
    assert relative_error(out[1], fresh[1]) < 3e-6
    assert relative_error(out[0], fresh[0]) > 1e-5
    assert run(model, {**inputs, "timestep": inputs["timestep"] - 1}).shape == out.shape


@torch.no_grad()
def test_a_pipeline_without_guidance_shares_nothing_in_a_batch(built):
    tiny = TINY["cogvideox"]
    model = tiny.build()
    scheduler = SimpleNamespace(step_index=None, timesteps=[0])
    pipeline = type(
        "Pipeline", (), {"components": {"transformer": model}, "scheduler": scheduler}
    )()
    pipeline.do_classifier_free_guidance = False
    na.apply(pipeline, schedule=schedule(reuse_guidance=True))
    run(model, at(900, tiny))
    assert built == [2, 2]
    pipeline.do_classifier_free_guidance = True
    run(model, at(800, tiny))
    assert built[2:] == [1, 1]


@torch.no_grad()
def test_videos_of_one_step_have_maps_of_their_own(model, built):
    na.apply(model, schedule=schedule(reuse_guidance=True))
    for video in range(3):
        built.clear()
        for branch in range(2):
            run(model, at(1000, seed=10 * video + branch))
        assert built == [2, 2]


@torch.no_grad()
@pytest.mark.parametrize("rules", [{"reuse_steps": 9}, {"reuse_guidance": True}], ids=str)
def test_calls_that_may_be_of_another_video_reuse_nothing(model, built, rules):
    handle = na.apply(model, schedule=schedule(**rules))
    for time in (1000, 500):
        run(model, at(time))
    counts = []
    for seed in range(5):
        built.clear()
        run(model, at(500, seed=seed))
        counts.append(len(built))
    kept = [layer.maps._kept for layer in handle.layers]
    assert counts[1:] == [2] * 4 and not any(kept)
    run(model, at(1000))
    built.clear()
    run(model, at(1000 if rules.get("reuse_guidance") else 900))
    assert not built and all(kept)


@torch.no_grad()
def test_other_pipelines_do_not_pile_up_maps(model, built):
    timesteps = torch.arange(4)
    scheduler = SimpleNamespace(step_index=4, timesteps=timesteps)
    pipeline = type(
        "Pipeline", (), {"components": {"transformer": model}, "scheduler": scheduler}
    )()
    handle = na.apply(pipeline, schedule=schedule(reuse_steps=2))
    for time in (900, 900, 800, 800, 700, 700, 600, 600):
        run(model, at(time))
    assert len(built) == 8
    assert all(len(layer.maps._kept) == 2 for layer in handle.layers)


@torch.no_grad()
def test_copies_have_memories_of_their_own_and_removal_empties(model, built):
    handle = na.apply(model, schedule=schedule(reuse_steps=9, reuse_guidance=True))
    inputs = at(800)
    run(model, at(900))
    expected = run(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        built.clear()
        run(other, at(700, seed=3))
        assert len(built) == 2
    built.clear()
    assert torch.equal(run(model, inputs), expected) and not built
    layers = handle.layers
    assert all(layer.maps._kept for layer in layers)
    handle.remove()
    assert not any(layer.maps._kept for layer in layers)
    remove(model)


@torch.no_grad()
def test_compiled_blocks_keep_one_graph(model):
    from torch._dynamo.utils import counters

    rules = schedule(reuse_steps=2, reuse_guidance=True)

    def outputs():
        with na.apply(model, schedule=rules):
            times = (900, 900, 800, 800, 700, 700, 600)
            return torch.stack([run(model, at(t, seed=i)) for i, t in enumerate(times)])

    expected = outputs()
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert relative_error(outputs(), expected) < 3e-6
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()


def test_gradients_see_fresh_maps_and_a_warning_says_so(model):
    model.enable_gradient_checkpointing()
    model.train()
    gradients = []
    for rules in (schedule(), schedule(reuse_steps=2, reuse_guidance=True)):
        na.apply(model, schedule=rules)
        model.zero_grad()
        if rules.reuses_maps:
            with pytest.warns(UserWarning, match="with gradients every forward builds its own"):
                run(model, at(900)).square().mean().backward()
        else:
            run(model, at(900)).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
