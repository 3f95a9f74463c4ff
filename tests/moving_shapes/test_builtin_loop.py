import os
import signal

import pytest
import torch
from torch import nn

from nabla_attn.moving_shapes.loop import Stage, run_stage, step_at
from nabla_attn.moving_shapes.recipe import MuonConfig
from nabla_attn.training.trainer import rate_share

OPTIM = MuonConfig(muon_lr=0.02, adamw_lr=0.01, warmup=2, average=0.9)


def make_stage(folder, steps=40, **settings):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def loss_at(step):
        x = torch.randn(32, 8, generator=step.generator) * step.rng.uniform(0.9, 1.1)
        return (module(x) - x.flip(1)).square().mean()

    return Stage(
        name="toy",
        folder=folder,
        module=module,
        loss_at=loss_at,
        is_hidden=lambda name, p: p.ndim == 2,
        optim=OPTIM,
        steps=steps,
        seed=3,
        save_every=10,
        **settings,
    )


def weights(stage):
    return torch.cat([p.detach().flatten() for p in stage.module.parameters()])


def test_it_learns_and_records(tmp_path):
    stage = make_stage(tmp_path, steps=300)
    record = run_stage(stage)
    assert record["stage"] == "toy" and record["steps"] == 300 and len(record["losses"]) == 20
    assert record["losses"][-1] < 0.3 * record["losses"][0]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, kind):
    whole = make_stage(tmp_path / "whole")
    run_stage(whole)

    def stop(progress):
        if progress.step == 17:
            os.kill(os.getpid(), kind)

    with pytest.raises(KeyboardInterrupt):
        run_stage(make_stage(tmp_path / "cut", on_log=stop))
    resumed = make_stage(tmp_path / "cut")
    record = run_stage(resumed)
    assert torch.equal(weights(resumed), weights(whole))
    assert len(record["losses"]) == 20


def test_resumed_from_an_old_checkpoint_equals_uninterrupted(tmp_path):
    whole = make_stage(tmp_path / "whole")
    run_stage(whole)

    def crash(progress):
        if progress.step == 17:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_stage(make_stage(tmp_path / "cut", on_log=crash))
    resumed = make_stage(tmp_path / "cut")
    run_stage(resumed)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first = make_stage(tmp_path)
    run_stage(first)
    second = make_stage(tmp_path, on_log=lambda progress: pytest.fail("trained again"))
    run_stage(second)
    assert torch.equal(weights(first), weights(second))


def test_a_torn_line_of_the_log_costs_that_line_alone(tmp_path):
    def tear(progress):
        if progress.step in (5, 20):
            with (tmp_path / "log.jsonl").open("ab") as file:
                file.write(b'{"stage": "toy", "st' + b"\xe2\n" * (progress.step == 5))

    record = run_stage(make_stage(tmp_path, on_log=tear))
    assert len(record["losses"]) == 20
    assert run_stage(make_stage(tmp_path)) == record


def test_the_signal_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run_stage(make_stage(tmp_path, steps=2))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(tmp_path):
    stage = make_stage(tmp_path)
    stage.loss_at = lambda step: stage.module(torch.full((1, 8), float("nan"))).sum()
    with pytest.raises(ValueError, match="step 1"):
        run_stage(stage)
    assert not list(tmp_path.glob("*.checkpoint"))


def test_steps_are_seeded_by_recipe_stage_and_number():
    def draw(seed, stage, number):
        step = step_at(seed, stage, number, 10)
        return step.rng.random(), torch.rand(1, generator=step.generator).item()

    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert len({draw(0, "a", 1), draw(1, "a", 1), draw(0, "b", 1), draw(0, "a", 2)}) == 4


def test_rates_rise_stay_and_fall():
    rules = {"warmup": 10, "start": 0.4, "final": 0.1}
    shares = [rate_share(step, 100, **rules) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == 1 and shares[40] == 1
    assert shares[70] == pytest.approx(0.55) and shares[100] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("decay", "middle", "end"), [("constant", 1, 1), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)]
)
def test_a_decay_that_begins_after_warm_up(decay, middle, end):
    shares = [
        rate_share(step, 100, warmup=20, start=0.2, final=0.2, decay=decay) for step in range(101)
    ]
    assert shares[0] == pytest.approx(0.05) and shares[19] == shares[20] == 1
    assert shares[60] == pytest.approx(middle) and shares[100] == pytest.approx(end)
    assert shares[20:] == sorted(shares[20:], reverse=True)


def test_steps_that_are_all_warm_up():
    shares = [rate_share(step, 4, warmup=8, start=2.0, final=0.0) for step in range(4)]
    assert shares == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
