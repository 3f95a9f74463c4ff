"""What the hook must survive: settings of diffusers, copies, adapters, checkpointing, compiling."""

import copy
import pickle
import warnings

import pytest
import torch
from tests.models.tiny_models import TINY, relative_error, run

import nabla_attn as na
from nabla_attn.models import register_model, remove, replaced
from nabla_attn.models.report import Forward, Telemetry

WAN = TINY["wan"]
GRID, OTHER_GRID = (3, 11, 13), (2, 16, 9)


@pytest.fixture
def model():
    return WAN.build()


@pytest.fixture(scope="module")
def inputs():
    return WAN.inputs(*GRID)


@torch.no_grad()
def test_settings_reach_dense_layers_and_survive_removal(model, inputs):
    dense = run(model, inputs)
    handle = na.apply(model, "nabla-0.5")
    sparse = run(model, inputs)
    model.set_attention_backend("_native_math")
    assert relative_error(run(model, inputs), sparse) < 3e-6
    assert {p._attention_backend.value for p in model.attn_processors.values()} == {"_native_math"}
    handle.remove()
    model.set_attention_backend("native")
    assert torch.equal(run(model, inputs), dense)
    assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


@torch.no_grad()
def test_backend_name_alone_is_refused(model, inputs):
    na.apply(model, "nabla-0.5").remove()
    model.set_attention_backend("nabla")
    with pytest.raises(ValueError, match=r"nabla_attn\.apply"):
        run(model, inputs)
    model.set_attention_backend("native")


@torch.no_grad()
def test_pickle_and_saved_weights(model, inputs, tmp_path):
    dense = run(model, inputs)
    na.apply(model, "nabla-0.5")
    sparse = run(model, inputs)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), inputs), sparse)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), dense)


@torch.no_grad()
def test_a_copy_is_removed_without_a_handle(model, inputs):
    dense = run(model, inputs)
    na.apply(model, "nabla-0.5")
    other = copy.deepcopy(model)
    remove(other)
    assert torch.equal(run(other, inputs), dense)
    remove(other)
    assert relative_error(run(model, inputs), dense) > 1e-3


@torch.no_grad()
def test_applying_again_replaces(model, inputs):
    dense = run(model, inputs)
    first = na.apply(model, "nabla-0.3")
    second = na.apply(model, "nabla-1")
    first.remove()
    assert relative_error(run(model, inputs), dense) < 3e-6
    assert len(model._forward_pre_hooks) == 1
    second.remove()
    second.remove()
    assert torch.equal(run(model, inputs), dense)
    assert not model._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_end_of_a_block_brings_back_what_was_applied(model, inputs, is_compiled):
    torch._dynamo.reset()
    target = torch.compile(model, backend="eager") if is_compiled else model

    def hooks():
        return [len(module._forward_pre_hooks) for module in (model, target)]

    dense = run(model, inputs)
    with na.apply(target, "nabla-0.3") as outer:
        sparse, outer_hooks = run(target, inputs), hooks()
        with na.apply(model, "nabla-0.6") as inner:
            assert relative_error(run(model, inputs), sparse) > 1e-3
        inner.remove()
        assert torch.equal(run(target, inputs), sparse) and hooks() == outer_hooks
        assert outer.report().density.isfinite().all()
        with replaced(model, None) as handle:
            assert handle is None and relative_error(run(target, inputs), dense) < 3e-6
            na.apply(model, "nabla-0.9")
        assert torch.equal(run(target, inputs), sparse) and hooks() == outer_hooks
    assert torch.equal(run(model, inputs), dense) and hooks() == [0, 0]
    torch._dynamo.reset()


@torch.no_grad()
def test_another_algorithm_for_the_time_of_a_block(model, inputs):
    parts = {"components": {"transformer": model, "tokenizer": None}, "scheduler": None}
    pipeline = type("Pipeline", (), parts)()
    dense = run(model, inputs)
    with replaced(pipeline, None):
        assert torch.equal(run(model, inputs), dense)
    na.apply(pipeline, "nabla-0.3")
    sparse = run(model, inputs)
    rules = na.Schedule(algorithm=na.parse("nabla-1"))
    for request in ({"algorithm": "nabla-1"}, {"algorithm": None, "schedule": rules}):
        with replaced(pipeline, telemetry=False, **request) as handle:
            assert relative_error(run(model, inputs), dense) < 3e-6
            assert str(handle.schedule) == "nabla-1"
        assert torch.equal(run(model, inputs), sparse)
    with pytest.raises(RuntimeError, match="stop"), replaced(pipeline, None):
        raise RuntimeError("stop")
    with (
        pytest.raises(ValueError, match="unknown backend"),
        replaced(pipeline, "nabla-1", backend="fast"),
    ):
        pass
    assert torch.equal(run(model, inputs), sparse)
    # What was applied in the block stays: it is not the block's.
    with replaced(pipeline, "nabla-1"):
        na.apply(pipeline, "nabla-0.9")
    assert str(model._nabla_attn.planner.settings.schedule) == "nabla-0.9"


@torch.no_grad()
def test_context_manager_and_keep_first_frame(model, inputs):
    dense = run(model, inputs)
    with na.apply(model, "nabla-0.3") as handle:
        run(model, inputs)
        plain = handle.report().mean_density
    assert torch.equal(run(model, inputs), dense)
    with na.apply(model, "nabla-0.3_keep-first-frame") as handle:
        run(model, inputs)
        assert handle.report().mean_density > plain
        assert handle.report().density.min() >= 1 / 3


@torch.no_grad()
def test_each_layer_has_the_blocks_of_its_algorithm(model, inputs):
    seen = []

    def run_with(schedule):
        seen.clear()
        with na.apply(model, schedule=schedule) as handle:
            handle.observe(lambda call: seen.append(call.layout.grid.block))
            return run(model, inputs)

    frames, plain = na.parse("nabla-0.3_block-1-11-13"), na.parse("nabla-0.3")
    mixed = na.Schedule(algorithm=plain, layer_overrides={0: frames})
    out = run_with(mixed)
    assert seen == [na.BlockShape(1, 11, 13), na.BlockShape()]
    assert na.Schedule.from_json(mixed.to_json()) == mixed
    for schedule in (na.Schedule(algorithm=plain), na.Schedule(algorithm=frames)):
        assert relative_error(run_with(schedule), out) > 1e-4
    dense = run(model, inputs)
    whole = na.Schedule(algorithm=na.parse("nabla-1_block-2-3-5"))
    assert relative_error(run_with(whole), dense) < 1e-5


@torch.no_grad()
def test_kept_maps_of_other_blocks_are_not_recalled(model, inputs):
    steps = {1: na.parse("nabla-0.3_block-3-4-4")}
    schedule = na.Schedule(algorithm=na.parse("nabla-0.3"), step_overrides=steps, reuse_steps=2)
    with na.apply(model, schedule=schedule):
        run(model, inputs)
        out = run(model, inputs | {"timestep": inputs["timestep"] - 100})
    with na.apply(model, steps[1]):
        wanted = run(model, inputs | {"timestep": inputs["timestep"] - 100})
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora(model, inputs, lora_first):
    pytest.importorskip("peft")
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    if lora_first:
        model.add_adapter(config)
    handle = na.apply(model, "nabla-1")
    if not lora_first:
        model.add_adapter(config)
    sparse = run(model, inputs)
    handle.remove()
    assert relative_error(sparse, run(model, inputs)) < 3e-6
    sparse.square().mean().backward()
    assert model.blocks[0].attn1.to_q.lora_A["default"].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_fused_projections(model, inputs):
    na.apply(model, "nabla-0.5")
    sparse = run(model, inputs)
    model.fuse_qkv_projections()
    assert relative_error(run(model, inputs), sparse) < 1e-5


@torch.no_grad()
def test_new_processors_are_taken_over():
    tiny = TINY["cogvideox"]
    model, inputs = tiny.build(), tiny.inputs(*GRID)
    dense = run(model, inputs)
    handle = na.apply(model, "nabla-0.5")
    sparse = run(model, inputs)
    model.fuse_qkv_projections()
    assert relative_error(run(model, inputs), sparse) < 1e-5
    handle.remove()
    assert relative_error(run(model, inputs), dense) < 1e-5


@pytest.mark.parametrize("removed", [True, False])
@torch.no_grad()
def test_processors_that_are_put_back(removed):
    tiny = TINY["cogvideox"]
    model, inputs = tiny.build(), tiny.inputs(*GRID)
    attention = model.transformer_blocks[0].attn1
    plain = attention.processor
    handle = na.apply(model, "nabla-0.5")
    model.fuse_qkv_projections()
    run(model, inputs)
    if removed:
        handle.remove()
    # Keeps the fused weights, and puts back the processors of that time.
    model.unfuse_qkv_projections()
    attention.to_q.weight.mul_(-3)
    sparse = run(model, inputs)
    handle.remove()
    dense = run(model, inputs)
    assert removed == (relative_error(sparse, dense) < 1e-5)
    with na.apply(model, "nabla-1"):
        assert relative_error(run(model, inputs), dense) < 3e-6
    with na.apply(model, "nabla-0.5"):
        again = run(model, inputs)
        assert relative_error(again, dense) > 1e-3
    assert removed or relative_error(again, sparse) < 1e-5
    assert attention.processor is plain


def test_checkpointing_with_another_grid_in_between(model, inputs):
    model.train()
    na.apply(model, "nabla-0.5")

    def gradients(other):
        model.zero_grad()
        loss = run(model, inputs).square().mean()
        if other:
            with torch.no_grad():
                run(model, WAN.inputs(*OTHER_GRID))
        loss.backward()
        return [p.grad.clone() for p in model.blocks.parameters()]

    plain = gradients(other=False)
    model.enable_gradient_checkpointing()
    for other in (False, True):
        for got, expected in zip(gradients(other), plain, strict=True):
            assert torch.equal(got, expected)
    remove(model)
    assert type(model._gradient_checkpointing_func).__name__ == "function"


@pytest.mark.parametrize("then", ["nothing", "another"])
def test_the_backward_may_come_after_removal(model, inputs, then):
    model.train()

    def gradients(is_late):
        model.zero_grad()
        with na.apply(model, "nabla-0.3"):
            loss = run(model, inputs).square().mean()
            if not is_late:
                loss.backward()
        if then == "another":
            na.apply(model, "nabla-0.9")
        if is_late:
            loss.backward()
        remove(model)
        return [p.grad.clone() for p in model.blocks.parameters()]

    plain = gradients(is_late=False)
    model.enable_gradient_checkpointing()
    for got, expected in zip(gradients(is_late=True), plain, strict=True):
        assert torch.equal(got, expected)
    assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def steps_at(model, inputs, times):
    layer, dense = model._nabla_attn.planner.layers[0], []
    for time in times:
        run(model, inputs | {"timestep": torch.full((2,), float(time))})
        dense.append(layer.current.is_dense)
    return dense


def test_rules_about_steps_are_for_generation(model, inputs):
    schedule = na.Schedule(algorithm=na.parse("sta-1-1-1"), dense_first_steps=1)
    na.apply(model, schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            assert steps_at(model, inputs, (900, 800, 700)) == [True, False, False]
            assert steps_at(model, inputs, (900, 800)) == [True, False]
        model.train()
        assert steps_at(model, inputs, (500, 900, 20)) == [False] * 3
    model.eval()
    with pytest.warns(UserWarning, match=r"with gradients they do not apply. Use torch.no_grad"):
        assert steps_at(model, inputs, (500, 900, 20)) == [False] * 3


@torch.no_grad()
def test_random_timesteps_that_stay_dense_are_named(model, inputs):
    na.apply(model, "sta-1-1-1")
    with pytest.warns(UserWarning, match=r"first 12 steps.*parse\('sta-1-1-1'\)"):
        assert steps_at(model, inputs, (500, 900, 20)) == [True] * 3
    na.apply(model, schedule=na.Schedule(algorithm=na.parse("sta-1-1-1")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps_at(model, inputs, (500, 900, 20)) == [False] * 3


@torch.no_grad()
def test_regional_compile_has_one_graph_for_all_steps_and_layers(inputs):
    from torch._dynamo.utils import counters

    model = WAN.build(num_layers=3)
    schedule = na.Schedule(
        algorithm=na.parse("nabla-0.5"),
        layer_overrides={2: na.parse("nabla-0.4_sta-1-1-1")},
        step_overrides={2: na.parse("topk-0.3")},
    )

    def outputs():
        with na.apply(model, schedule=schedule) as handle:
            times = (900.0, 800.0, 700.0, 600.0)
            out = [run(model, inputs | {"timestep": torch.full((2,), time)}) for time in times]
            return torch.stack(out), handle.report().density

    expected, density = outputs()
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    compiled, compiled_density = outputs()
    assert relative_error(compiled, expected) < 3e-6
    assert torch.equal(compiled_density, density)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    with na.apply(model, schedule=na.Schedule(algorithm=na.parse("nabla-1"), dense_layers=(0,))):
        run(model, inputs)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_compiled_training_and_whole_model_compile(model, inputs):
    torch._dynamo.reset()
    na.apply(model, "nabla-0.5")
    expected = run(model, inputs)
    expected.square().mean().backward()
    gradient = model.blocks[0].attn1.to_q.weight.grad.clone()
    model.zero_grad()
    remove(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    na.apply(compiled, "nabla-0.5")
    out = run(compiled, inputs)
    assert relative_error(out, expected) < 3e-6
    out.square().mean().backward()
    assert relative_error(model.blocks[0].attn1.to_q.weight.grad, gradient) < 1e-5
    torch._dynamo.reset()


@torch.no_grad()
def test_compile_after_apply_without_fullgraph(model, inputs):
    torch._dynamo.reset()
    na.apply(model, "nabla-0.5")
    expected = run(model, inputs)
    assert relative_error(run(torch.compile(model, backend="eager"), inputs), expected) < 3e-6
    torch._dynamo.reset()


@torch.no_grad()
def test_tokens_that_do_not_fit_raise(model, inputs):
    register_model(
        "WanTransformer3DModel", attention=r"blocks\.\d+\.attn1", grid=lambda *_: (3, 11, 12)
    )
    try:
        na.apply(model, "nabla-0.5")
        with pytest.raises(ValueError, match="got 429 tokens for 3x11x12 = 396 and no joint text"):
            run(model, inputs)
    finally:
        register_model("WanTransformer3DModel", attention=r"blocks\.\d+\.attn1")


@torch.no_grad()
def test_masks_over_video_raise():
    model = TINY["skyreels"].build(num_frame_per_block=2)
    na.apply(model, "nabla-0.5")
    with pytest.raises(ValueError, match="masks of padded keys"):
        run(model, TINY["skyreels"].inputs(4, 8, 8))


def test_wrong_requests(model):
    with pytest.raises(ValueError, match=r"Linear is not a known model.*WanTransformer3DModel"):
        na.apply(torch.nn.Linear(2, 2), "nabla-0.5")
    with pytest.raises(ValueError, match="expected a diffusers pipeline"):
        na.apply("wan", "nabla-0.5")
    with pytest.raises(ValueError, match="unknown backend"):
        na.apply(model, "nabla-0.5", backend="fast")
    with pytest.raises(ValueError, match="trained with none"):
        na.apply(model)
    with pytest.raises(ValueError, match="differ"):
        na.apply(model, "nabla-0.5", schedule=na.Schedule.default("nabla-0.6"))
    with pytest.raises(ValueError, match="nothing was measured"):
        na.apply(model, "nabla-0.5", telemetry=False).report()
    with torch.no_grad(), pytest.raises(ValueError, match="dense_last_steps needs num_steps"):
        schedule = na.Schedule(algorithm=na.parse("nabla-0.5"), dense_last_steps=1)
        na.apply(model.eval(), schedule=schedule)
        run(model, WAN.inputs(*GRID))


def test_processors_with_weights_are_refused(model):
    class Weighted(torch.nn.Module):
        pass

    model.blocks[1].attn1.set_processor(Weighted())
    with pytest.raises(ValueError, match="weights of their own"):
        na.apply(model, "nabla-0.5")
    assert not model._forward_pre_hooks and "_nabla_attn" not in model.__dict__
    assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


@torch.no_grad()
def test_min_tokens_and_explicit_backend(model, inputs):
    schedule = na.Schedule(algorithm=na.parse("nabla-0.5"), min_tokens=430)
    dense = run(model, inputs)
    with na.apply(model, schedule=schedule) as handle:
        assert torch.equal(run(model, inputs), dense)
        assert handle.report().mean_density == 1
    with na.apply(model, "nabla-0.5", backend="reference"):
        reference = run(model, inputs)
    with na.apply(model, "nabla-0.5", backend="gather"):
        assert relative_error(run(model, inputs), reference) < 3e-6


def test_old_plans_are_forgotten_and_used_ones_kept(monkeypatch):
    # Training draws a threshold per step; plans must not pile up.
    from nabla_attn.models import plan as plans

    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    grid = na.TokenGrid(1, 8, 8)
    used = plans.Plan(grid=grid, config=na.parse("nabla-0.123"))
    key = plans.plan_key(used)
    for index in range(1, 9):
        plans.plan_key(plans.Plan(grid=grid, config=na.SparseConfig(threshold=index / 1000)))
        assert plans.plan_key(used) is key
    assert plans.plan_of(key) == used
    assert len(plans._PLANS) == len(plans._KEYS)


def test_reports_keep_every_step_of_long_generations():
    telemetry = Telemetry()
    for step in range(1500):
        for _ in range(2):
            density = torch.full((3, 1), step / 2000)
            telemetry.record(Forward("transformer", step, (1, 1, 1), [density]), 1)
    assert torch.equal(telemetry.report().density[:, 0, 0], torch.arange(1500) / 2000)
    for _ in range(3000):
        telemetry.record(Forward("transformer", None, (1, 1, 1), [None]), -1)
    assert len(telemetry.forwards) == 1024 and telemetry.report().density.shape == (1, 1, 1)


@torch.no_grad()
def test_what_people_print_is_short(model, inputs):
    with na.apply(model, "nabla-0.3") as handle:
        run(model, inputs)
        assert repr(handle) == "<NABLA in WanTransformer3DModel: nabla-0.3>"
        report = handle.report()
        assert repr(report).startswith("Report(density 0.") and "2 layers" in repr(report)
        assert report._repr_html_().count("<tr>") == 3
        calls = []
        handle.observe(calls.append)
        run(model, inputs)
    assert repr(handle).endswith(", removed>")
    assert repr(calls[0].block_map).startswith("BlockMap(2 samples, 2 heads, 12x12 blocks of 64")


@torch.no_grad()
def test_a_handle_follows_another_schedule_and_observers_end(model, inputs):
    handle, seen = na.apply(model, "nabla-0.3"), []
    stop = handle.observe(lambda call: seen.append((call.layer, str(call.config))))
    run(model, inputs)
    handle.set_schedule("nabla-0.6")
    run(model, inputs)
    assert seen == [(0, "nabla-0.3"), (1, "nabla-0.3"), (0, "nabla-0.6"), (1, "nabla-0.6")]
    stop()
    stop()
    run(model, inputs)
    assert len(seen) == 4 and len(handle.last_densities()) == 2
    assert [layer.path for layer in handle.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    with pytest.raises(ValueError, match="the schedule names layer 7"):
        handle.set_schedule(na.Schedule(algorithm=na.parse("nabla-0.5"), dense_layers=(7,)))
    assert str(handle.schedule) == "nabla-0.6"
