import pytest
import torch
from diffusers import UniPCMultistepScheduler

from nabla_attn.training.noise import add_noise, flow_target, spread_times


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_times_are_even_over_steps(batch):
    times = torch.cat([spread_times(step, batch, 1.0) for step in range(600 // batch)])
    histogram = torch.histc(times, bins=20, min=0, max=1)
    assert (times > 0).all() and (times < 1).all()
    assert (histogram - histogram.mean()).abs().max() <= 3


def test_shift_moves_times_to_noise_as_the_scheduler_does():
    even, shifted = spread_times(0, 50, 1.0), spread_times(0, 50, 5.0)
    assert torch.allclose(shifted, 5 * even / (1 + 4 * even))
    assert shifted.median() > 0.8


def test_path_goes_from_data_to_noise():
    data, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    ends = add_noise(data, noise, torch.tensor([0.0, 1.0, 0.5]))
    assert torch.equal(ends[0], data[0]) and torch.equal(ends[1], noise[1])
    assert torch.allclose(ends[2], (data[2] + noise[2]) / 2)


def test_the_scheduler_of_the_pipeline_follows_the_target_back_to_the_data():
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    scheduler.set_timesteps(8)
    data, noise = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    sample = noise
    for time in scheduler.timesteps:
        sample = scheduler.step(flow_target(data, noise), time, sample, return_dict=False)[0]
    assert torch.allclose(sample, data, atol=1e-3)
