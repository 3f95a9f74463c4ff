"""Defaults by task, sizes, and every family generating dense and sparse."""

import json
from pathlib import Path

import numpy as np
import pytest

import tiny_wan
from nabla_attn.wan.command import generate_wan
from nabla_attn.wan.placement import WanPlacement
from nabla_attn.wan.request import WanRequest, fit_inputs, read_inputs, video_size
from nabla_attn.wan.tasks import NEGATIVE, TASKS

pytestmark = pytest.mark.filterwarnings("ignore:.*trained for", "ignore:the model does not know")

# Wan2.1 generate.py and wan/configs, Wan2.2 wan/configs: steps, shift, guidance, frames, fps.
REFERENCE = {
    "t2v-1.3B": (50, 5.0, 5.0, 81, 16),
    "t2v-14B": (50, 5.0, 5.0, 81, 16),
    "t2i-14B": (50, 5.0, 5.0, 1, 16),
    "i2v-14B": (40, 5.0, 5.0, 81, 16),
    "flf2v-14B": (50, 16.0, 5.0, 81, 16),
    "vace-1.3B": (50, 16.0, 5.0, 81, 16),
    "vace-14B": (50, 16.0, 5.0, 81, 16),
    "t2v-A14B": (40, 12.0, 4.0, 81, 16),
    "i2v-A14B": (40, 5.0, 3.5, 81, 16),
    "vace-A14B": (50, 12.0, 5.0, 81, 16),
    "ti2v-5B": (50, 5.0, 5.0, 121, 24),
}


@pytest.fixture
def image(tmp_path):
    from PIL import Image

    path = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def make_request(task, image, **values):
    inputs = dict.fromkeys(TASKS[task].flags, image)
    return WanRequest(Path("ckpt"), "a", task, inputs=inputs, **values)


@pytest.mark.parametrize("task", REFERENCE)
def test_defaults(task, image):
    size = TASKS[task].sizes[-1]
    request = make_request(task, image, size="1280*720").resolved()
    steps, shift, guidance, frames, _ = REFERENCE[task]
    assert (request.steps, request.shift, request.guidance) == (steps, shift, guidance)
    assert request.frames == frames
    assert TASKS[task].fps == REFERENCE[task][4]
    assert request.negative_prompt.endswith(NEGATIVE)
    small = make_request(task, image, size=size).resolved()
    assert small.shift == (3.0 if task == "i2v-14B" else shift)
    assert request.resolved() == request


def test_every_reference_task_is_known():
    assert REFERENCE.keys() == TASKS.keys()


def test_untrained_size_is_said(image):
    with pytest.warns(UserWarning, match="t2v-1.3B was trained for 480"):
        make_request("t2v-1.3B", image, size="1280x720").resolved()


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ("1280*720", {}, (1280, 720)),
        ("1280*720", {"crop": True}, (1280, 640)),
        ("832*480", {"crop": True}, (768, 384)),
        ("415*200", {"crop": True}, (384, 128)),
        ("1280*720", {"aspect": 720 / 1280}, (1280, 720)),
        ("1280*720", {"aspect": 1.0}, (960, 960)),
        ("832*480", {"aspect": 90 / 140}, (784, 496)),
    ],
)
def test_sizes(size, options, expected):
    assert video_size(size, unit=16, latent_pixels=8, **options) == expected


# 288*160 pixels in the aspect of the 140x90 image, on each model's token grid.
SIZES_BY_IMAGE = {"i2v": (160, 256), "flf2v": (160, 256), "i2v-2.2": (160, 256)}
SIZES_BY_IMAGE["ti2v-2.2"] = (160, 256)
CASES = [
    ("t2v-1.3B", "t2v", {}),
    ("t2i-14B", "t2v", {}),
    ("i2v-14B", "i2v", {}),
    ("flf2v-14B", "flf2v", {}),
    ("vace-14B", "vace", {}),
    ("vace-1.3B", "vace", {"src_ref_images": "{image},{image}"}),
    ("t2v-A14B", "t2v-2.2", {}),
    ("i2v-A14B", "i2v-2.2", {}),
    ("vace-A14B", "vace-2.2", {"src_ref_images": "{image}"}),
    ("ti2v-5B", "ti2v-2.2", {}),
    ("ti2v-5B", "ti2v-2.2", {"image": "{image}"}),
]


@pytest.mark.parametrize(("task", "family", "inputs"), CASES)
def test_every_task_generates_sparse(tmp_path, image, task, family, inputs):
    folder = tiny_wan.write_checkpoint(tmp_path / "ckpt", family, sparse_algo="nabla-0.4")
    files = dict.fromkeys(TASKS[task].flags, image)
    files |= {flag: value.format(image=image) for flag, value in inputs.items()}
    frames = 1 if task == "t2i-14B" else 5
    request = WanRequest(
        folder, "a", task, size="288*160", frames=frames, steps=2, seed=1, inputs=files
    )
    video, record = generate_wan(request)
    follows_image = {"image", "first_frame"} & files.keys()
    height, width = SIZES_BY_IMAGE[family] if follows_image else (160, 288)
    assert video.shape == (frames, height, width, 3)
    assert record.config["sparse_algo"] == "nabla-0.4"
    assert record.config["sparse_algo_source"] == "the checkpoint's own"
    assert record.numbers["attention"]["density"] < 1


def test_vace_follows_a_source_video(tmp_path):
    from nabla_attn.generation.video import write_video

    folder = tiny_wan.write_checkpoint(tmp_path / "ckpt", "vace")
    source = str(tmp_path / "source.mp4")
    write_video(np.zeros((5, 128, 128, 3), np.uint8), source, 16)
    request = WanRequest(
        folder, "a", "vace-14B", size="128*128", frames=5, steps=1, inputs={"src_video": source}
    )
    video, _ = generate_wan(request)
    assert video.shape == (5, 128, 128, 3)
    with pytest.raises(ValueError, match="has 5 frames, the video to make 9"):
        generate_wan(WanRequest(**{**request.__dict__, "frames": 9}))


# In float32 a CPU's sums depend on where weights lie in memory, which differs by the file.
TO_THE_BIT = WanPlacement(dtype="bfloat16")


def test_converted_directory_gives_the_same_video(tmp_path):
    from nabla_attn.wan.convert import convert_wan

    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v", sparse_algo="nabla-0.5")
    target = convert_wan(source, tmp_path / "dst")
    options = {"size": "128*128", "frames": 5, "steps": 2, "seed": 4}
    original, _ = generate_wan(WanRequest(source, "a", **options), TO_THE_BIT)
    converted, record = generate_wan(WanRequest(target, "a", **options), TO_THE_BIT)
    assert np.array_equal(original, converted)
    assert record.config["sparse_algo"] == "nabla-0.5"
    with pytest.raises(ValueError, match="is a WanPipeline, vace-14B needs a WanVACEPipeline"):
        generate_wan(WanRequest(target, "a", "vace-14B", **options))
    rules = {"algorithm": "nabla-0.5", "dense_first_steps": 1}
    defaults = target / "defaults.json"
    defaults.write_text(json.dumps({"sparse_algo": "nabla-0.5", "schedule": rules}))
    for asked, is_dense in [(None, True), ("nabla-0.5", False)]:
        _, ruled = generate_wan(WanRequest(target, "a", sparse_algo=asked, **options))
        first, second = ruled.numbers["attention"]["density_per_step_and_layer"]
        assert (set(first) == {1.0}) is is_dense and max(second) < 1


@pytest.mark.parametrize(
    ("task", "family"), [("i2v-14B", "i2v"), ("flf2v-14B", "flf2v"), ("i2v-A14B", "i2v-2.2")]
)
def test_converted_directories_see_images_as_their_checkpoints(tmp_path, image, task, family):
    from nabla_attn.wan.convert import convert_wan

    source = tiny_wan.write_checkpoint(tmp_path / "src", family)
    target = convert_wan(source, tmp_path / "dst")
    options = {"size": "128*128", "frames": 5, "steps": 1, "seed": 4}
    options["inputs"] = dict.fromkeys(TASKS[task].flags, image)
    videos = [
        generate_wan(WanRequest(at, "a", task, **options), TO_THE_BIT)[0] for at in (source, target)
    ]
    assert np.array_equal(*videos)


def test_prompt_extension_by_a_local_model(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from nabla_attn.wan.prompt_extension import PromptExtension

    tiny_wan.write_tokenizer(tmp_path)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    config = Qwen2Config(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
        bos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    extension = PromptExtension(model=str(tmp_path), language="en")
    first = extension.extend("cat", 3, "cpu")
    assert first and first == extension.extend("cat", 3, "cpu")
    with pytest.raises(ValueError, match="unknown prompt_extend_target_lang 'fr'"):
        PromptExtension(model=str(tmp_path), language="fr").extend("cat", 3, "cpu")


def test_docs_name_every_flag_and_default():
    import typer
    from typer.main import get_command

    from nabla_attn.cli.wan import wan
    from nabla_attn.wan.tasks import task_table

    page = (Path(__file__).parents[2] / "docs" / "wan.md").read_text(encoding="utf-8")
    assert task_table() in page
    app = typer.Typer(add_completion=False)
    app.command()(wan)
    for option in get_command(app).params:
        name = option.opts[0]
        assert name == "--help" or f"`{name}`" in page, name


def test_settings_that_do_nothing_are_told(tmp_path, image):
    from nabla_attn.wan.prompt_extension import PromptExtension

    with pytest.warns(UserWarning, match="--negative_prompt is ignored at guidance 1"):
        request = make_request("t2v-14B", image, guidance=1.0, negative_prompt="dull").resolved()
    assert request.negative_prompt == ""
    with pytest.warns(UserWarning, match="are ignored without --use_prompt_extend"):
        PromptExtension(model=str(tmp_path), is_on=False).extend("a", 0, "cpu")


def test_no_word_about_the_task_s_own_negative_prompt(image, recwarn):
    assert make_request("t2v-14B", image, guidance=1.0).resolved().negative_prompt == ""
    assert not recwarn.list


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_half_characters_are_refused(name):
    with pytest.raises(ValueError, match="half a character"):
        WanRequest(**{"ckpt_dir": Path("ckpt"), "prompt": "a", name: "cut \ud83d"}).resolved()


def make_video(path, frames, height=128, width=128):
    from nabla_attn.generation.video import write_video

    write_video(np.zeros((frames, height, width, 3), np.uint8), path, 16)
    return str(path)


def test_inputs_that_are_cut_or_resized_are_told(tmp_path):
    files = {"src_video": make_video(tmp_path / "v.mp4", 9, 96, 192)}
    files["src_mask"] = make_video(tmp_path / "m.mp4", 5, 64, 64)
    with pytest.warns(UserWarning, match="only the first 5 frames are used"):
        inputs = read_inputs(files, 5)
    with (
        pytest.warns(UserWarning, match="--src_mask has 64x64 pixels"),
        pytest.warns(UserWarning, match="--src_video has 192x96 pixels; it is resized to 128x64"),
    ):
        assert fit_inputs(inputs, (128, 128), 32) == (128, 64)
    assert {frame.size for frame in inputs["video"]} == {(128, 64)}


def test_a_last_frame_of_another_shape_is_told(tmp_path, image):
    from PIL import Image

    Image.new("RGB", (90, 140)).save(tmp_path / "last.png")
    inputs = read_inputs({"first_frame": image, "last_frame": str(tmp_path / "last.png")}, 5)
    with pytest.warns(UserWarning, match="--last_frame has 90x140 pixels"):
        fit_inputs(inputs, (256, 160), 16)
    inputs["last_image"] = inputs["image"]
    fit_inputs(inputs, (256, 160), 16)


def test_the_video_has_the_size_that_the_record_says(tmp_path):
    folder = tiny_wan.write_checkpoint(tmp_path / "ckpt", "vace")
    source = make_video(tmp_path / "source.mp4", 5, 48, 96)
    request = WanRequest(
        folder, "a", "vace-14B", size="64*64", frames=5, steps=1, inputs={"src_video": source}
    )
    with pytest.warns(UserWarning, match="it is resized to 64x32"):
        video, record = generate_wan(request)
    assert video.shape == (5, 32, 64, 3)
    assert (record.config["height"], record.config["width"]) == (32, 64)
