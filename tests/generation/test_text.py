"""What a user typed is read, or a warning says what is not."""

import warnings
from dataclasses import replace

import pytest
from tests.training import tiny_pipelines

from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest

SMALL = GenerationRequest("red", height=32, width=48, frames=5, steps=1, guidance=1.0)


def said(pipeline, request, **inputs):
    """The warnings of a video, and its record."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, record = generate(pipeline, request, inputs=inputs)
    return [str(each.message) for each in caught], record


@pytest.mark.parametrize(
    ("name", "changes", "count", "read"),
    [
        ("skyreels", {}, 600, 512),
        ("ltx", {"width": 64, "frames": 9}, 150, 128),
        ("easyanimate", {}, 400, 256),
        ("hunyuan15", {}, 1100, 1000),
        ("cogvideox", {"frames": 9}, 300, 226),
        ("mochi", {"frames": 7, "steps": 2}, 300, 256),
        ("motif", {}, 600, 512),
        ("hunyuan", {}, 100, 77),
    ],
)
def test_a_text_that_is_cut_is_named_and_recorded(name, changes, count, read):
    pipeline = getattr(tiny_pipelines, name)()
    # HunyuanVideo's second encoder is CLIP; the first is a function here.
    place = "tokenizer_2" if name == "hunyuan" else "tokenizer"
    kind = type(getattr(pipeline, place))
    request = replace(SMALL, prompt="red " * count, **changes)
    messages, record = said(pipeline, request)
    cut = record.numbers["cut"]["prompt"][place]
    assert cut["tokens"] == count + 1 and 0 <= cut["read"] - read <= 3
    (message,) = [message for message in messages if "is ignored" in message]
    assert f"the prompt has {count + 1} tokens and" in message
    assert f"reads {cut['read']}: the rest is ignored" in message
    assert type(getattr(pipeline, place)) is kind
    messages, record = said(pipeline, replace(request, prompt="red"))
    assert not any("ignored" in message for message in messages) and "cut" not in record.numbers


def test_the_negative_prompt_is_told_apart():
    request = replace(SMALL, negative_prompt="blue " * 600, guidance=5.0)
    messages, record = said(tiny_pipelines.skyreels(), request)
    assert record.numbers["cut"] == {"negative_prompt": {"tokenizer": {"tokens": 601, "read": 512}}}
    assert ["the negative prompt has 601 tokens" in message for message in messages] == [True]


@pytest.mark.parametrize(
    ("name", "guidance", "inputs", "is_read"),
    [
        ("skyreels", 5.0, {}, True),
        ("skyreels", 1.0, {}, False),
        ("hunyuan", 5.0, {}, False),
        ("hunyuan", 5.0, {"true_cfg_scale": 3.0}, True),
        ("hunyuan15", 1.0, {}, False),
        ("hunyuan15", 3.0, {}, True),
    ],
)
def test_a_negative_prompt_that_nobody_reads_is_named(name, guidance, inputs, is_read):
    pipeline, sums = getattr(tiny_pipelines, name)(), set()
    for negative in ("", "blue square"):
        request = replace(SMALL, negative_prompt=negative, guidance=guidance)
        messages, record = said(pipeline, request, **inputs)
        sums.add(record.numbers["frames_sha256"])
        told = any("the negative prompt is ignored" in message for message in messages)
        assert told == (bool(negative) and not is_read)
    # The words of the tiny models count for little, so a difference may round away.
    assert len(sums) == 1 or is_read


def test_unknown_words_are_named(tiny_wan):
    pipeline = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    messages, _ = said(pipeline, replace(SMALL, prompt="a red cat on a sofa"))
    assert len(messages) == 1 and messages[0].startswith(
        "the model does not know these words of the prompt: cat, sofa. It knows a, an, and, "
    )


def test_unknown_words_are_answered_with_examples(tiny_wan, tmp_path):
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_wan, folder)
    examples = ["a red circle", "a blue square"]
    (folder / "defaults.json").write_text(json.dumps({"examples": examples}))
    pipeline = load_pipeline(folder, device="cpu", dtype="float32")
    (message,), _ = said(pipeline, replace(SMALL, prompt="a cat"))
    assert message.endswith(" Try 'a red circle'; 'a blue square'.")
    assert said(pipeline, replace(SMALL, prompt="a red circle"))[0] == []
