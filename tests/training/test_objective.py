import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from nabla_attn.training.families import Family
from nabla_attn.training.noise import FlowPath, VelocityPath, path_of, served_levels
from nabla_attn.training.objective import Distillation, FlowMatching
from nabla_attn.training.sections import ObjectiveConfig

FAMILY = Family(pipeline="WanPipeline")


class Linear(nn.Module):
    """Stands for a transformer: hidden_states [batch, channels, ...] times a factor, plus time."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.inner = nn.Identity()
        self.seen = []

    def forward(self, hidden_states, timestep, bias, return_dict):
        assert not return_dict
        self.seen.append((hidden_states, timestep))
        time = timestep.view(-1, *[1] * (hidden_states.ndim - 1)) / 1000
        return (self.inner(hidden_states * self.factor) + time + bias.view_as(time),)


def batch():
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(3, 2, 3, 4, 5, generator=generator)
    return {"latents": latents, "conditions": {"bias": torch.tensor([0.1, -0.2, 0.3])}}


def by_hand(shift, times):
    """Noise level, noise and noisy latents, written out."""
    generator = torch.Generator().manual_seed(9)
    if times == "uniform":
        u = torch.rand(3, generator=generator, dtype=torch.float64)
    else:
        normal = torch.randn(3, generator=generator, dtype=torch.float64)
        u = 1 / (1 + torch.exp(-(0.5 + 2 * normal)))
    sigma = (shift * u / (1 + (shift - 1) * u)).float()
    noise = torch.randn(3, 2, 3, 4, 5, generator=generator)
    x = batch()["latents"]
    s = sigma.view(3, 1, 1, 1, 1)
    return sigma, noise, (1 - s) * x + s * noise, noise - x


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_flow_matching_is_the_formula(shift, times):
    module = Linear(0.7)
    path = FlowPath(FAMILY, shift=shift, times=times, logit_mean=0.5, logit_std=2.0)
    loss = FlowMatching(path, FAMILY.inputs)(module, batch(), torch.Generator().manual_seed(9))
    sigma, _, noisy, target = by_hand(shift, times)
    bias = batch()["conditions"]["bias"]
    predicted = 0.7 * noisy + (sigma + bias).view(3, 1, 1, 1, 1)
    assert loss["loss"].item() == pytest.approx(((predicted - target) ** 2).mean().item(), rel=1e-5)
    seen, timestep = module.seen[0]
    assert torch.allclose(seen, noisy) and torch.allclose(timestep, 1000 * sigma)


@pytest.mark.parametrize("kind", ["flow", "distill"])
def test_a_first_frame_that_is_shown_has_no_noise_and_no_loss(kind):
    student, teacher, told = Linear(0.7), Linear(0.4), batch()
    clean = torch.zeros(3, 1, 3, 1, 1)
    clean[:, :, 0] = 1
    told["conditions"]["clean"] = clean

    @contextmanager
    def enter():
        yield teacher

    path = FlowPath(FAMILY, shift=3.0)
    flow = FlowMatching(path, FAMILY.inputs)
    distillation = Distillation(path, FAMILY.inputs, enter, data_weight=0.5)
    terms = (flow if kind == "flow" else distillation)(
        student, told, torch.Generator().manual_seed(9)
    )
    sigma, _, noisy, target = by_hand(3.0, "uniform")
    noisy[:, :, 0] = told["latents"][:, :, 0]
    assert torch.equal(student.seen[0][0], noisy)
    offset = (sigma + told["conditions"]["bias"]).view(3, 1, 1, 1, 1)

    def error(wanted):
        return ((0.7 * noisy + offset - wanted)[:, :, 1:] ** 2).mean().item()

    if kind == "flow":
        assert terms["loss"].item() == pytest.approx(error(target), rel=1e-5)
        return
    assert terms["data"].item() == pytest.approx(error(target), rel=1e-5)
    distilled = error(0.4 * noisy + offset)
    assert terms["loss"].item() == pytest.approx(distilled + 0.5 * error(target), rel=1e-5)


def test_distillation_is_the_formula_on_the_same_input():
    student, teacher = Linear(0.7), Linear(0.4)

    @contextmanager
    def enter():
        yield teacher

    objective = Distillation(
        FlowPath(FAMILY, shift=3.0),
        FAMILY.inputs,
        enter,
        data_weight=0.5,
        layer_weight=2.0,
        layers=["inner"],
        student=student,
    )
    terms = objective(student, batch(), torch.Generator().manual_seed(9))
    sigma, _, noisy, target = by_hand(3.0, "uniform")
    bias = batch()["conditions"]["bias"]
    shift = (sigma + bias).view(3, 1, 1, 1, 1)
    same = (0.3 * noisy).square().mean().item()
    data = (0.7 * noisy + shift - target).square().mean().item()
    assert terms["distillation"].item() == pytest.approx(same, rel=1e-5)
    assert terms["layers"].item() == pytest.approx(same, rel=1e-5)
    assert terms["data"].item() == pytest.approx(data, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(same + 0.5 * data + 2 * same, rel=1e-5)
    terms["loss"].backward()
    assert student.factor.grad is not None and teacher.factor.grad is None
    assert torch.equal(student.seen[0][0], teacher.seen[0][0])


def test_a_guided_teacher_is_the_formula_of_guidance():
    student, teacher = Linear(0.7), Linear(0.4)

    @contextmanager
    def enter():
        yield teacher

    objective = Distillation(FlowPath(FAMILY, shift=3.0), FAMILY.inputs, enter, guidance=4.0)
    empty = {"bias": torch.tensor([1.0, 0.5, -0.5])}
    terms = objective(student, batch() | {"empty": empty}, torch.Generator().manual_seed(9))
    sigma, _, noisy, _ = by_hand(3.0, "uniform")
    bias = batch()["conditions"]["bias"]
    # Of the teacher: free + 4 (conditioned - free); factor and time are the same in both.
    guided = 0.4 * noisy + (sigma + 4 * bias - 3 * empty["bias"]).view(3, 1, 1, 1, 1)
    predicted = 0.7 * noisy + (sigma + bias).view(3, 1, 1, 1, 1)
    wanted = (predicted - guided).square().mean().item()
    assert terms["loss"].item() == pytest.approx(wanted, rel=1e-5)
    # The student runs once, with its caption; the teacher twice, on the same noisy latents.
    assert len(student.seen) == 1
    assert torch.equal(teacher.seen[0][0], teacher.seen[1][0])
    terms["loss"].backward()
    assert student.factor.grad is not None and teacher.factor.grad is None


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_levels_are_those_of_the_schedulers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    even = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    ours = shift * even / (1 + (shift - 1) * even)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    assert path_of(euler, FAMILY, ObjectiveConfig()).shift == shift
    assert path_of(unipc, FAMILY, ObjectiveConfig()).shift == shift
    assert torch.allclose(euler.sigmas.flip(0).double(), ours, atol=1e-5)
    # A step of the sampler along the exact velocity ends on the path.
    unipc.set_timesteps(7)
    x, noise = torch.randn(2, 4), torch.randn(2, 4)
    level = unipc.sigmas[0]
    sample = (1 - level) * x + level * noise
    moved = unipc.step(noise - x, unipc.timesteps[0], sample).prev_sample
    level = unipc.sigmas[1]
    assert torch.allclose(moved, (1 - level) * x + level * noise, atol=1e-5)
    assert unipc.timesteps[0].item() == pytest.approx(1000 * unipc.sigmas[0].item(), abs=1)


def test_levels_are_in_range_and_shifted_to_noise():
    generator = torch.Generator().manual_seed(0)
    low = FlowPath(FAMILY).draw_levels(20_000, generator)
    high = FlowPath(FAMILY, shift=5.0).draw_levels(20_000, generator)
    normal = FlowPath(FAMILY, times="logit-normal").draw_levels(20_000, generator)
    assert (low > 0).all() and (low < 1).all()
    assert low.mean() == pytest.approx(0.5, abs=0.01)
    # Mean of 5u / (1 + 4u) over uniform u: (5 / 16)(4 - ln 5).
    assert high.mean() == pytest.approx(5 / 16 * (4 - math.log(5)), abs=0.01)
    assert normal.std() == pytest.approx(0.2083, abs=0.01)


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_each_expert_draws_the_levels_it_serves_as_often_as_before(times, shift, boundary):
    index = {"boundary_ratio": boundary}
    everywhere = FlowPath(FAMILY, shift=shift, times=times)
    levels = everywhere.draw_levels(50_000, torch.Generator().manual_seed(0))
    for part, is_served in (
        ("transformer", lambda level: level >= boundary),
        ("transformer_2", lambda level: level < boundary),
    ):
        path = dataclasses.replace(everywhere, served=served_levels(index, part))
        drawn = path.draw_levels(20_000, torch.Generator().manual_seed(1))
        noised = path.add_noise(torch.zeros(500, 1), torch.Generator().manual_seed(2))
        # As the pipeline compares them: in timesteps of float32.
        assert is_served(noised.timestep.double() / 1000).all() and is_served(drawn).all()
        expected = levels[is_served(levels)]
        places = torch.tensor([0.1, 0.5, 0.9])
        spread = float(expected.max() - expected.min())
        assert torch.allclose(drawn.quantile(places), expected.quantile(places), atol=0.03 * spread)


def test_a_pipeline_without_boundary_has_one_transformer_for_all_levels():
    for index in ({}, {"boundary_ratio": None}):
        assert served_levels(index, "transformer") == (0, 1)
        with pytest.raises(ValueError, match=r"never calls transformer_2.*boundary_ratio"):
            served_levels(index, "transformer_2")
    with pytest.raises(ValueError, match="never calls transformer: its boundary_ratio is 1"):
        served_levels({"boundary_ratio": 1.0}, "transformer")
    for wrong in (2, "0.9", True, float("nan")):
        with pytest.raises(ValueError, match="boundary_ratio must be from 0 to 1: got"):
            served_levels({"boundary_ratio": wrong}, "transformer")


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_experts_train_and_validate_at_their_own_levels(tmp_path, part):
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from tests.tiny_diffusers import tiny_wan_transformer
    from tests.training.clips import make_clips, small_config

    from nabla_attn.training.model import Parts
    from nabla_attn.training.setup import prepare
    from nabla_attn.training.trainer import Trainer

    model, times = tiny_wan_transformer(), []
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0
    )
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875}
    config = small_config(steps=12, watch__validate=4)
    parts = Parts(tmp_path / "model", part, model, scheduler, WanPipeline, index)
    run = prepare(config, parts, make_clips())
    model.register_forward_pre_hook(
        lambda module, args, kwargs: times.extend(kwargs["timestep"].tolist()), with_kwargs=True
    )
    Trainer(run, tmp_path / "run").fit()
    assert len(times) == 12 + 3 * 2
    assert all((time >= 875) == (part == "transformer") for time in times)


def test_mochi_runs_from_noise_to_data():
    family = Family(pipeline="MochiPipeline", is_reversed=True)
    latents = batch()["latents"]
    ours = FlowPath(family).add_noise(latents, torch.Generator().manual_seed(1))
    plain = FlowPath(FAMILY).add_noise(latents, torch.Generator().manual_seed(1))
    assert torch.equal(ours.latents, plain.latents)
    assert torch.allclose(ours.timestep, 1000 - plain.timestep)
    assert torch.equal(ours.target, -plain.target)


def test_v_prediction_is_what_cogvideox_turns_back_into_data():
    from diffusers import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    family = Family(pipeline="CogVideoXPipeline", prediction="v_prediction")
    path = path_of(scheduler, family, ObjectiveConfig())
    assert isinstance(path, VelocityPath)
    latents = torch.randn(2, 3, 4, 5, 5)
    noised = path.add_noise(latents, torch.Generator().manual_seed(0))
    kept = scheduler.alphas_cumprod.float()[noised.timestep].view(2, 1, 1, 1, 1)
    restored = kept.sqrt() * noised.latents - (1 - kept).sqrt() * noised.target
    assert torch.allclose(restored, latents, atol=1e-5)


def test_a_shift_that_v_prediction_ignores_is_said(recwarn):
    from diffusers import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    family = Family(pipeline="CogVideoXPipeline", prediction="v_prediction")
    path_of(scheduler, family, ObjectiveConfig())
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    with pytest.warns(UserWarning, match=r"objective\.shift=3 is ignored: CogVideoXPipeline"):
        path_of(scheduler, family, ObjectiveConfig(shift=3.0))


def test_schedulers_that_do_not_fit_are_refused():
    from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler

    with pytest.raises(ValueError, match="trained by flow matching"):
        path_of(CogVideoXDDIMScheduler(), FAMILY, ObjectiveConfig())
    sized = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"Set objective\.shift"):
        path_of(sized, FAMILY, ObjectiveConfig())
    assert path_of(sized, FAMILY, ObjectiveConfig(shift=2.0)).shift == 2
