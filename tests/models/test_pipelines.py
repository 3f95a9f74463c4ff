"""Real pipelines of diffusers end to end, and the steps that are counted from them."""

import gc
import weakref

import pytest
import torch
from tests.models.tiny_models import TINY, relative_error
from tests.models.tiny_pipelines import (
    STEPS,
    cogvideox,
    framepack,
    generate,
    helios,
    helios_pyramid,
    hunyuan,
    kandinsky5,
    ltx,
    ltx2,
    skyreels_forcing,
    wan,
    wan_flf2v,
    wan_i2v,
    wan_ti2v,
)

import nabla_attn as na


@pytest.mark.parametrize(
    "build", [wan, wan_i2v, wan_flf2v, wan_ti2v, hunyuan, cogvideox, ltx, ltx2, kandinsky5]
)
def test_pipelines_end_to_end(build):
    pipeline, arguments = build()
    dense = generate(pipeline, arguments)
    with na.apply(pipeline, "nabla-1"):
        assert relative_error(generate(pipeline, arguments), dense) < 1e-4
    schedule = na.Schedule(
        algorithm=na.parse("nabla-0.4"), dense_first_steps=1, step_overrides={2: na.parse("topk-1")}
    )
    with na.apply(pipeline, schedule=schedule) as handle:
        assert relative_error(generate(pipeline, arguments), dense) > 1e-4
        for _ in range(2):
            generate(pipeline, arguments)
            density = handle.report().density.mean(dim=(1, 2))
            assert density.shape == (STEPS,)
            assert density[0] == 1 and 0.2 < density[1] < 0.9 and density[2] == 1
    assert torch.equal(generate(pipeline, arguments), dense)


def test_steps_run_on_over_both_transformers_of_wan_2_2():
    pipeline, arguments = wan(transformer_2=TINY["wan"].build(), boundary_ratio=0.9)
    schedule = na.Schedule(algorithm=na.parse("nabla-0.4"), dense_last_steps=1)
    with na.apply(pipeline, schedule=schedule) as handle:
        generate(pipeline, arguments, num_inference_steps=5)
        report = handle.report()
    assert report.models[0] == "transformer" and report.models[-1] == "transformer_2"
    assert report.density.shape[0] == 5
    assert [bool(row.mean() == 1) for row in report.density] == [False] * 4 + [True]
    assert 0 < report.to_dict()["density"] < 1


def solver(name):
    import diffusers

    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
    return getattr(diffusers, name)(**flow if "Solver" in name else {})


@pytest.mark.parametrize(
    ("build", "name", "calls"),
    [
        (wan, "FlowMatchEulerDiscreteScheduler", [2, 2, 2, 2]),
        (wan, "FlowMatchHeunDiscreteScheduler", [4, 4, 4, 2]),
        (wan, "FlowMatchLCMScheduler", [2, 2, 2, 2]),
        (wan, "DPMSolverMultistepScheduler", [2, 2, 2, 2]),
        (wan, "SASolverScheduler", [2, 2, 2, 2]),
        # No index of steps, and guidance in one batch.
        (cogvideox, "CogVideoXDDIMScheduler", [1, 1, 1, 1]),
    ],
)
def test_steps_are_the_users_with_any_scheduler(build, name, calls):
    pipeline, arguments = build()
    pipeline.scheduler = solver(name)
    schedule = na.Schedule(algorithm=na.parse("nabla-0.4"), dense_first_steps=1, dense_last_steps=1)
    arguments |= dict(num_inference_steps=4, height=96, width=96)
    with na.apply(pipeline, schedule=schedule) as handle:
        for _ in range(2):
            generate(pipeline, arguments)
            steps = [forward.step for forward in handle._telemetry.forwards]
            assert [steps.count(step) for step in range(4)] == calls
            dense = [bool(row.mean() == 1) for row in handle.report().density]
            assert dense == [True, False, False, True]


def keep_all(handle):
    """Every forward with its generation, where a report keeps those of the last."""
    forwards, record = [], handle._telemetry.record
    handle._telemetry.record = lambda *args: (forwards.append(args), record(*args))
    return forwards


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("build", "calls"), [(skyreels_forcing, 2), (framepack, 1), (helios, 2)])
def test_each_window_of_a_long_video_starts_at_its_first_step(build, calls, steps):
    pipeline, arguments = build()
    schedule = na.Schedule(
        algorithm=na.parse("nabla-0.4_block-2-2-2"),
        dense_first_steps=1,
        dense_last_steps=1,
        reuse_steps=2,
        reuse_guidance=True,
    )
    with na.apply(pipeline, schedule=schedule) as handle:
        forwards = keep_all(handle)
        generate(pipeline, arguments, num_inference_steps=steps)
    one_window = [step for step in range(steps) for _ in range(calls)]
    assert [forward.step for forward, _ in forwards] == 3 * one_window
    generations = [generation for _, generation in forwards]
    assert generations == [number for number in (1, 2, 3) for _ in one_window]
    for forward, _ in forwards:
        is_dense = all(layer is None or bool((layer[0] == 1).all()) for layer in forward.stats)
        assert is_dense == (forward.step in (0, steps - 1))


@pytest.mark.parametrize("stages", [[2, 3, 2], [1, 1, 1], [1, 4, 3]])
def test_the_stages_of_a_pyramid_are_one_generation(stages):
    pipeline, arguments = helios_pyramid()
    schedule = na.Schedule(
        algorithm=na.parse("nabla-0.4_block-2-2-2"),
        dense_first_steps=1,
        dense_last_steps=1,
        reuse_steps=2,
    )
    with na.apply(pipeline, schedule=schedule) as handle:
        forwards = keep_all(handle)
        generate(pipeline, arguments, pyramid_num_inference_steps_list=stages)
    steps = [step for step in range(sum(stages)) for _ in range(2)]
    assert [forward.step for forward, _ in forwards] == 2 * steps
    assert [number for _, number in forwards] == [number for number in (1, 2) for _ in steps]
    for forward, _ in forwards:
        is_dense = all(layer is None or bool((layer[0] == 1).all()) for layer in forward.stats)
        assert is_dense == (forward.step in (0, sum(stages) - 1))


@pytest.mark.parametrize("method", ["losa", "chipmunk"])
def test_what_a_method_remembers_ends_with_a_stage(method):
    pipeline, arguments = helios_pyramid()
    with na.apply(pipeline, f"{method}-0.3_block-1-2-2") as handle:
        generate(pipeline, arguments)
        steps = [forward.step for forward in handle._telemetry.forwards]
    assert steps == [step for step in range(7) for _ in range(2)]


def test_last_steps_before_the_last_stage_of_a_pyramid_are_refused():
    pipeline, arguments = helios_pyramid()
    schedule = na.Schedule(algorithm=na.parse("nabla-0.4_block-2-2-2"), dense_last_steps=3)
    with na.apply(pipeline, schedule=schedule), pytest.raises(ValueError, match="2 steps: got 3"):
        generate(pipeline, arguments)
    with na.apply(pipeline, schedule=schedule) as handle:
        generate(pipeline, arguments, pyramid_num_inference_steps_list=[1, 1, 3])
        dense = [bool(row.mean() == 1) for row in handle.report().density]
    assert dense == [False, False, True, True, True]


def test_frames_that_are_denoised_one_after_another_take_one_generation():
    pipeline, arguments = skyreels_forcing()
    pipeline.transformer._set_ar_attention(1)
    arguments |= dict(num_frames=17, overlap_history=None, ar_step=2, causal_block_size=1)
    schedule = na.Schedule(algorithm=na.parse("nabla-0.4"), dense_layers=(0, 1))
    with na.apply(pipeline, schedule=schedule) as handle:
        generate(pipeline, arguments, num_inference_steps=4)
        steps = [forward.step for forward in handle._telemetry.forwards]
    assert steps == [step for step in range(12) for _ in range(2)]


def test_two_pipelines_with_different_settings():
    (first, arguments), (second, _) = wan(), wan()
    loose, tight = na.apply(first, "nabla-0.8"), na.apply(second, "nabla-0.3")
    generate(first, arguments)
    generate(second, arguments)
    assert loose.report().mean_density > 0.7 > 0.5 > tight.report().mean_density
    tight.remove()
    assert "nabla-0.8" not in str(second) and hasattr(first.transformer, "_nabla_attn")


def test_the_pipeline_is_not_kept_alive():
    pipeline, _ = wan()
    handle = na.apply(pipeline, "nabla-0.5")
    alive = weakref.ref(pipeline)
    del pipeline
    gc.collect()
    assert alive() is None
    handle.remove()


def test_a_pipeline_without_a_known_transformer_is_named():
    from diffusers import AutoencoderKLWan

    pipeline, _ = wan()
    pipeline.transformer = None
    with pytest.raises(ValueError, match="WanPipeline has no transformer"):
        na.apply(pipeline, "nabla-0.5")
    pipeline.transformer = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="AutoencoderKLWan is not a known model"):
        na.apply(pipeline, "nabla-0.5")


def test_kandinsky_checkpoint_trained_with_nabla_needs_no_algorithm():
    trained = dict(
        attention_type="nabla", attention_P=0.4, attention_wT=1, attention_wH=1, attention_wW=1
    )
    pipeline, arguments = kandinsky5(**trained)
    with na.apply(pipeline) as handle:
        ours = generate(pipeline, arguments)
        assert handle.report().mean_density < 0.9
    with na.apply(pipeline, "nabla-0.4_sta-1-1-1"):
        assert torch.equal(generate(pipeline, arguments), ours)
