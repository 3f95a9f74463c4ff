import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import exit_codes, start_process
from tests.training.clips import train_clips

VALUES = {"steps": 3, "ema": 0.9, "data__batch": 1, "data__validation": 3}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_ranks(processes, model, folder, values):
    """Start as torchrun does: one process a rank."""
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        start_process(
            train_clips,
            model,
            folder,
            values,
            {"resume": True},
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(processes),
            **common,
        )
        for rank in range(processes)
    ]


def train_on(processes, model, folder, values):
    assert exit_codes(start_ranks(processes, model, folder, values)) == [0] * processes


def result(folder):
    return load_file(folder / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def losses(folder):
    lines = (folder / "log.csv").read_text().splitlines()
    places = [lines[0].split(",").index(name) for name in ("loss", "norm")]
    return [[float(line.split(",")[place]) for place in places] for line in lines[1:]]


@pytest.mark.parametrize("recipe", ["finetune", "distill"])
def test_two_processes_equal_one_that_accumulates(tiny_wan, tmp_path, recipe):
    values = VALUES | {"recipe": recipe}
    train_clips(tiny_wan, tmp_path / "one", values | {"accumulation": 2}, {})
    train_on(2, tiny_wan, tmp_path / "two", values)
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    start = load_file(tiny_wan / "transformer/diffusion_pytorch_model.safetensors")
    for name, value in one.items():
        # AdamW's first steps have the size of the learning rate whatever the gradient: compare
        # with how far training went.
        moved = (value - start[name]).abs().max()
        assert (two[name] - value).abs().max() <= 0.02 * moved + 1e-7
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    "values",
    [
        {"recipe": "finetune"},
        {"recipe": "distill", "objective__layer_weight": 1.0, "sparsity__algorithm": "nabla-0.4"},
    ],
)
def test_two_processes_that_share_a_sequence_equal_one(tiny_wan, tmp_path, values):
    values = VALUES | {"odd": False} | values
    train_clips(tiny_wan, tmp_path / "one", values, {})
    train_on(2, tiny_wan, tmp_path / "two", values | {"context_parallel": 2})
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=0
    )


def test_samples_of_the_first_process_hold_up_no_other(tiny_wan, tmp_path):
    train_on(2, tiny_wan, tmp_path, VALUES | {"sampled": True, "watch__sample": 1})
    assert "right" in (tmp_path / "log.csv").read_text().splitlines()[0]


@pytest.mark.slow
def test_shared_out_weights_give_and_take_the_checkpoints_of_whole_ones(tiny_wan, tmp_path):
    values = VALUES | {"checkpoint__every": 2, "watch__validate": 1}
    train_on(2, tiny_wan, tmp_path / "whole", values)
    train_on(2, tiny_wan, tmp_path / "shared", values | {"sharded": True})
    # Both go on from the checkpoint of the other.
    for name in ("whole", "shared"):
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000003")
    (tmp_path / "whole").rename(tmp_path / "swap")
    (tmp_path / "shared").rename(tmp_path / "whole")
    (tmp_path / "swap").rename(tmp_path / "shared")
    train_on(2, tiny_wan, tmp_path / "whole", values)
    train_on(2, tiny_wan, tmp_path / "shared", values | {"sharded": True})
    whole, shared = losses(tmp_path / "whole"), losses(tmp_path / "shared")
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=0)
    assert result(tmp_path / "whole").keys() == result(tmp_path / "shared").keys()


def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny_wan, tmp_path):
    values = VALUES | {"steps": 400, "watch__validate": 1000, "checkpoint__every": 1000}
    ranks = start_ranks(2, tiny_wan, tmp_path, values)
    log = tmp_path / "log.csv"
    while all(rank.is_alive() for rank in ranks) and not (
        log.exists() and len(log.read_text().splitlines()) > 3
    ):
        time.sleep(0.05)
    ranks[1].terminate()
    assert not {0, None} & set(exit_codes(ranks))
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert 3 <= int(checkpoint.name[-8:]) < 400
    assert not (tmp_path / "pipeline").exists()


def test_more_processes_than_clips_are_refused():
    from tests.training.clips import make_clips, small_config

    from nabla_attn.training.loader import BatchLoader

    config = small_config(data__validation=2)
    with pytest.raises(ValueError, match="more processes than clips: 7 for 6"):
        BatchLoader(make_clips(8), config, replica=0, replicas=7)


def test_clips_of_validation_must_divide_over_processes_too():
    from tests.training.clips import Clips, small_config

    from nabla_attn.training.loader import BatchLoader
    from nabla_attn.training.setup import _check_sharing

    config = small_config(data__validation=1, context_parallel=2)
    # The first clip is held out.
    loader = BatchLoader(Clips(((4, 3, 6, 6), (4, 2, 6, 6))), config, replica=0, replicas=1)
    run = SimpleNamespace(config=config, loader=loader, tokens=lambda shape: shape[1] * 9)
    with pytest.raises(ValueError, match=r"27 tokens .* do not divide"):
        _check_sharing(run)


@pytest.mark.parametrize(
    ("clips", "held_out"), [(1, 0), (2, 1), (9, 1), (25, 2), (80, 8), (5000, 8)]
)
def test_the_default_validation_scales_with_the_data(clips, held_out):
    from nabla_attn.training.loader import hold_out

    found = hold_out(clips, None)
    assert len(found) == held_out and len(set(found)) == held_out


def test_shares_of_a_step_are_those_of_one_process():
    from tests.training.clips import make_clips, small_config

    from nabla_attn.training.loader import BatchLoader

    clips = make_clips(9, odd=True)

    def latents(accumulation, replica, replicas):
        config = small_config(accumulation=accumulation, data__batch=2)
        loader = BatchLoader(clips, config, replica=replica, replicas=replicas)
        return [
            (batch["latents"], torch.rand(1, generator=generator))
            for number in range(5)
            for batch, generator in loader.step(number)
        ]

    whole = latents(2, 0, 1)
    for replica in range(2):
        for (ours, noise), (theirs, same) in zip(
            latents(1, replica, 2), whole[replica::2], strict=True
        ):
            assert torch.equal(ours, theirs) and torch.equal(noise, same)
