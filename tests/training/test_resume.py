import json
import os
import random
import shutil
import signal
import time
import warnings

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from tests.processes import start_process
from tests.training.clips import (
    Stopped,
    equal,
    make_clips,
    small_config,
    stop_after,
    train_clips,
)

from nabla_attn.training import checkpoint as checkpoint_module
from nabla_attn.training.checkpoint import Checkpoints, SaveFailed, read_state
from nabla_attn.training.model import load_parts
from nabla_attn.training.setup import prepare
from nabla_attn.training.train import train
from nabla_attn.training.trainer import Trainer

FULL = {
    "steps": 6,
    "optim__warmup": 0,
    "ema": 0.9,
    "accumulation": 2,
    "data__batch": 2,
    "sparsity__ramp": 4,
}


def weights(folder):
    (path,) = folder.glob("*/transformer/*.safetensors")
    return load_file(path)


def same(first, second):
    return equal(weights(first), weights(second))


def run(config, model, folder, **options):
    return train(config, model, folder, dataset=make_clips(odd=True), **options)


@pytest.fixture(scope="module")
def whole(tiny_wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(small_config(**FULL), tiny_wan, folder)
    return folder


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_wan, tmp_path, whole, step):
    config = small_config(**FULL)
    with pytest.raises(Stopped):
        run(config, tiny_wan, tmp_path, on_log=stop_after(step))
    run(config, tiny_wan, tmp_path, resume=True)
    assert same(tmp_path, whole)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    kept = (whole / "log.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows] == [row.split(",")[:2] for row in kept]


def test_distilling_with_lora_resumes_bit_for_bit(tiny_wan, tmp_path):
    config = small_config("distill", lora__rank=2, steps=5)
    run(config, tiny_wan, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(config, tiny_wan, tmp_path / "cut", on_log=stop_after(3))
    run(config, tiny_wan, tmp_path / "cut", resume=True)
    # Tensors, not bytes: safetensors writes its metadata in no fixed order.
    name = "lora/pytorch_lora_weights.safetensors"
    assert equal(load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tiny_wan, tmp_path, whole, kind):
    def report(entry):
        if entry.step == 3:
            os.kill(os.getpid(), kind)

    with pytest.raises(KeyboardInterrupt):
        run(small_config(**FULL), tiny_wan, tmp_path, on_log=report)
    assert Checkpoints(tmp_path / "checkpoints").latest().name == "step-00000003"
    run(small_config(**FULL), tiny_wan, tmp_path, resume=True)
    assert same(tmp_path, whole)


def test_a_begun_run_is_not_overwritten(tiny_wan, whole):
    with pytest.raises(ValueError, match="--resume"):
        run(small_config(**FULL), tiny_wan, whole)


def test_a_run_that_goes_on_elsewhere_keeps_its_folder(tiny_wan, tmp_path):
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ValueError, match="another run writes to"),
    ):
        run(small_config(), tiny_wan, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_changes_are_named_and_refused_unless_allowed(tiny_wan, tmp_path):
    run(small_config(steps=2), tiny_wan, tmp_path)
    changed = small_config(steps=3, optim__lr=2e-3)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 -> 0\.002.*steps: 2 -> 3.*allow"):
        run(changed, tiny_wan, tmp_path, resume=True)
    run(changed, tiny_wan, tmp_path, resume=True, allow_changes=True)
    assert read_state(Checkpoints(tmp_path / "checkpoints").latest())["step"] == 3


def test_settings_of_the_optimiser_may_change(tiny_wan, tmp_path):
    run(small_config(steps=2), tiny_wan, tmp_path)
    values = {"weight_decay": 0.5, "betas": (0.5, 0.6), "eps": 1e-3}
    config = small_config(steps=3, **{f"optim__{name}": value for name, value in values.items()})
    prepared = prepare(config, load_parts(tiny_wan), make_clips(odd=True))
    assert Trainer(prepared, tmp_path).resume(allow_changes=True) == 2
    (group,) = prepared.optimizer.param_groups
    assert {name: tuple(v) if name == "betas" else v for name, v in group.items()}.items() >= (
        values.items()
    )


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 4)])
def test_weights_of_another_kind_are_refused(tiny_wan, tmp_path, before, after):
    run(small_config(steps=1, lora__rank=before), tiny_wan, tmp_path)
    with pytest.raises(ValueError, match=r"holds other weights .*lora settings"):
        run(
            small_config(steps=2, lora__rank=after),
            tiny_wan,
            tmp_path,
            resume=True,
            allow_changes=True,
        )


def test_a_checkpoint_before_the_first_update_is_no_update(tiny_wan, tmp_path):
    config = small_config()
    trainer = Trainer(prepare(config, load_parts(tiny_wan), make_clips()), tmp_path)
    trainer._update(False)
    trainer.step = 1
    trainer._save()
    assert not trainer.run.optimizer.state
    again = Trainer(prepare(config, load_parts(tiny_wan), make_clips()), tmp_path)
    assert again.resume() == 1 and again.skipped == 1
    assert not again.run.optimizer.state


def test_steps_skipped_in_a_row_are_counted_on(tiny_wan, tmp_path):
    config = small_config(max_skipped=2)
    trainer = Trainer(prepare(config, load_parts(tiny_wan), make_clips()), tmp_path)
    trainer._update(False)
    trainer.step = 1
    trainer._save()
    again = Trainer(trainer.run, tmp_path)
    assert again.resume() == 1 and again.skipped_in_a_row == 1
    with pytest.raises(ValueError, match="no finite loss in 2 steps in a row"):
        again._update(False)
    # A checkpoint of an older version does not have the count.
    path = again.checkpoints.latest() / "state.json"
    state = json.loads(path.read_text())
    del state["skipped_in_a_row"], state["hash"]
    path.write_text(json.dumps(state))
    again.resume()
    assert again.skipped_in_a_row == 0


def test_an_average_that_is_newly_wanted_starts_from_the_weights(tiny_wan, tmp_path):
    run(small_config(steps=2), tiny_wan, tmp_path)
    reached = weights(tmp_path)
    averaged = small_config(steps=2, ema=0.9)
    run(averaged, tiny_wan, tmp_path, resume=True, allow_changes=True)
    assert equal(weights(tmp_path), reached)


def test_an_average_that_is_lost_is_not_made_up(tiny_wan, tmp_path):
    run(small_config(steps=2, ema=0.9), tiny_wan, tmp_path)
    (Checkpoints(tmp_path / "checkpoints").latest() / "average.safetensors").unlink()
    with pytest.raises(ValueError, match="damaged checkpoint"):
        run(small_config(steps=2, ema=0.9), tiny_wan, tmp_path, resume=True)


def test_other_data_may_follow_when_changes_are_allowed(tiny_wan, tmp_path):
    run(small_config(steps=2), tiny_wan, tmp_path)
    config = small_config(steps=3, data__batch=2)
    train(config, tiny_wan, tmp_path, dataset=make_clips(5), resume=True, allow_changes=True)
    assert read_state(Checkpoints(tmp_path / "checkpoints").latest())["step"] == 3


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best=True)
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 4.0], start=1):
        checkpoints.save(step, {"validation": loss}, lambda folder: None)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "4", "5"]


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in (".step-00000001.old", ".step-00000002.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    Checkpoints(tmp_path).save(3, {"validation": None}, lambda folder: None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_only_names_of_eight_digits_are_checkpoints(tiny_wan, tmp_path):
    config = small_config(steps=3, checkpoint__every=1, checkpoint__keep=1, checkpoint__best=False)
    folder = tmp_path / "checkpoints"
    kept = ("step-00000003-good", "step-00000004.bak", "step-9", ".step-mine", "step-99999999.tmp")
    for name in kept:
        (folder / name).mkdir(parents=True)
        (folder / name / "mine.txt").touch()
    (folder / "step-00000008").touch()
    run(config, tiny_wan, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        (*kept, "step-00000003", "step-00000008")
    )
    assert all((folder / name / "mine.txt").exists() for name in kept)
    assert Checkpoints(folder).latest() == folder / "step-00000003"
    run(config, tiny_wan, tmp_path, resume=True)


@pytest.fixture(scope="module")
def saved(tiny_wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run(small_config(steps=2, ema=0.9, checkpoint__every=1), tiny_wan, folder)
    return folder


def resume_after(change, model, saved, folder):
    """Resume a copy of a run whose newest checkpoint was changed."""
    shutil.copytree(saved, folder)
    change(folder / "checkpoints" / "step-00000002")
    return run(small_config(steps=2, ema=0.9, checkpoint__every=1), model, folder, resume=True)


FILES = ("model.safetensors", "average.safetensors", "optimizer.pt", "random.pt", "state.json")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named_and_the_checkpoint_before_it_offered(
    tiny_wan, tmp_path, saved, name
):
    def flip(checkpoint):
        content = bytearray((checkpoint / name).read_bytes())
        place = content.index(b'"seconds": ') + 13 if name == "state.json" else len(content) // 2
        content[place] ^= 1
        (checkpoint / name).write_bytes(content)

    match = (
        rf"step-00000002/{name} is damaged: .*Remove .*step-00000002 to continue from step-00000001"
    )
    with pytest.raises(ValueError, match=match) as error:
        resume_after(flip, tiny_wan, saved, tmp_path / "run")
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    again = small_config(steps=2, ema=0.9, checkpoint__every=1)
    run(again, tiny_wan, tmp_path / "run", resume=True)
    assert same(tmp_path / "run", saved)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1], "expected an object, got list"),
        ({"step": 10**9}, "step must be the number in the folder's name, got 1000000000"),
        ({"step": -2}, "got -2"),
        ({"step": "2"}, "got '2'"),
        ({"step": True}, "got True"),
        ({"seconds": "long"}, "seconds has a value of the wrong type, 'long'"),
        ({"seconds": float("nan")}, "seconds must be 0 or more, got nan"),
        ({"skipped": -1}, "skipped must be 0 or more"),
        ({"best": []}, "best has a value of the wrong type"),
        ({"feed": None}, "feed has a value of the wrong type"),
        ({"files": {"../../config.json": ""}}, "files of other folders"),
        ({"config": 3}, "config has a value of the wrong type"),
    ],
)
def test_an_odd_state_is_one_line(tiny_wan, tmp_path, saved, values, words):
    def change(checkpoint):
        path = checkpoint / "state.json"
        state = json.loads(path.read_text())
        # Written by hand, or by an earlier version: without a hash.
        del state["hash"]
        path.write_text(json.dumps(values if isinstance(values, list) else state | values))

    with pytest.raises(ValueError) as error:
        resume_after(change, tiny_wan, saved, tmp_path / "run")
    assert words in str(error.value) and "step-00000001" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_odd_checkpoint_does_not_end_the_run_that_prunes_it(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "state.json").write_text("{")
    Checkpoints(tmp_path, keep=1).save(2, {"validation": 1.0}, lambda folder: None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_checkpoints_without_hashes_are_taken(tiny_wan, tmp_path, saved):
    def change(checkpoint):
        path = checkpoint / "state.json"
        state = json.loads(path.read_text())
        del state["hash"], state["files"]
        path.write_text(json.dumps(state))

    resume_after(change, tiny_wan, saved, tmp_path / "run")


def test_a_checkpoint_past_the_last_step_is_refused(tiny_wan, tmp_path, saved):
    shutil.copytree(saved, tmp_path / "run")
    shorter = small_config(steps=1, ema=0.9, checkpoint__every=1)
    with pytest.raises(ValueError, match=r"step-00000002 is past the end: steps=1"):
        run(shorter, tiny_wan, tmp_path / "run", resume=True, allow_changes=True)


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, best=True)
    for step, loss in enumerate([float("nan"), 0.5, -float("inf"), 0.9], start=1):
        checkpoints.save(step, {"validation": loss}, lambda folder: None)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "4"]


def test_a_better_validation_loss_is_saved_at_once(tiny_wan, tmp_path):
    config = small_config(steps=7, checkpoint__every=100, checkpoint__keep=1, watch__validate=2)
    entries = []
    run(config, tiny_wan, tmp_path, on_log=entries.append)
    losses = {e.step: e.numbers["validation"] for e in entries if "validation" in e.numbers}
    assert list(losses) == [2, 4, 6, 7]
    best = min(losses, key=losses.get)
    kept = {int(path.name[-1]): path for path in (tmp_path / "checkpoints").iterdir()}
    assert set(kept) == {best, 7}
    assert read_state(kept[best])["validation"] == pytest.approx(losses[best])


def test_a_failed_write_keeps_the_last_good_checkpoint(tiny_wan, tmp_path, monkeypatch, whole):
    real = checkpoint_module._sync

    def fail(path):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(checkpoint_module, "_sync", fail)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(small_config(**FULL), tiny_wan, tmp_path)
    messages = [str(warning.message) for warning in said]
    assert any("No space left" in text and "step-00000002 is the last" in text for text in messages)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000006",
    ]
    assert same(tmp_path, whole)


def test_a_failed_write_at_the_end_is_an_error(tiny_wan, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_sync", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SaveFailed, match="there is none yet"):
            run(small_config(steps=2), tiny_wan, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_result_that_cannot_be_written_loses_nothing(tiny_wan, tmp_path, monkeypatch, whole):
    from safetensors import SafetensorError

    def fail(self, folder):
        folder.mkdir()
        raise SafetensorError("Error while serializing: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("diffusers.WanTransformer3DModel.save_pretrained", fail)
        with pytest.raises(SaveFailed, match=r"No space left.*step-00000006 has .*--resume"):
            run(small_config(**FULL), tiny_wan, tmp_path)
    assert not [path for path in tmp_path.iterdir() if "pipeline" in path.name]
    run(small_config(**FULL), tiny_wan, tmp_path, resume=True)
    assert same(tmp_path, whole)


def test_a_full_disk_ends_no_log_and_no_sample(tiny_wan, tmp_path, monkeypatch):
    from nabla_attn.training import metrics

    class Full:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

        close = add_scalar

    def sample(step, transformer):
        raise OSError(28, "No space left on device")

    append, failures = metrics.MetricsLogger._append, []

    def fail_once(self, row):
        if not failures:
            failures.append(row)
            # What a full disk takes of a row.
            with self._path.open("a") as file:
                file.write("step,lo")
            raise OSError(28, "No space left on device")
        append(self, row)

    monkeypatch.setattr(metrics, "_summary_writer", lambda *_: Full())
    monkeypatch.setattr(metrics.MetricsLogger, "_append", fail_once)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = small_config(steps=3, watch__tensorboard=True)
        run(config, tiny_wan, tmp_path, sample=sample)
    messages = " ".join(str(warning.message) for warning in said)
    assert "tensorboard's log ends: No space left" in messages
    assert "sample of step 3 not written" in messages
    assert [row["step"] for row in metrics.read_log(tmp_path)] == ["1", "2", "3"]


def test_steps_without_a_finite_loss_change_nothing(tiny_wan, tmp_path, monkeypatch):
    advance, seen = Trainer._update, []

    def poisoned(self, is_finite):
        before = [p.detach().clone() for p in self.run.trained()]
        if self.step == 1:
            is_finite = False
        advance(self, is_finite)
        changed = any(
            not torch.equal(a, b) for a, b in zip(before, self.run.trained(), strict=True)
        )
        seen.append(changed)

    monkeypatch.setattr(Trainer, "_update", poisoned)
    run(small_config(steps=3), tiny_wan, tmp_path)
    assert seen == [True, False, True]


def test_nan_latents_are_skipped_counted_and_stop_at_last(tiny_wan, tmp_path):
    clips = make_clips(4)
    sound = clips.__class__.__getitem__

    class Broken(clips.__class__):
        def __getitem__(self, index):
            item = sound(self, index)
            if index % 2:
                item["latents"][0, 0, 0, 0] = float("nan")
            return item

    entries = []
    config = small_config(steps=8, data__validation=0, checkpoint__every=1)
    train(config, tiny_wan, tmp_path / "some", dataset=Broken(clips.shapes), on_log=entries.append)
    assert entries[-1].numbers["skipped"] == 4
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "some").values())
    with pytest.raises(ValueError, match="no finite loss in 2 steps in a row"):
        train(
            small_config(steps=8, max_skipped=2, data__validation=0),
            tiny_wan,
            tmp_path / "all",
            dataset=Broken((clips.shapes[0],) * 2),
            on_log=lambda entry: None,
        )


KILLED = {"steps": 12, "ema": 0.9, "checkpoint__every": 1}


def kill_and_resume(model, folder, kills):
    """Start, kill at a random moment of the training, start again; then let it end."""
    rng = random.Random(0)
    done = 0
    for _ in range(kills):
        process = start_process(train_clips, model, folder, KILLED, {"resume": True})
        while process.is_alive() and not (folder / "config.json").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.join()
        (folder / "config.json").unlink(missing_ok=True)
        latest = Checkpoints(folder / "checkpoints").latest()
        if latest:
            step = read_state(latest)["step"]
            assert step >= done
            done = step
    process = start_process(train_clips, model, folder, KILLED, {"resume": True})
    process.join()
    assert process.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def unkilled(tiny_wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unkilled")
    train_clips(tiny_wan, folder, KILLED, {})
    return folder


def test_killed_three_times_the_run_ends_the_same(tiny_wan, tmp_path, unkilled):
    assert same(kill_and_resume(tiny_wan, tmp_path / "run", 3), unkilled)


@pytest.mark.slow
def test_killed_twenty_times_the_run_ends_the_same(tiny_wan, tmp_path, unkilled):
    assert same(kill_and_resume(tiny_wan, tmp_path / "run", 20), unkilled)
