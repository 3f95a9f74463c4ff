"""Steps are counted from the pipeline, and from timesteps where there is none."""

import copy
import pickle
from types import SimpleNamespace

import torch

from nabla_attn.models.steps import StepCounter


class Pipeline:
    def __init__(self, step_index=None):
        self.scheduler = SimpleNamespace(step_index=step_index, timesteps=torch.arange(4))


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
    assert counter.num_steps == 4


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
