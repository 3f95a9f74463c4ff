"""Gradients of the whole path against dense float64 autograd, with the map as data."""

from copy import deepcopy

import pytest
import torch
from tests.tiny_diffusers import tiny_wan_transformer
from torch.nn import functional

from nabla_attn.attention import build_block_map
from nabla_attn.config import parse
from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.order import TokenLayout, to_raster
from nabla_attn.training.adapters import copied_teacher
from nabla_attn.training.families import Family
from nabla_attn.training.noise import FlowPath
from nabla_attn.training.objective import Distillation, FlowMatching
from nabla_attn.training.sections import SparsityConfig
from nabla_attn.training.sparsity import Sparsity

FAMILY = Family(pipeline="WanPipeline")
ALGORITHM = "nabla-0.6_sta-1-1-3"
GRID = TokenGrid(frames=2, height=11, width=13)


def token_mask(q, k):
    """The map of q and k, expanded to token pairs in raster order."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    block_map = build_block_map(q, k, GRID, parse(ALGORITHM))
    size = block_map.block_tokens
    kept = block_map.mask.repeat_interleave(size, -1).repeat_interleave(size, -2)
    layout = TokenLayout(GRID)
    return to_raster(to_raster(kept, layout, dim=2), layout, dim=3)


def gradients(objective, model, batch):
    loss = objective(model, batch, torch.Generator().manual_seed(3))["loss"]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("is_distilled", [False, True])
def test_gradients_are_those_of_masked_dense_attention(monkeypatch, is_distilled):
    model = tiny_wan_transformer().double().train()
    plain = deepcopy(model)
    path = FlowPath(FAMILY, shift=3.0)
    objective = FlowMatching(path, FAMILY.inputs)
    if is_distilled:
        _, teacher = copied_teacher(tiny_wan_transformer(num_layers=1), torch.float64)
        objective = Distillation(path, FAMILY.inputs, teacher, data_weight=0.3)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(2, 4, 2, 22, 26, generator=generator, dtype=torch.float64),
        "conditions": {
            "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
        },
    }
    sparsity = Sparsity(model, SparsityConfig(algorithm=ALGORITHM, backend="gather"))
    masks = []
    sparsity._handle.observe(
        lambda call: masks.append(token_mask(*(x.transpose(1, 2) for x in (call.q, call.k))))
    )
    loss, sparse = gradients(objective, model, batch)
    assert len(masks) == 2 and not masks[0].all()
    assert 0.1 < sum(sparsity.densities()) / 2 < 0.95

    from diffusers.models.transformers import transformer_wan

    original, left = transformer_wan.dispatch_attention_fn, list(masks)

    def dense(query, key, value, **options):
        if query.shape[1] != key.shape[1] or not torch.is_grad_enabled():
            return original(query, key, value, **options)
        parts = (x.transpose(1, 2) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(*parts, attn_mask=left.pop(0))
        return out.transpose(1, 2)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", dense)
    expected_loss, expected = gradients(objective, plain, batch)
    assert not left
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    for name, wanted in expected.items():
        assert wanted is not None and wanted.abs().max() > 0, name
        # Normalisation runs in float32 inside the model: rounding of the last float32 digit.
        error = (sparse[name] - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-5, (name, error)
