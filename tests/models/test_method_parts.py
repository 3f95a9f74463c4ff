"""Trained parts of methods in models: at their neutral element, learning, in files, refused."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.tiny_models import TINY, run

import nabla_attn as na
from nabla_attn.head_rules import Rule
from nabla_attn.models import load_method_parts, method_parts_fingerprint

# Without text, with text behind the video, and with text before it and a port.
QUICK = ("wan", "hunyuan", "cogvideox")


def tiny(name="wan"):
    return TINY[name].build(), TINY[name].inputs(2, 11, 13)


def trained(handle, seed=0):
    """Give the parts of a handle's models random values."""
    torch.manual_seed(seed)
    parameters = handle.method_parameters()
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    return parameters


@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_new_parts_change_no_bit_and_go_with_the_handle(name):
    model, inputs = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense = run(model, inputs)
    handle = na.apply(model, "vsa-0.3")
    plain = run(model, inputs)
    assert len(handle.method_parameters()) == 2 * len(handle.layers)
    assert torch.equal(run(model, inputs), plain)
    trained(handle)
    assert not torch.equal(run(model, inputs), plain)
    handle.remove()
    assert model.state_dict().keys() == before.keys() and torch.equal(run(model, inputs), dense)


@torch.no_grad()
def test_a_call_that_fails_leaves_no_hidden_states_behind():
    model, inputs = tiny()
    handle = na.apply(model, "vsa-0.3")
    trained(handle)

    def fail(call):
        raise OSError("the disk is full")

    stop = handle.observe(fail)
    with pytest.raises(OSError):
        run(model, inputs)
    assert all(layer.current.hidden is None for layer in handle.layers)
    stop()
    assert run(model, inputs).isfinite().all()


@pytest.mark.parametrize("algorithm", ["vsa-0.3", "sla-0.3"])
def test_gradients_pass_the_opaque_operator_and_checkpointing(algorithm):
    model, inputs = tiny()
    handle = na.apply(model, algorithm)
    weights = [*trained(handle), model.blocks[0].attn1.to_q.weight]
    found = []
    for mode in ("plain", "checkpointed", "compiled"):
        if mode == "checkpointed":
            model.enable_gradient_checkpointing()
            model.train()
        if mode == "compiled":
            model.disable_gradient_checkpointing()
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        out = run(model, inputs)
        found.append([out, *torch.autograd.grad(out.square().mean(), weights)])
    torch._dynamo.reset()
    for other in found[1:]:
        for mine, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)
    assert all(gradient.any() for gradient in found[0][1:])


@torch.no_grad()
def test_heads_that_go_apart_keep_their_gates():
    model, inputs = tiny()
    handle = na.apply(model, "vsa-0.3")
    trained(handle)
    expected = run(model, inputs)
    # The same number of blocks, so that the two groups differ in name alone.
    rules = (Rule(algorithm=na.parse("vsa-0.301"), heads=(0,)),)
    handle.set_schedule(na.Schedule(algorithm=na.parse("vsa-0.3"), rules=rules))
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_file_brings_parts_to_another_model_and_names_its_algorithm(tmp_path):
    model, inputs = tiny()
    handle = na.apply(model, "vsa-0.3")
    with pytest.raises(ValueError, match="has no trained parts here"):
        handle.save_method_parts(tmp_path / "none.safetensors")
    trained(handle)
    expected = run(model, inputs)
    file = tmp_path / "parts.safetensors"
    handle.save_method_parts(file)
    other, _ = tiny()
    with na.apply(other, parts=file) as again:
        assert str(again.schedule.algorithm) == "vsa-0.3"
        assert torch.equal(run(other, inputs), expected)
        # Those of a thread or a copy are its own.
        twin = copy.deepcopy(other)
        trained(again, seed=1)
        assert torch.equal(run(twin, inputs), expected)
    assert method_parts_fingerprint([other]) is None
    with pytest.raises(ValueError, match=r"parts of vsa, trained with vsa-0.3: got .* nabla-0.7"):
        na.apply(other, "nabla-0.7", parts=file)


@torch.no_grad()
def test_parts_of_a_model_stay_when_the_attention_is_taken_out(tmp_path):
    model, inputs = tiny()
    trained(handle := na.apply(model, "vsa-0.3"))
    handle.save_method_parts(tmp_path / "a.safetensors")
    expected = run(model, inputs)
    handle.remove()
    load_method_parts(model, tmp_path / "a.safetensors")
    first = method_parts_fingerprint([model])
    for _ in range(2):
        with na.apply(model, "vsa-0.3"):
            assert torch.equal(run(model, inputs), expected)
    trained(handle := na.apply(model, "vsa-0.3"), seed=1)
    handle.save_method_parts(tmp_path / "b.safetensors")
    load_method_parts(model, tmp_path / "a.safetensors")
    with na.apply(model, parts=tmp_path / "b.safetensors"):
        assert method_parts_fingerprint([model]) != first
    assert method_parts_fingerprint([model]) == first
    model.to(torch.bfloat16)
    assert model.blocks[0].attn1.nabla_parts["vsa"].weight.dtype == torch.bfloat16


def break_file(change, file):
    weights = load_file(file)
    metadata = {"algorithm": "vsa-0.3"}
    key = next(iter(weights))
    if change == "text":
        file.write_text("no tensors")
        return
    if change == "no algorithm":
        metadata = {"format": "pt"}
    elif change == "odd algorithm":
        metadata = {"algorithm": "vsa-7"}
    elif change == "odd name":
        weights["../x"] = weights.pop(key)
    elif change == "unknown method":
        weights[key.replace(".vsa.", ".nabla.")] = weights.pop(key)
    elif change == "shape":
        weights[key] = weights[key][..., :1].clone()
    elif change == "nan":
        weights[key] = weights[key] * float("nan")
    elif change == "integers":
        weights[key] = weights[key].int()
    elif change == "missing":
        del weights[key]
    elif change == "layer":
        weights[key.replace("blocks.0", "blocks.7")] = weights.pop(key)
    elif change == "second model":
        weights |= {
            "other" + name.removeprefix("transformer"): x.clone() for name, x in weights.items()
        }
    save_file(weights, file, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text", "is no file of trained parts"),
        ("no algorithm", "it names no algorithm"),
        ("odd algorithm", "must be in"),
        ("odd name", r"'../x' is no trained part"),
        ("unknown method", "is no trained part of a method"),
        ("shape", "does not fit WanTransformer3DModel: vsa of blocks"),
        ("nan", "no finite numbers"),
        ("integers", "no finite numbers"),
        ("missing", "needs .* got"),
        ("layer", "has no layer 'blocks.7.attn1'"),
        ("second model", "has parts of a 'other': got transformer"),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path, change, message):
    model, _ = tiny()
    file = tmp_path / "parts.safetensors"
    handle = na.apply(model, "vsa-0.3")
    trained(handle)
    handle.save_method_parts(file)
    break_file(change, file)
    with pytest.raises(ValueError) as error:
        na.apply(model, "vsa-0.3", parts=file)
    assert "\n" not in str(error.value) and re.search(message, str(error.value))
    # Nothing was changed: what was applied is there, with its parts.
    assert handle.method_parameters()[0].any() and "removed" not in repr(handle)
