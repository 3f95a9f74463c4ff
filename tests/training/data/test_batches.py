import random
from collections import Counter

import pytest
import torch

from nabla_attn.training.data import BucketSampler, collate

SHAPES = [(1, 2)] * 7 + [(3, 4)] * 5 + [(5, 6)]


def epoch(sampler):
    return list(iter(sampler))


def test_every_sample_is_in_every_epoch_and_batches_have_one_shape():
    sampler = BucketSampler(SHAPES, 2, seed=1)
    first, second = epoch(sampler), epoch(sampler)
    assert first != second and sampler.epoch == 2
    for batches in (first, second):
        assert len(batches) == len(sampler) == 4 + 3 + 1
        assert {index for batch in batches for index in batch} == set(range(13))
        assert all(len(batch) == 2 for batch in batches)
        assert all(len({SHAPES[index] for index in batch}) == 1 for batch in batches)
    assert epoch(BucketSampler(SHAPES, 2, seed=1)) == first
    assert epoch(BucketSampler(SHAPES, 2, seed=2)) != first


@pytest.mark.parametrize("num_processes", [2, 3])
def test_ranks_share_the_work_and_see_one_shape_at_a_time(num_processes):
    ranks = [
        epoch(BucketSampler(SHAPES, 2, 7, rank, num_processes)) for rank in range(num_processes)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    for step in zip(*ranks, strict=True):
        assert len({SHAPES[index] for batch in step for index in batch}) == 1
    seen = Counter(index for batches in ranks for batch in batches for index in batch)
    assert seen.keys() == set(range(13))


@pytest.mark.parametrize("stop", [0, 1, 5, 8, 11])
def test_a_resumed_order_is_the_uninterrupted_one(stop):
    def stream(sampler):
        while True:
            yield from sampler

    whole = stream(BucketSampler(SHAPES, 2, seed=4))
    wanted = [next(whole) for _ in range(20)]
    sampler = BucketSampler(SHAPES, 2, seed=4)
    batches = stream(sampler)
    for _ in range(stop):
        next(batches)
    state = dict(sampler.state_dict())
    again = BucketSampler(SHAPES, 2, seed=4)
    again.load_state_dict(state)
    rest = stream(again)
    assert [next(rest) for _ in range(20 - stop)] == wanted[stop:]


def test_states_of_other_data_are_refused():
    state = BucketSampler(SHAPES, 2, seed=4).state_dict()
    for other in (BucketSampler(SHAPES[1:], 2, 4), BucketSampler(SHAPES, 2, 5)):
        with pytest.raises(ValueError, match="cannot be continued"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], 1), "no samples"),
        ((SHAPES, 0), "batch_size"),
        ((SHAPES, 1, 0, 2, 2), "process_index 2"),
        ((SHAPES[:2], 1, 0, 0, 3), "more processes than samples: 3 for 2"),
    ],
)
def test_bad_numbers(arguments, words):
    with pytest.raises(ValueError, match=words):
        BucketSampler(*arguments)


def item(value, length=3):
    text = torch.full((length, 2), float(value))
    conditions = {"text": text, "positions.0": torch.arange(4)}
    return {
        "latents": torch.full((4, 2, 2, 2), float(value)),
        "conditions": conditions,
        "empty": conditions | {"text": torch.zeros(3, 2)},
        "caption": str(value),
    }


def test_collate_drops_captions_as_often_as_asked():
    items = [item(value) for value in range(1, 201)]
    batch = collate(items, 0.25, random.Random(0))
    assert batch["latents"].shape == (200, 4, 2, 2, 2)
    text = batch["conditions"]["text"][:, 0, 0]
    dropped = (text == 0).sum().item()
    assert 30 < dropped < 70
    assert torch.equal(text[text != 0], torch.arange(1.0, 201.0)[text != 0])
    again = collate(items, 0.25, random.Random(0))
    assert torch.equal(again["conditions"]["text"], batch["conditions"]["text"])
    for drop, count in ((0.0, 0), (1.0, 200)):
        text = collate(items, drop, random.Random(0))["conditions"]["text"]
        assert (text[:, 0, 0] == 0).sum() == count


def test_collate_names_what_differs():
    with pytest.raises(ValueError, match="text of one batch differ"):
        collate([item(1), item(2, length=5)], 0.0, random.Random(0))
