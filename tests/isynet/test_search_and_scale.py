"""Search and scaling: within the band, recorded, and the same after a kill."""

import json
import os
import random
import signal

import pytest
from tests.isynet.test_space_and_latency import CountingTimer
from tests.processes import exit_codes, start_process

import isynet
from isynet.data.catalogue import open_source
from isynet.evolution import SearchPlan, search
from isynet.growth import ScalePlan, measure_gains, scale, scale_evenly
from isynet.latency import Conditions, LatencyTable
from isynet.runs import load_best
from isynet.space import SearchSpace
from isynet.training.recipe import Recipe
from isynet.training.trial import split, train_briefly
from nabla_attn.record import RunRecord

SPACE = SearchSpace(
    (2,), ("1", "3"), max_edges=2, max_blocks=2, widths=(0,), expansions=(1,), heads=(0, 32)
)
PLAN = SearchPlan(population=4, generations=2, parents=2, rungs=2, keep=2, growth=2, validation=32)
RECIPE = Recipe(steps=2, batch=8, warmup=0, augment=0)
BAND = (4e-4, 8e-4)


def table(folder=None):
    path = folder / "latency.json" if folder else None
    return LatencyTable(Conditions(16, num_classes=18), CountingTimer(), path)


def run_search(folder, on_progress=lambda *_: None, seed=0):
    return search(
        SPACE,
        open_source("shapes", "train", 16),
        table(folder),
        latency=BAND,
        folder=folder,
        recipe=RECIPE,
        plan=PLAN,
        seed=seed,
        on_progress=on_progress,
    )


def results(folder):
    numbers = {}
    for file in [*sorted(folder.rglob("trials/*.json")), folder / "search.json"]:
        record = RunRecord.load(file)
        numbers[file.name] = (record.config, record.numbers)
    return numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_search(folder)


def test_a_search_stays_within_its_band_and_records_all(whole):
    folder, found = whole
    assert len(found.candidates) == 8
    for candidate in found.candidates:
        assert BAND[0] <= table().seconds(candidate.architecture) <= BAND[1]
    ranks = [candidate.rank for candidate in found.candidates]
    assert ranks == sorted(ranks, reverse=True) and ranks[0][0] == 1
    assert sum(candidate.rung == 1 for candidate in found.candidates) == 4
    assert len(results(folder)) == 13
    assert load_best(folder) == found.best


def search_and_die(folder, count):
    """The process kills itself at that candidate."""

    def die(_, done, __):
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)

    run_search(folder, die)


def test_a_search_that_is_killed_gives_the_same_result(whole, tmp_path):
    folder, _ = whole
    (code,) = exit_codes([start_process(search_and_die, tmp_path, 7)])
    assert code == -signal.SIGKILL and not (tmp_path / "search.json").exists()
    assert len(list((tmp_path / "trials").iterdir())) == 7
    run_search(tmp_path)
    assert results(tmp_path) == results(folder)


def test_pictures(whole, tmp_path):
    from PIL import Image

    from isynet.evolution import Candidate
    from isynet.pictures import draw_front, draw_mem, find_front

    draw_front(whole[1].candidates, tmp_path / "front.png")
    draw_mem(isynet.create("1x3 2x3,1+ h0", 5), tmp_path / "mem.png", size=32)
    for name in ("front", "mem"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 400
    architecture = isynet.parse("1x3")
    rows = [(3, 0.7), (1, 0.5), (2, 0.5), (4, 0.9), (5, 0.8)]
    tried = [Candidate(architecture, 0, accuracy, 0.0, seconds) for seconds, accuracy in rows]
    assert [each.seconds for each in find_front(tried)] == [1, 3, 4]


def test_a_narrow_band_far_below_the_space_measures_few_networks(tmp_path):
    from isynet.evolution import _draw

    space, timer = SearchSpace(), CountingTimer()
    latencies = LatencyTable(Conditions(32), timer)
    middle = min(latencies.seconds(space.sample(random.Random(seed))) for seed in range(30)) / 2
    before, plan = len(latencies.entries), SearchPlan(population=4)
    drawn = _draw(space, latencies, (0.9 * middle, 1.1 * middle), plan, {}, 0, 0)
    assert len(set(drawn)) == 4
    # Of random networks not one in a hundred lies in the band, each of about seven entries.
    assert len(latencies.entries) - before < 200


def test_another_search_in_the_same_folder_is_refused(whole):
    with pytest.raises(ValueError, match="another seed"):
        run_search(whole[0], seed=1)


def test_changed_trials_are_refused(whole, tmp_path):
    import shutil

    shutil.copytree(whole[0], tmp_path / "copy")
    file = tmp_path / "copy" / "trials" / "000-0-001.json"
    data = json.loads(file.read_text())
    data["config"]["architecture"] = "1x3 1x3 h0"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"000-0-001\.json is of another trial"):
        run_search(tmp_path / "copy")


def test_an_empty_band_says_so_after_a_few_walks(tmp_path):
    with pytest.raises(ValueError, match=r"only 0 of 50 architectures take .* ms"):
        search(
            SPACE,
            open_source("shapes", "train", 16),
            table(),
            latency=(1.0, 2.0),
            folder=tmp_path,
            recipe=RECIPE,
            plan=PLAN,
        )
    with pytest.raises(ValueError, match="finished search"):
        load_best(tmp_path)


def test_held_out_images_are_not_trained_on():
    fit, held_out = split(open_source("shapes", "train", 16), 100, 0)
    assert len(fit) == 4096 - 100 and len(held_out) == 100
    assert not set(fit.indices.tolist()) & set(held_out.indices.tolist())
    with pytest.raises(ValueError, match="cannot be held out"):
        split(held_out, 100, 0)


def test_a_training_that_diverges_is_the_worst_and_no_error():
    fit, held_out = split(open_source("shapes", "train", 16), 32, 0)
    recipe = Recipe(steps=30, batch=8, warmup=0, learning_rate=1e30, augment=0)
    numbers = train_briefly(isynet.parse("1x3 h0"), recipe, fit, held_out, 0)
    assert numbers["accuracy"] == 0 and numbers["loss"] > 1e5


def test_scaling_buys_the_most_gain_for_its_milliseconds():
    architecture, latencies = isynet.parse("1x3 2x3,3+ 2x3,1+ h0"), table()
    base = latencies.seconds(architecture)
    (_, early), (_, late), _ = latencies.pieces(architecture)
    budgets = [base, base + 2.01 * early, base + 6 * late]
    small, medium, large = scale(architecture, [0.0, 1.0, 3.0], latencies, budgets)
    assert small.architecture == architecture and small.gain == 0
    for each in (medium, large):
        assert each.seconds <= each.budget
        assert each.architecture.num_blocks[0] == 1
        assert each.seconds == pytest.approx(latencies.seconds(each.architecture))
    assert 0 < medium.gain < large.gain
    even = scale_evenly(architecture, latencies, budgets[2])
    assert latencies.seconds(even) <= budgets[2] and even.num_blocks > architecture.num_blocks


def test_no_other_choice_of_blocks_gains_more():
    import itertools
    import math

    architecture, latencies, gains = isynet.parse("1x3 2x3,3+ h0"), table(), [1.0, 2.5]
    budget = 2.2 * latencies.seconds(architecture)
    (found,) = scale(architecture, gains, latencies, [budget])
    best = 0.0
    for counts in itertools.product(range(1, 18), range(2, 19)):
        if latencies.seconds(architecture.with_blocks(counts)) <= budget:
            pairs = zip(gains, counts, (1, 2), strict=True)
            best = max(best, sum(gain * math.log(new / old) for gain, new, old in pairs))
    assert found.gain == pytest.approx(best)


def test_scaling_refuses_what_cannot_be():
    architecture, latencies = isynet.parse("1x3 2x3,3+ h0"), table()
    with pytest.raises(ValueError, match="as many gains"):
        scale(architecture, [1.0], latencies, [1.0])
    with pytest.raises(ValueError, match="already"):
        scale(architecture, [1.0, 1.0], latencies, [1e-9])


def test_gains_are_measured_once(tmp_path):
    architecture = isynet.parse("1x3 1x3,1+ h0")
    seen = []

    def run():
        return measure_gains(
            architecture,
            open_source("shapes", "train", 16),
            folder=tmp_path,
            recipe=RECIPE,
            plan=ScalePlan((1,), 2, 32),
            on_progress=lambda stage, done, total: seen.append((done, total)),
        )

    gains = run()
    assert len(gains) == 2 and min(gains) >= 0 and seen[-1] == (6, 6)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "trials").iterdir()}
    assert run() == gains
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "trials").iterdir()} == files
