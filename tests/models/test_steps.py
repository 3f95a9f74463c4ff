"""Steps are counted from the pipeline, and from timesteps where there is none."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from nabla_attn.models.steps import StepCounter


class Pipeline:
    def __init__(self, step_index=None):
        self.scheduler = SimpleNamespace(
            step_index=step_index, timesteps=torch.arange(20), num_inference_steps=20
        )


def test_scheduler_index_counts_and_restarts():
    pipeline = Pipeline()
    counter = StepCounter(pipeline)
    for generation in (1, 2, 3):
        seen = []
        for index, time in ((None, 900), (None, 900), (1, 600), (1, 600), (2, 300)):
            pipeline.scheduler.step_index = index
            seen.append(counter.observe(torch.full((2,), float(time))))
        assert seen == [0, 0, 1, 1, 2]
        assert counter.generation == generation
    assert counter.num_steps == 20


def test_runs_that_begin_inside_the_schedule_start_at_zero():
    pipeline = Pipeline()
    counter = StepCounter(pipeline)
    assert counter.observe(500.0) == 0
    for step, index in ((1, 11), (1, 11), (2, 12)):
        pipeline.scheduler.step_index = index
        assert counter.observe(0.0) == step


def test_applied_in_the_middle_of_a_run():
    pipeline = Pipeline(step_index=5)
    counter = StepCounter(pipeline)
    assert counter.observe(0.0) == 5
    assert counter.generation == 1


def test_timesteps_count_without_a_scheduler_index():
    counter = StepCounter()
    times = (900, 900, 600, 600, 300, 900, 600, 600)
    assert [counter.observe(torch.tensor([time])) for time in times] == [0, 0, 1, 1, 2, 0, 1, 1]
    assert counter.generation == 2 and counter.num_steps is None
    # Some models count upwards, and some give each token a time of its own.
    counter = StepCounter()
    rows = ([[0.0, 0.2]], [[0.0, 0.6]], [[0.0, 0.6]], [[0.0, 0.1]])
    assert [counter.observe(torch.tensor(row)) for row in rows] == [0, 1, 1, 0]
    assert StepCounter().observe(None) == 0


def test_copies_leave_the_pipeline():
    pipeline = Pipeline(step_index=3)
    counter = StepCounter(pipeline)
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert other.observe(500.0) == 0
    assert counter.observe(500.0) == 3


def observe_run(counter, times, calls=2):
    return [counter.observe(float(time)) for time in times for _ in range(calls)]


def test_a_scheduler_at_its_end_does_not_count_for_others():
    pipeline = Pipeline()
    counter = StepCounter(pipeline)
    pipeline.scheduler.timesteps = torch.arange(3)
    for index in (None, 1, 2):
        pipeline.scheduler.step_index = index
        counter.observe(900.0 if index is None else 0.0)
    pipeline.scheduler.step_index, pipeline.do_classifier_free_guidance = 3, True
    for generation in (2, 3):
        assert observe_run(counter, (900, 600, 300)) == [0, 0, 1, 1, 2, 2]
        assert counter.generation == generation
        assert counter.num_steps is None and counter.is_guided is None
    pipeline.scheduler.step_index = None
    assert counter.observe(900.0) == 0
    assert counter.generation == 4 and counter.num_steps == 3 and counter.is_guided


def test_a_scheduler_left_in_the_middle_does_not_count_for_others():
    pipeline = Pipeline(step_index=5)
    counter = StepCounter(pipeline)
    assert counter.observe(700.0) == counter.observe(700.0) == 5
    assert observe_run(counter, (900, 600, 300)) == [0, 0, 1, 1, 2, 2]
    assert counter.generation == 2 and counter.num_steps is None
    # Its next run passes the same place.
    for step, index in enumerate((None, *range(1, 8))):
        pipeline.scheduler.step_index = index
        assert observe_run(counter, [900 - step]) == [step, step]
    assert counter.generation == 3


def test_a_device_is_not_read_while_the_scheduler_can_be_trusted(monkeypatch):
    from nabla_attn.models import steps

    read = []
    monkeypatch.setattr(steps, "_value", lambda time: read.append(time) or float(len(time)))
    pipeline = Pipeline(step_index=5)
    counter = StepCounter(pipeline)
    for length in (1, 1, 1, 2):
        assert counter.observe(torch.empty(length, device="meta")) == 5
    assert not read
    assert counter.observe(torch.empty(2, device="meta")) == 0


def test_more_kinds_of_guidance_stay_one_step():
    pipeline = Pipeline()
    counter = StepCounter(pipeline)
    for step, index in enumerate((None, 1, 2)):
        pipeline.scheduler.step_index = index
        assert observe_run(counter, [900 - step], calls=6) == [step] * 6
    assert counter.generation == 1


class IdlePipeline(Pipeline):
    current_timestep = None
    do_classifier_free_guidance = True
    _num_timesteps = 50


def test_another_pipeline_with_the_same_scheduler_has_its_own_number_of_steps():
    pipeline = IdlePipeline()
    counter = StepCounter(pipeline)
    counter.observe(900.0)
    assert counter.num_steps == 20 and counter.is_guided is None
    # A video to start from, with a strength.
    pipeline.scheduler.begin_index = 12
    assert counter.num_steps == 8
    pipeline.scheduler.begin_index, pipeline.scheduler.step_index = None, 13
    assert counter.observe(600.0) == 1 and counter.num_steps == 8
    # A scheduler that never ran has the training's timesteps.
    pipeline.scheduler.num_inference_steps = None
    assert counter.num_steps is None
    pipeline.current_timestep = 900
    assert counter.num_steps == 50 and counter.is_guided


@pytest.mark.parametrize("has_index", [True, False])
def test_new_timesteps_are_a_new_generation_of_one_step(has_index):
    pipeline = Pipeline()
    if not has_index:
        del pipeline.scheduler.step_index
    counter = StepCounter(pipeline)
    for generation in (1, 2, 3):
        pipeline.scheduler.timesteps = torch.tensor([999])
        assert observe_run(counter, [999]) == [0, 0]
        assert counter.generation == generation


def run_scheduler(counter, scheduler, timesteps):
    """Two calls a step; for each step its number and the steps that the counter knows."""
    seen = []
    for time in timesteps:
        seen.append((*{counter.observe(time) for _ in range(2)}, counter.num_steps))
        scheduler.step(torch.zeros(1), time, torch.zeros(1))
    return seen


def test_the_last_noise_level_is_no_step():
    from diffusers import LTXEulerAncestralRFScheduler

    pipeline = Pipeline()
    pipeline.scheduler = scheduler = LTXEulerAncestralRFScheduler()
    counter = StepCounter(pipeline)
    for _ in range(2):
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.3, 0.0])
        seen = run_scheduler(counter, scheduler, scheduler.timesteps[:-1])
        assert seen == [(0, 3), (1, 3), (2, 3)]


class LTXI2VLongMultiPromptPipeline(Pipeline):
    """diffusers' pipeline of this name runs all timesteps but the last, and tells them all."""


def test_a_pipeline_that_leaves_out_the_last_timestep():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = LTXI2VLongMultiPromptPipeline()
    pipeline.scheduler = scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline._num_timesteps = 4
    counter = StepCounter(pipeline)
    scheduler.set_timesteps(4)
    seen = run_scheduler(counter, scheduler, scheduler.timesteps[:-1])
    assert seen[1:] == [(1, 3), (2, 3)]


def test_steps_that_are_told_for_all_tiles_together():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = Pipeline()
    pipeline.scheduler = scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline._num_timesteps = 9
    counter = StepCounter(pipeline)
    for tile in (1, 2, 3):
        scheduler.set_timesteps(3)
        seen = run_scheduler(counter, scheduler, scheduler.timesteps)
        assert seen[1:] == [(1, 3), (2, 3)] and counter.generation == tile


def test_without_a_pipeline_the_third_call_of_one_step_is_a_new_generation():
    counter = StepCounter()
    seen = [(counter.observe(1000.0), counter.generation) for _ in range(6)]
    assert seen == [(0, 1), (0, 1), (0, 2), (0, 2), (0, 3), (0, 3)]
    assert observe_run(counter, [500], calls=4) == [1] * 4
    assert counter.generation == 3
