"""The names of diffusers that NABLA stands on; a release that moves one fails here, by name."""

import inspect
from importlib.metadata import version

import pytest
import torch
from tests.models.tiny_models import TINY

from nabla_attn.models import catalogue, dispatch, table


def test_the_dispatcher_is_as_expected():
    dispatch.check_diffusers()


def test_a_moved_name_is_reported(monkeypatch):
    from diffusers.models import attention_dispatch

    monkeypatch.delattr(attention_dispatch, "dispatch_attention_fn")
    with pytest.raises(RuntimeError, match=r"lacks \['dispatch_attention_fn'\].*diffusers >= 0.42"):
        dispatch.check_diffusers()
    monkeypatch.undo()
    monkeypatch.delattr(attention_dispatch._AttentionBackendRegistry, "register")
    with pytest.raises(RuntimeError, match=r"lacks \['register'\]"):
        dispatch.check_diffusers()


def test_every_class_of_the_table_exists():
    import diffusers

    assert [row.name for row in table._ROWS if not hasattr(diffusers, row.name)] == []


@pytest.mark.parametrize("name", TINY)
def test_processors_have_a_door_or_a_port(name):
    from nabla_attn.models.modules import attention_modules
    from nabla_attn.models.table import row_of

    model = TINY[name].build()
    row = row_of(model)
    for path, module in attention_modules(model, row).items():
        processor = module.processor
        if type(processor).__name__ in row.ports:
            continue
        for private in ("_attention_backend", "_parallel_config"):
            assert hasattr(processor, private), f"diffusers {version('diffusers')}: {path}"
        source = inspect.getsource(type(processor).__call__)
        assert "backend=self._attention_backend" in source, f"{path} has no door any more"
        assert "self._parallel_config" in source, f"{path} has no door any more"


def test_classes_with_a_plan_of_their_own():
    import diffusers

    planned = {row.name for row in table._ROWS if getattr(diffusers, row.name)._cp_plan is not None}
    refused = {row.name for row in table._ROWS if row.refusal}
    assert planned - refused == catalogue.PLANNED_BY_DIFFUSERS


def test_private_names_of_torch():
    assert callable(torch._C._ForceDispatchKeyGuard)
    assert torch._C._dispatch_tls_local_exclude_set().remove is not None
