import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nabla_attn.config import parse
from nabla_attn.evaluation.probe import AttentionProbe
from nabla_attn.generation.generate import generate
from nabla_attn.generation.map_file import (
    SCORE_BITS,
    RecordedMaps,
    Selection,
    choose_recorded,
    spread,
)
from nabla_attn.generation.map_recorder import MapRecorder, to_bytes
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.head_rules import Rule
from nabla_attn.schedule import Schedule

REQUEST = GenerationRequest(
    prompt="a red circle", height=144, width=176, frames=5, steps=3, sparse_algo="nabla-0.4"
)


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def recorded(pipeline):
    recorder = MapRecorder(pipeline, REQUEST, steps=(0, 2))
    frames, record = generate(pipeline, REQUEST, on_apply=recorder.attach)
    return frames, record, recorder.result()


def test_a_recording_agrees_with_the_run(recorded):
    _, record, maps = recorded
    assert maps.selection == Selection((0, 2), (0, 1), (0, 1))
    assert maps.density.shape == (3, 2, 2)
    assert maps.grid == tuple(record.numbers["tokens"].values())
    # Telemetry averages both calls of guidance, the recording holds the prompted one.
    per_step = np.array(record.numbers["attention"]["density_per_step_and_layer"])
    assert np.abs(maps.density.mean(-1).numpy() - per_step).max() < 0.2
    assert ((maps.true_mass > 0) & (maps.true_mass <= 1.0001)).all()
    assert (maps.best_mass >= maps.true_mass - 1e-5).all()
    counts = torch.tensor(maps.mask(0, 0, 0).sum(axis=1))
    assert (counts >= 1).all()


def test_maps_have_the_blocks_of_the_algorithm(pipeline):
    wanted = replace(REQUEST, sparse_algo="nabla-0.4_block-2-4-16")
    recorder = MapRecorder(pipeline, wanted)
    generate(pipeline, wanted, on_apply=recorder.attach)
    maps = recorder.result()
    assert maps.grid == (2, 9, 11) and maps.block == (2, 4, 16) and maps.blocks == (1, 3, 1)
    assert maps.mask(0, 0, 0).shape == (3, 3)
    mixed = Schedule(algorithm=parse("nabla-0.4"), layer_overrides={0: parse(wanted.sparse_algo)})
    with pytest.raises(ValueError, match=r"recorded in one block shape: got nabla-0.4; layer 0"):
        MapRecorder(pipeline, replace(REQUEST, schedule=mixed))


def test_recording_changes_nothing(pipeline, recorded):
    frames, _ = generate(pipeline, REQUEST)
    assert np.array_equal(frames, recorded[0])


def test_scores_and_maps_tell_the_same(recorded):
    maps = recorded[2]
    bits = maps.scores[0, 0, 0].numpy() / 255 - 1
    scores = 2.0 ** (bits * SCORE_BITS)
    assert scores.sum(axis=1) == pytest.approx(1, abs=0.04)
    kept = maps.mask(0, 0, 0)
    assert (scores * kept).sum(axis=1).min() > 0.38  # nabla-0.4, within a byte's precision
    for row, keep in zip(scores, kept, strict=True):
        if not keep.all():
            assert row[keep].min() >= row[~keep].max() * 0.999


def test_saved_and_read_back(recorded, tmp_path):
    maps = recorded[2]
    maps.save(tmp_path / "a.maps.safetensors")
    back = RecordedMaps.load(tmp_path / "a.maps.safetensors")
    assert back.selection == maps.selection
    assert torch.equal(back.masks, maps.masks)
    assert torch.equal(back.true_mass, maps.true_mass)
    assert back.blocks == maps.blocks


def test_dense_steps_are_dense_in_the_recording(pipeline):
    from dataclasses import replace

    from nabla_attn import Schedule

    schedule = Schedule(algorithm=Schedule.default("nabla-0.4").algorithm, dense_first_steps=2)
    request = replace(REQUEST, schedule=schedule)
    recorder = MapRecorder(pipeline, request)
    generate(pipeline, request, on_apply=recorder.attach)
    maps = recorder.result()
    assert (maps.density[:2] == 1).all()
    assert (maps.density[2] < 1).any()
    assert maps.mask(0, 0, 0).all()
    nothing = MapRecorder(pipeline, request)
    all_dense = replace(REQUEST, schedule=replace(schedule, dense_first_steps=3))
    with pytest.warns(UserWarning, match="changes nothing"):
        generate(pipeline, all_dense, on_apply=nothing.attach)
    with pytest.raises(ValueError, match="dense throughout"):
        nothing.result()


def test_the_selection_fits_or_says_why():
    counts = (50, 40, 40)
    small = choose_recorded(counts, 60)
    assert (small.steps, small.layers) == ((0, 12, 24, 37, 49), (0, 8, 16, 23, 31, 39))
    large = choose_recorded(counts, 1260)
    assert 0 < large.num_bytes(1260) <= 3_300_000
    assert choose_recorded(counts, 60, steps=(3,)).steps == (3,)
    with pytest.raises(ValueError, match="Record fewer"):
        choose_recorded(counts, 1260, steps=(0, 1), layers=(0, 1), heads=tuple(range(40)))
    with pytest.raises(ValueError, match="steps to record must be in 0 to 49"):
        choose_recorded(counts, 60, steps=(50,))
    assert spread(1, 5) == (0,)
    assert spread(3, 5) == (0, 1, 2)


def test_bytes_of_scores():
    scores = torch.tensor([1.0, 0.5, 1e-3, 2.0**-24, 0.0])
    coded = to_bytes(scores)
    assert coded[0] == 255
    assert coded[3] == coded[4] == 0
    decoded = 2.0 ** ((coded[:3] / 255 - 1) * SCORE_BITS)
    assert decoded == pytest.approx(scores[:3].numpy(), rel=0.034)


def test_damaged_recordings_are_named(recorded, tmp_path):
    path = tmp_path / "bad.maps.safetensors"
    with pytest.raises(ValueError, match=r"bad\.maps"):
        RecordedMaps.load(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match=r"bad\.maps"):
        RecordedMaps.load(path)
    from safetensors.torch import save_file

    recorded[2].save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["maps"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    chosen = meta["selection"]
    changes = [{"schema": 9}, {"blocks": [9, 9, 9]}, {"selection": {"steps": [99]}}, {"x": 1}]
    changes += [{"selection": chosen | {"has_scores": "no"}}, {"selection": [1]}, {"blocks": [1]}]
    changes += [{"grid": [10**30, 1, 1]}, {"grid": [1.5, 8, 8]}, {"block": [0, 8, 8]}]
    changes += [{"block": [float("nan")] * 3}, {"algorithm": 7}, {"schema": [[]]}]
    texts = [json.dumps(meta | change) for change in changes]
    texts += ["[" * 10**5, "{" + 10**4 * '"a": {' + 10**4 * "}" + "}", "1" * 5000, "null", "[]"]
    for text in texts:
        save_file(tensors, path, metadata={"maps": text})
        with pytest.raises(ValueError, match=r"bad\.maps"):
            RecordedMaps.load(path)
    odd = {"masks": tensors["masks"].float(), "density": tensors["density"].double()}
    for name, value in odd.items():
        save_file(tensors | {name: value}, path, metadata={"maps": json.dumps(meta)})
        with pytest.raises(ValueError, match=r"bad\.maps.* must be"):
            RecordedMaps.load(path)


def test_heads_with_algorithms_of_their_own_are_recorded_in_their_places(pipeline):
    rules = (Rule(algorithm=parse("topk-0.1"), layers=(0,), heads=(1,), steps=(0,)),)
    schedule = Schedule(algorithm=parse("nabla-0.4"), rules=rules)
    run = replace(REQUEST, schedule=schedule, steps=1)
    found = {}
    for name, wanted in {"mixed": run, "plain": replace(run, schedule=None)}.items():
        recorder, probe = MapRecorder(pipeline, wanted), AttentionProbe(num_steps=1)
        generate(pipeline, wanted, on_apply=recorder.attach)
        generate(pipeline, wanted, on_apply=probe.attach)
        found[name] = (recorder.result(), probe.result().values["density"])
    mixed, plain = found["mixed"], found["plain"]
    # The first layer of the first step sees the same tokens under both.
    assert np.array_equal(mixed[0].mask(0, 0, 0), plain[0].mask(0, 0, 0))
    assert not np.array_equal(mixed[0].mask(0, 0, 1), plain[0].mask(0, 0, 1))
    for maps, density in found.values():
        assert maps.density[0, 0, 0] == plain[0].density[0, 0, 0]
        assert density[0, 0, 0] == plain[1][0, 0, 0]
    assert mixed[0].density[0, 0, 1] < plain[0].density[0, 0, 1]
    assert mixed[1][0, 0, 1] < plain[1][0, 0, 1]
