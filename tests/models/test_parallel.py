"""Context parallelism: results of 2 and 4 processes equal those of one, forward and backward."""

from types import SimpleNamespace

import pytest
import torch
from tests.models import ulysses_worker
from tests.models.tiny_models import TINY, randn, relative_error, run
from tests.processes import exit_codes, start_process

import nabla_attn as na
from nabla_attn.core.grid import TokenGrid
from nabla_attn.models.context_parallel import (
    Ranks,
    balanced_order,
    gather_stats,
    imbalance,
    keep_ranks_from,
    ranks_of,
    to_heads,
    to_tokens,
)
from nabla_attn.models.operator import _attend_op
from nabla_attn.models.plan import Plan, plan_key
from nabla_attn.models.report import Report

# One without text, one with text behind the video, one with text before it and a port.
QUICK = ("wan", "hunyuan", "cogvideox")


def check(tmp_path, num_ranks, names):
    ranks = [
        start_process(ulysses_worker.main, rank, str(tmp_path), num_ranks, names)
        for rank in range(num_ranks)
    ]
    assert exit_codes(ranks, timeout=600) == [0] * num_ranks
    results = torch.load(tmp_path / "results.pt")
    for before, after, error in results["balance"].values():
        assert 1 <= after < 1.1 < before
        assert error < 3e-6
    results = results["cases"]
    assert {name for name, *_ in results} == set(names)
    for case, (error, is_reordered) in results.items():
        assert error < 3e-6, f"{case}: {error}"
        assert is_reordered or case[1:] != (2, "nabla-0.5"), case


def test_two_processes_agree_with_one(tmp_path):
    check(tmp_path, 2, QUICK)


@pytest.mark.slow
def test_four_processes_agree_with_one_in_every_model_with_a_plan(tmp_path):
    check(tmp_path, 4, tuple(ulysses_worker.CHANGES))


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_a_group_of_one(group, name):
    model, inputs = TINY[name].build(), TINY[name].inputs(3, 11, 13)
    mesh = SimpleNamespace(get_group=lambda: group)
    expected = {}
    for algorithm in ("nabla-0.5", "topk-0.2_tail-first", "dense"):
        with na.apply(model, algorithm):
            expected[algorithm] = run(model, inputs)
    model._parallel_config = configured(_ulysses_mesh=mesh)._parallel_config
    for algorithm, out in expected.items():
        with na.apply(model, algorithm, telemetry=False):
            for _ in range(2):
                assert relative_error(run(model, inputs), out) < 3e-6


@pytest.mark.parametrize("algorithm", ["nabla-0.5", "topk-0.2_tail-first", "vsa-0.5", "dense"])
@pytest.mark.parametrize("ranks", [False, True])
def test_the_operator_keeps_its_contract(group, ranks, algorithm):
    if algorithm == "dense" and not ranks:
        pytest.skip("dense layers run the model's own attention")
    has_parts = algorithm == "vsa-0.5"
    plan = Plan(
        grid=TokenGrid(2, 8, 9),
        config=na.parse(algorithm),
        text="after",
        telemetry=True,
        ranks=Ranks(group) if ranks else None,
        weights=(("vsa", "weight"), ("vsa", "bias")) if has_parts else (),
    )
    q, k, v = (randn(1, 150, 2, 16).requires_grad_() for _ in range(3))
    hidden = randn(1, 144, 6).requires_grad_() if has_parts else None
    weights = [randn(32, 6).requires_grad_(), randn(32).requires_grad_()] if has_parts else []
    arguments = (q, k, v, None, plan_key(plan), None, hidden, weights, None, None)
    torch.library.opcheck(_attend_op, arguments)


def test_reordered_heads_come_back(group):
    ranks, order = Ranks(group), torch.tensor([2, 0, 3, 1])
    x = randn(2, 9, 4, 3)
    shared = to_heads(x, ranks, 2, 3, order)
    assert torch.equal(shared, x[:, :, order])
    assert torch.equal(to_tokens(shared, ranks, 2, 3, order), x)
    stats = randn(2, 4)
    assert torch.equal(gather_stats(stats[:, order], ranks, order), stats)


def test_kandinsky_does_not_train_in_parallel(group):
    model, inputs = TINY["kandinsky5"].build().train(), TINY["kandinsky5"].inputs(3, 11, 13)
    mesh = SimpleNamespace(get_group=lambda: group)
    model._parallel_config = configured(_ulysses_mesh=mesh)._parallel_config
    na.apply(model, "nabla-0.5")
    with pytest.raises(ValueError, match="cannot train with context parallelism"):
        run(model, inputs)


def test_a_plan_that_shares_the_text_is_refused(group):
    from diffusers.hooks import HookRegistry, ModelHook

    model, inputs = TINY["ltx"].build(), TINY["ltx"].inputs(2, 8, 9)
    mesh = SimpleNamespace(get_group=lambda: group)
    model._parallel_config = configured(_ulysses_mesh=mesh)._parallel_config
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(ModelHook(), "cp_input---")
    na.apply(model, "nabla-0.5")
    with pytest.raises(ValueError, match="Apply NABLA first"):
        run(model, inputs)


def test_attention_over_whole_keys_loses_its_ranks():
    cross = SimpleNamespace(processor=SimpleNamespace(_parallel_config="shared"))
    keep_ranks_from([cross, SimpleNamespace(processor=None)])
    assert cross.processor._parallel_config is None


def test_models_that_cannot_be_shared_say_why(group):
    model, inputs = TINY["helios"].build(), TINY["helios"].inputs(2, 8, 9)
    mesh = SimpleNamespace(get_group=lambda: group)
    model._parallel_config = configured(_ulysses_mesh=mesh)._parallel_config
    na.apply(model, "nabla-0.5")
    with pytest.raises(ValueError, match="over processes: the history in front"):
        run(model, inputs)


def configured(**changes):
    settings = dict(ring_degree=1, ulysses_degree=2, ulysses_anything=False)
    return SimpleNamespace(
        _parallel_config=SimpleNamespace(
            context_parallel_config=SimpleNamespace(**settings | changes)
        )
    )


def test_what_block_maps_cannot_follow_is_refused():
    grid = TokenGrid(3, 11, 13)
    assert ranks_of(SimpleNamespace(), grid, 4) is None
    with pytest.raises(ValueError, match="ring attention passes keys along"):
        ranks_of(configured(ring_degree=2), grid, 4)
    with pytest.raises(ValueError, match="shares tokens unevenly"):
        ranks_of(configured(ulysses_anything=True), grid, 4)


def test_uneven_shares_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    model = configured(_ulysses_mesh=SimpleNamespace(get_group=lambda: None))
    assert ranks_of(model, TokenGrid(2, 11, 13), 4).count == 2
    with pytest.raises(ValueError, match="3 heads do not divide over 2 ranks"):
        ranks_of(model, TokenGrid(2, 11, 13), 3)
    with pytest.raises(ValueError, match="429 tokens of 3x11x13 do not divide over 2 ranks"):
        ranks_of(model, TokenGrid(3, 11, 13), 4)


def test_heads_are_balanced():
    loads = [0.9, 0.8, 0.1, 0.2, 0.5, 0.5, 0.4, 0.6]
    order = balanced_order(loads, 4)
    assert sorted(order) == list(range(8))
    assert imbalance(loads, 4) == pytest.approx(1.7)
    assert imbalance(loads, 4, order) == pytest.approx(1.0)
    assert balanced_order([1.0] * 4, 2) == [0, 2, 1, 3]


def test_the_report_shows_the_balance():
    density = torch.tensor([[[0.9, 0.8, 0.1, 0.2]], [[0.8, 0.8, 0.2, 0.2]]])
    report = Report(density, density, density, ["transformer"] * 2)
    assert report.head_balance(2) == (pytest.approx(1.6), pytest.approx(1.0))
    skipped = torch.cat([density, torch.full_like(density, float("nan"))], dim=1)
    assert Report(skipped, skipped, skipped, report.models).head_balance(2) == report.head_balance(
        2
    )
    first = Report(density[:1], density[:1], density[:1], ["transformer"])
    assert all(value != value for value in first.head_balance(2))


@torch.no_grad()
def test_plans_are_supplied_and_taken_back():
    model = TINY["hunyuan"].build()
    assert model._cp_plan is None
    handle = na.apply(model, "nabla-0.5")
    assert set(model._cp_plan) == {"rope", "transformer_blocks.0", "proj_out"}
    run(model, TINY["hunyuan"].inputs(2, 8, 8))
    handle.remove()
    assert model._cp_plan is None and "_cp_plan" not in model.__dict__
    # Token replacement finds the first frame by position, which shares of tokens do not keep.
    replacing = TINY["hunyuan"].build(image_condition_type="token_replace")
    with na.apply(replacing, "nabla-0.5"):
        assert replacing._cp_plan is None
    wan = TINY["wan"].build()
    plan = wan._cp_plan
    with na.apply(wan, "nabla-0.5"):
        assert wan._cp_plan is plan
