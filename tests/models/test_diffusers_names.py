"""The names of diffusers that NABLA stands on; a release that moves one fails here, by name."""

import inspect
from importlib.metadata import version

import pytest
import torch
from tests.models.tiny_models import TINY

from nabla_attn.models import processor as dispatch
from nabla_attn.models import table


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
def test_processors_call_the_dispatcher_or_have_a_port(name):
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
        assert "backend=self._attention_backend" in source, f"{path} bypasses the dispatcher now"
        assert "self._parallel_config" in source, f"{path} bypasses the dispatcher now"


def test_classes_with_a_plan_of_their_own():
    import diffusers

    for row in table._ROWS:
        has_plan = getattr(getattr(diffusers, row.name), "_cp_plan", None) is not None
        assert row.refusal or row.no_ranks or row.cp_plan or has_plan, row.name


def test_private_names_of_context_parallelism():
    from diffusers.models import _modeling_parallel as parallel
    from diffusers.models import attention_dispatch, modeling_utils

    for name in ("ContextParallelInput", "ContextParallelOutput", "ContextParallelConfig"):
        assert hasattr(parallel, name)
    config = parallel.ContextParallelConfig(ulysses_degree=2)
    for name in ("ring_degree", "ulysses_degree", "ulysses_anything", "_ulysses_mesh"):
        assert hasattr(config, name)
    assert hasattr(parallel.ParallelConfig(context_parallel_config=config), "setup")
    assert callable(attention_dispatch.SeqAllToAllDim.apply)
    source = inspect.getsource(modeling_utils.ModelMixin)
    for name in ("_cp_plan", "_parallel_config", "_gradient_checkpointing_func"):
        assert name in source


def test_private_names_of_hooks():
    from diffusers.hooks import HookRegistry, context_parallel

    assert context_parallel._CONTEXT_PARALLEL_INPUT_HOOK_TEMPLATE.startswith("cp_input")
    model = TINY["ltx"].build()
    assert HookRegistry.check_if_exists_or_initialize(model) is model._diffusers_hook
    assert model._diffusers_hook.hooks == {}


def test_private_names_of_pipelines_and_schedulers():
    import diffusers

    assert "_num_timesteps" in inspect.getsource(diffusers.WanPipeline.__call__)
    assert isinstance(diffusers.WanPipeline.current_timestep, property)
    for name in ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"):
        assert isinstance(getattr(diffusers, name).step_index, property)
        assert isinstance(getattr(diffusers, name).begin_index, property)
    assert diffusers.FlowMatchEulerDiscreteScheduler.order == 1
    assert diffusers.FlowMatchHeunDiscreteScheduler.order == 2


def test_private_names_of_torch():
    assert callable(torch._C._ForceDispatchKeyGuard)
    assert torch._C._dispatch_tls_local_exclude_set().remove is not None
