"""The ComfyUI node against a stand-in of ComfyUI's interface; no real ComfyUI runs here."""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import comfy_standin as comfy
import pytest
import torch

import nabla_attn as na

PACKAGE = Path(__file__).parents[2] / "comfyui"


@pytest.fixture
def package(monkeypatch):
    """The package under a name of ComfyUI's making, loaded the way custom nodes are."""
    name = "custom_nodes_nabla"
    extension = ModuleType("comfy.patcher_extension")
    extension.WrappersMP = comfy.WrappersMP
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)
    spec = importlib.util.spec_from_file_location(
        name, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    for submodule in [key for key in sys.modules if key.startswith(name + ".")]:
        del sys.modules[submodule]


@pytest.fixture
def node(package):
    return package.NODE_CLASS_MAPPINGS["NablaAttention"]()


@pytest.fixture(params=[comfy.WanModel, comfy.Kandinsky5])
def model(request):
    return comfy.ModelPatcher(request.param())


@pytest.fixture
def wan():
    return comfy.ModelPatcher(comfy.WanModel())


def latents(frames=3, height=32, width=48, batch=1):
    video = torch.randn(batch, 4, frames, height, width) * 4
    return video, torch.randn(batch, 7, comfy.HEADS * comfy.DIM)


def expected(call, grid, algorithm, **kwargs):
    q, k, v = (x.unflatten(-1, (comfy.HEADS, -1)).transpose(1, 2) for x in call[:3])
    out = na.nabla_attention(q, k, v, na.TokenGrid(*grid), na.parse(algorithm), **kwargs)
    return out.transpose(1, 2).flatten(2)


def close(a, b):
    return (a - b).abs().max() <= 3e-6 * b.abs().max()


def test_threshold_one_equals_dense(node, model):
    inputs = latents()
    (patched,) = node.apply(model, "nabla-1")
    assert close(patched.sample_step(*inputs)[0], model.sample_step(*inputs)[0])


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((3, 32, 48), (3, 16, 24)), ((2, 21, 26), (2, 11, 13)), ((1, 33, 40), (1, 17, 20))],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_sparse_attention_is_nabla_attention(node, model, shape, grid, batch):
    inputs = latents(*shape, batch=batch)
    (patched,) = node.apply(model, "nabla-0.5_sta-1-1-1")
    out, calls = patched.sample_step(*inputs)
    assert not close(out, model.sample_step(*inputs)[0])
    assert len(calls) == 2
    for call in calls:
        assert torch.equal(call[3], expected(call, grid, "nabla-0.5_sta-1-1-1"))


def test_one_image_without_frames(node):
    model = comfy.ModelPatcher(comfy.Kandinsky5())
    x, context = latents(1, 32, 32)
    _, calls = node.apply(model, "nabla-0.5")[0].sample_step(x[:, :, 0], context)
    assert torch.equal(calls[0][3], expected(calls[0], (1, 16, 16), "nabla-0.5"))


def test_output_may_keep_the_heads(package):
    override = sys.modules[f"{package.__name__}.override"].nabla_override
    q, k, v = torch.randn(3, 1, 2, 128, 16).unbind()
    out = override(
        comfy.attention, q, k, v, 2, skip_reshape=True, skip_output_reshape=True,
        transformer_options={},
    )  # fmt: skip
    assert out.shape == q.shape


def test_only_self_attention_of_the_video_is_sparse(node, model, monkeypatch, caplog):
    lengths = []
    original = comfy.attention

    def recording(q, k, v, *args, **kwargs):
        lengths.append(k.shape[2] if kwargs.get("skip_reshape") else k.shape[1])
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(comfy, "attention", recording)
    node.apply(model, "nabla-0.5")[0].sample_step(*latents())
    assert lengths
    assert set(lengths) == {7}
    assert not caplog.records


def test_text_as_long_as_the_video_is_not_taken_for_it(node, model, caplog):
    x, _ = latents(1, 32, 32)
    inputs = x, torch.randn(1, 256, comfy.HEADS * comfy.DIM)
    (patched,) = node.apply(model, "nabla-0.5")
    assert torch.equal(patched.sample_step(*inputs)[0], model.sample_step(*inputs)[0])
    assert "cannot be told apart" in caplog.text


def test_models_do_not_share_settings_and_the_original_is_untouched(node, model):
    inputs = latents()
    before = model.sample_step(*inputs)[0]
    outputs = {}
    patched = {name: node.apply(model, name)[0] for name in ("nabla-0.3", "nabla-0.8")}
    for name in ("nabla-0.3", "nabla-0.8", "nabla-0.3"):
        out, calls = patched[name].sample_step(*inputs)
        assert torch.equal(calls[0][3], expected(calls[0], (3, 16, 24), name))
        assert torch.equal(outputs.setdefault(name, out), out)
    assert torch.equal(model.sample_step(*inputs)[0], before)
    assert model.model_options == {"transformer_options": {}}
    assert not model.wrappers


def test_a_clone_of_a_patched_model_keeps_the_settings(node, model):
    inputs = latents()
    (patched,) = node.apply(model, "nabla-0.5")
    assert torch.equal(patched.clone().sample_step(*inputs)[0], patched.sample_step(*inputs)[0])


def test_applying_again_replaces(node, model):
    inputs = latents()
    (once,) = node.apply(model, "nabla-0.8")
    (twice,) = node.apply(node.apply(model, "nabla-0.3")[0], "nabla-0.8")
    assert torch.equal(once.sample_step(*inputs)[0], twice.sample_step(*inputs)[0])


def test_an_earlier_override_gets_the_other_calls(node, wan):
    lengths = []

    def earlier(func, q, k, *args, **kwargs):
        lengths.append(k.shape[1])
        return func(q, k, *args, **kwargs)

    wan.model_options["transformer_options"]["optimized_attention_override"] = earlier
    (patched,) = node.apply(node.apply(wan, "nabla-0.4")[0], "nabla-0.5")
    patched.sample_step(*latents())
    assert lengths == [7, 7]


def test_a_mask_goes_to_the_original(node, caplog):
    inputs = latents()
    model = comfy.ModelPatcher(comfy.WanModel(mask=torch.ones(1152, 1152).tril().bool()))
    (patched,) = node.apply(model, "nabla-0.5")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(patched.sample_step(*inputs)[0], model.sample_step(*inputs)[0])
    assert caplog.text.count("mask") == 1


def test_a_grid_that_does_not_fit_is_logged_once(node, wan, caplog):
    (patched,) = node.apply(wan, "nabla-0.5")
    x, context = latents()
    reference = torch.randn(1, 4, 32, 20)
    args = {"reference_latent": reference}
    dense = wan.sample_step(x, context, **args)[0]
    for _ in range(2):
        # A reference of another size is no whole frame of the grid.
        assert torch.equal(patched.sample_step(x, context, **args)[0], dense)
    assert [record.message for record in caplog.records] == [
        "NABLA: attention stays dense, because 1312 tokens do not fit the token grid 3x16x24."
    ]


def test_a_reference_frame_belongs_to_the_grid(node, wan):
    x, context = latents()
    (patched,) = node.apply(wan, "nabla-0.5", keep_first_frame=True)
    _, calls = patched.sample_step(x, context, reference_latent=torch.randn(1, 4, 32, 48))
    for call in calls:
        wanted = expected(call, (4, 16, 24), "nabla-0.5_keep-first-frame")
        assert torch.equal(call[3], wanted)


@pytest.mark.parametrize("tail", ["mean", "first"])
def test_a_tail_is_an_input_and_a_part_of_the_algorithm(node, wan, tail):
    x, context = latents()
    written = f"nabla-0.5_tail-{tail}"
    for patched in (*node.apply(wan, "nabla-0.5", tail=tail), *node.apply(wan, written)):
        _, calls = patched.sample_step(x, context)
        for call in calls:
            assert torch.equal(call[3], expected(call, (3, 16, 24), written))
            assert not torch.equal(call[3], expected(call, (3, 16, 24), "nabla-0.5"))


def test_a_model_that_never_asks_is_logged(node, wan, monkeypatch, caplog):
    monkeypatch.setattr(comfy, "optimized_attention", comfy.attention)
    node.apply(wan, "nabla-0.5")[0].sample_step(*latents())
    assert "no self-attention of WanModel asked" in caplog.text


@pytest.mark.parametrize(
    ("settings", "sparse_steps"),
    [
        ({}, [0, 1, 2, 3]),
        ({"start_percent": 0.25, "end_percent": 0.75}, [1, 2]),
        ({"dense_first_steps": 1}, [1, 2, 3]),
        ({"min_tokens": 1152}, [0, 1, 2, 3]),
        ({"min_tokens": 1153}, []),
    ],
)
def test_steps(node, model, settings, sparse_steps):
    inputs = latents()
    (patched,) = node.apply(model, "nabla-0.5", **settings)
    dense = model.sample_step(*inputs)[0]
    outs = [patched.sample_step(*inputs, step=step)[0] for step in range(4)]
    assert [step for step, out in enumerate(outs) if not torch.equal(out, dense)] == sparse_steps


def test_a_window_alone_starts_with_the_references_dense_steps(node, wan):
    inputs = latents()
    dense = wan.sample_step(*inputs)[0]
    (patched,) = node.apply(wan, "sta-1-1-1")
    outs = [patched.sample_step(*inputs, step=step, steps=14)[0] for step in (11, 12)]
    assert torch.equal(outs[0], dense)
    assert not torch.equal(outs[1], dense)


def test_errors_are_shown_as_they_are(node, wan):
    with pytest.raises(ValueError, match=r"'nable-0\.5' is not an algorithm") as error:
        node.apply(wan, "nable-0.5")
    assert node.VALIDATE_INPUTS("nable-0.5") == str(error.value)
    assert node.VALIDATE_INPUTS("nabla-0.5") is True
    assert node.VALIDATE_INPUTS(None) is True
    with pytest.raises(ValueError, match="start_percent <= end_percent"):
        node.apply(wan, "nabla-0.5", start_percent=0.6, end_percent=0.4)
    with pytest.raises(ValueError, match="Wan and Kandinsky 5 models: got Linear"):
        node.apply(comfy.ModelPatcher(torch.nn.Linear(1, 1)), "nabla-0.5")


def test_inputs_of_the_node_are_the_arguments_of_apply(node):
    inputs = node.INPUT_TYPES()
    names = inputs["required"] | inputs["optional"]
    defaults = {name: spec[1]["default"] for name, spec in names.items() if len(spec) > 1}
    code = node.apply.__code__
    assert list(names) == list(code.co_varnames[1 : code.co_argcount])
    assert list(defaults.values())[1:] == list(node.apply.__defaults__)
