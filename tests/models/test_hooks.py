"""NABLA beside the caches, offloading and casting of diffusers and accelerate."""

import pytest
import torch
from tests.models.tiny_models import TINY, relative_error, run

import nabla_attn as na

WAN = TINY["wan"]
GRID = (3, 11, 13)


@pytest.fixture
def model():
    return WAN.build()


def at(time):
    return WAN.inputs(*GRID) | {"timestep": torch.full((2,), float(time))}


@torch.no_grad()
def test_first_block_cache_skips_layers_and_the_report_says_so(model):
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    handle = na.apply(model, "nabla-0.5")
    with model.cache_context("cond"):
        for time in (900, 800):
            assert run(model, at(time)).isfinite().all()
    density = handle.report().density
    assert density.shape[:2] == (2, 2)
    assert density[0].isfinite().all() and density[1, 0].isfinite().all()
    assert density[1, 1].isnan().all()
    assert 0 < handle.report().mean_density < 1
    assert handle.report().to_dict()["density_per_step_and_layer"][1][1] is None


def mag_cache():
    from diffusers import MagCacheConfig

    return MagCacheConfig(threshold=1e6, num_inference_steps=6, mag_ratios=[1.0] * 6)


def taylorseer_cache():
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, use_lite_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("apply_first", [True, False])
@pytest.mark.parametrize("config", [mag_cache, taylorseer_cache])
def test_caches_that_skip_steps(model, apply_first, config):
    before = run(model, at(900))
    if apply_first:
        handle = na.apply(model, "nabla-0.5")
    model.enable_cache(config())
    if not apply_first:
        handle = na.apply(model, "nabla-0.5")
    with model.cache_context("cond"):
        for time in (900, 800, 700, 600, 500, 400):
            assert run(model, at(time)).isfinite().all()
    ran = handle.report().density.isfinite().all(dim=(1, 2)).tolist()
    assert ran[0] and not all(ran)
    model.disable_cache()
    handle.remove()
    assert torch.equal(run(model, at(900)), before)


@torch.no_grad()
@pytest.mark.parametrize("apply_first", [True, False])
def test_pyramid_attention_broadcast(model, apply_first):
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    )
    if apply_first:
        handle = na.apply(model, "nabla-0.5")
    model.enable_cache(config)
    if not apply_first:
        handle = na.apply(model, "nabla-0.5")
    for time in (900, 800):
        run(model, at(time))
    density = handle.report().density
    assert density[0].isfinite().all() and density[1].isnan().all()


@torch.no_grad()
def test_layerwise_casting(model):
    expected_dtype = torch.bfloat16
    model.to(expected_dtype)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=expected_dtype)
    inputs = {
        key: value.to(expected_dtype) if key != "timestep" else value
        for key, value in WAN.inputs(*GRID).items()
    }
    dense = run(model, inputs)
    with na.apply(model, "nabla-1"):
        assert relative_error(run(model, inputs), dense) < 0.05
    with na.apply(model, "nabla-0.5") as handle:
        assert run(model, inputs).dtype == expected_dtype
        assert handle.report().mean_density < 0.9


@torch.no_grad()
@pytest.mark.parametrize("apply_first", [True, False])
def test_offloading_by_accelerate_and_by_groups(model, apply_first):
    from accelerate import cpu_offload

    inputs = WAN.inputs(*GRID)
    with na.apply(model, "nabla-0.5"):
        expected = run(model, inputs)
    if apply_first:
        na.apply(model, "nabla-0.5")
    cpu_offload(model, execution_device=torch.device("cpu"))
    if not apply_first:
        na.apply(model, "nabla-0.5")
    assert torch.equal(run(model, inputs), expected)
    grouped = WAN.build()
    if apply_first:
        na.apply(grouped, "nabla-0.5")
    grouped.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    if not apply_first:
        na.apply(grouped, "nabla-0.5")
    assert torch.equal(run(grouped, inputs), expected)


@torch.no_grad()
def test_device_map(tmp_path):
    model = WAN.build()
    inputs = WAN.inputs(*GRID)
    with na.apply(model, "nabla-0.5"):
        expected = run(model, inputs)
    model.save_pretrained(tmp_path)
    mapped = type(model).from_pretrained(tmp_path, device_map={"": "cpu"})
    with na.apply(mapped, "nabla-0.5"):
        assert torch.equal(run(mapped, inputs), expected)


@torch.no_grad()
def test_wrapped_linears(model):
    class Wrapped(torch.nn.Module):
        """A linear behind another module, as quantisation leaves it."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    inputs = WAN.inputs(*GRID)
    with na.apply(model, "nabla-0.5"):
        expected = run(model, inputs)
        for block in model.blocks:
            block.attn1.to_q = Wrapped(block.attn1.to_q)
        assert torch.equal(run(model, inputs), expected)


@torch.no_grad()
def test_faster_cache_leaves_out_half_of_the_batch_and_each_prompt_keeps_its_map():
    from diffusers import FasterCacheConfig

    tiny = TINY["cogvideox"]
    time = [900]
    model = tiny.build()
    rules = na.Schedule(algorithm=na.parse("nabla-0.5"), reuse_guidance=True, reuse_steps=2)
    handle = na.apply(model, schedule=rules)
    model.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=1,
            spatial_attention_timestep_skip_range=(-1, 1001),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("transformer_blocks.*attn1",),
            attention_weight_callback=lambda module: 0.3,
            current_timestep_callback=lambda: time[0],
            tensor_format="BFCHW",
        )
    )
    maps = []
    handle.observe(lambda call: maps.append(call.block_map.mask) if call.layer == 0 else None)
    # Two prompts, each with and without guidance.
    inputs = {key: torch.cat([value] * 2) if isinstance(value, torch.Tensor) and value.shape[0] == 2
              else value for key, value in tiny.inputs(*GRID).items()}  # fmt: skip
    noise = torch.randn(inputs["hidden_states"].shape)
    for time[0] in (900, 800, 700):
        out = run(model, inputs | {"hidden_states": noise, "timestep": torch.full((4,), time[0])})
        assert out.isfinite().all() and len(out) == 4
    whole, half, again = maps
    assert len(whole) == len(again) == 4 and len(half) == 2
    assert torch.equal(whole[:2], whole[2:]) and not torch.equal(whole[0], whole[1])
    assert not torch.equal(half[0], half[1])
