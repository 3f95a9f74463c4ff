import random

import pytest
import torch
from tests.tiny_diffusers import tiny_wan_transformer

import nabla_attn as na
from nabla_attn.training.data.batches import PackSampler, collate_packed
from nabla_attn.training.families import Family, find_family
from nabla_attn.training.setup import let_pack


class WanPipeline:
    pass


FAMILY = find_family(WanPipeline, {})
LENGTHS = (3, 1, 2)


def item(seed, frames, text=5):
    draw = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(4, frames, 34, 22, generator=draw),
        "conditions": {"encoder_hidden_states": torch.randn(text, 16, generator=draw)},
        "empty": {"encoder_hidden_states": torch.zeros(4, 16)},
        "caption": str(seed),
    }


ITEMS = [item(seed, frames) for seed, frames in enumerate(LENGTHS)]


def run(model, batch):
    timestep = torch.full((1,), 300.0)
    arguments = FAMILY.inputs(batch["latents"], timestep, batch["conditions"])
    return model(**arguments, return_dict=False)[0]


@pytest.mark.parametrize(
    "algo", ["dense", "nabla-1", "nabla-0.5", "sta-3-1-1", "topk-0.3_sta-1-1-1"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_clip_is_what_it_is_alone(algo, checkpointing):
    model = tiny_wan_transformer().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    with na.apply(model, "nabla-0.9") as handle:
        let_pack(model, FAMILY)
        handle.set_schedule(na.Schedule(algorithm=na.parse(algo)))
        together, packed_gradient = run_backward(model, [ITEMS])
        alone, gradient = run_backward(model, [[one] for one in ITEMS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-3, atol=1e-3)


def run_backward(model, packs):
    """Outputs along frames, and the sum of the gradients; each pack is forward, then backward."""
    model.zero_grad()
    outs = []
    for items in packs:
        out = run(model, collate_packed(items, 0.0, random.Random(0)))
        out.square().sum().backward()
        outs.append(out.detach())
    return torch.cat(outs, dim=2), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_without_the_segments_clips_do_see_each_other():
    model = tiny_wan_transformer().train()
    with na.apply(model, "nabla-1"):
        let_pack(model, FAMILY)
        batch = collate_packed(ITEMS, 0.0, random.Random(0))
        apart = run(model, batch)
        del batch["conditions"]["segments"], batch["conditions"]["texts"]
        assert (run(model, batch) - apart).abs().max() > 1e-3


def test_dropped_captions():
    batch = collate_packed(ITEMS, 1.0, random.Random(0))
    assert batch["conditions"]["encoder_hidden_states"].shape == (1, 12, 16)
    assert batch["conditions"]["texts"].tolist() == [[4, 4, 4]]
    assert batch["conditions"]["segments"].tolist() == [list(LENGTHS)]


def test_other_families_are_refused():
    with pytest.raises(ValueError, match="LTXPipeline cannot train on packed clips"):
        let_pack(tiny_wan_transformer(), Family(pipeline="LTXPipeline"))


SHAPES = [(4, frames, 2, 2) for frames in (5, 3, 1, 1, 2, 4, 8)] + [(4, 3, 6, 2)] * 3


def test_packs_hold_every_clip_and_no_more_than_fits():
    sampler = PackSampler(SHAPES, 8, 2, seed=3)
    epochs = [list(sampler), list(sampler)]
    assert epochs[0] != epochs[1]
    for batches in epochs:
        packs = [one for batch in batches for one in batch]
        assert all(len(batch) == 2 for batch in batches)
        assert {index for one in packs for index in one} == set(range(len(SHAPES)))
        for one in packs:
            assert sum(SHAPES[index][1] for index in one) <= 8
            assert len({SHAPES[index][2:] for index in one}) == 1
    # Six frames of 6x2 are more than eight of 2x2.
    assert {SHAPES[index] for index in sampler.largest()} == {(4, 3, 6, 2)}
    again = PackSampler(SHAPES, 8, 2, seed=3)
    first = iter(again)
    assert [next(first), next(first)] == epochs[0][:2]
    other = PackSampler(SHAPES, 8, 2, seed=3)
    other.load_state_dict(again.state_dict())
    assert list(other) == epochs[0][2:]
    with pytest.raises(ValueError, match=r"8 latent frames does not fit data\.pack=7"):
        PackSampler(SHAPES, 7, 2)


def test_a_run_on_packed_clips_learns(tiny_wan, tmp_path):
    from tests.training.clips import Clips, small_config

    from nabla_attn.training.train import train

    shapes = tuple((4, frames, 16, 16) for frames in (1, 3, 2, 5, 1, 2, 4, 1, 3, 1))
    values = dict(model=str(tiny_wan), data__pack=6, steps=30, optim__lr=3e-3, accumulation=2)
    config = small_config("finetune", **values)
    train(config, tiny_wan, tmp_path / "run", dataset=Clips(shapes))
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    place = rows[0].split(",").index("loss")
    losses = [float(row.split(",")[place]) for row in rows[1:]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_check_shows_the_largest_pack(tiny_wan, tmp_path):
    from tests.training.clips import Clips, small_config

    from nabla_attn.training.check import check
    from nabla_attn.training.model import load_parts
    from nabla_attn.training.setup import prepare

    config = small_config(data__pack=6, data__validation=0)
    run = prepare(config, load_parts(tiny_wan), Clips(((4, 2, 16, 16),) * 3))
    shown = check(run, tmp_path)
    assert shown["largest"] == "384 tokens, latents 4x6x16x16"
    assert shown["steps"].endswith("1 pack each")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data__batch": 2}, r"data\.batch=1"),
        ({"sparsity__algorithm": "dense"}, "nabla-1"),
        ({"compile": True}, "compile"),
        ({"recipe": "distill"}, r"lora\.rank"),
    ],
)
def test_what_packing_does_not_go_with(values, words):
    from tests.training.clips import small_config

    with pytest.raises(ValueError, match=words):
        small_config(**values, data__pack=8)
