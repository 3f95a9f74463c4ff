import json
import signal
import subprocess
import sys

import pytest
from tests.processes import NablaCommand
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.media import read_video
from nabla_attn.record import RunRecord

SIZE = ["--height", "128", "--width", "128", "--frames", "5", "--steps", "4", "--device", "cpu"]
SMALLEST = ["--height", "32", "--width", "32", "--frames", "1", "--steps", "1"]
PROMPT = ["--prompt", "a red circle moving right"]


def nabla(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_four_steps_end_to_end(tiny_wan, tmp_path):
    output = tmp_path / "new folder" / "video.mp4"
    result = nabla(
        "generate", *PROMPT, "--model", tiny_wan, "--sparse-algo", "nabla-0.4", *SIZE,
        "--seed", 3, "--fps", 10, "--dtype", "float32", "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "of token pairs kept" in result.stdout
    assert read_video(output).shape == (5, 128, 128, 3)
    record = RunRecord.load(output.with_suffix(".json"))
    assert record.seed == 3
    assert record.config["sparse_algo"] == "nabla-0.4"
    assert record.config["frames"] == 5
    assert len(record.numbers["attention"]["density_per_step_and_layer"]) == 4
    assert len(record.numbers["seconds"]["transformer_steps"]) == 4
    assert {path.name for path in output.parent.iterdir()} == {"video.mp4", "video.json"}


def test_both_spellings_make_the_same_bytes(tiny_wan, tmp_path):
    for name, algo, negative in (
        ("a.mp4", "--sparse-algo", "--negative-prompt"),
        ("b.mp4", "--sparse_algo", "--negative_prompt"),
    ):
        result = nabla(
            "generate", *PROMPT, "--model", tiny_wan, algo, "nabla-0.4", negative, "a blue square",
            *SIZE, f"--output={tmp_path / name}",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    records = [RunRecord.load(tmp_path / name) for name in ("a.json", "b.json")]
    assert records[0].config == records[1].config
    assert records[0].numbers["frames_sha256"] == records[1].numbers["frames_sha256"]


def test_a_schedule_file_brings_its_algorithm(tiny_wan, tmp_path):
    rules = {"algorithm": "nabla-0.4", "dense_first_steps": 1, "dense_layers": [0]}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    arguments = [*PROMPT, "--model", tiny_wan, *SIZE, "--schedule", tmp_path / "rules.json"]
    result = nabla("generate", *arguments, "--output", tmp_path / "a.mp4")
    assert result.exit_code == 0, result.output
    density = RunRecord.load(tmp_path / "a.json").numbers["attention"]["density_per_step_and_layer"]
    assert density[0] == [1, 1]
    assert [step[0] for step in density] == [1, 1, 1, 1]
    assert all(step[1] < 1 for step in density[1:])


def test_defaults_come_from_the_model(tiny_wan, tmp_path):
    import shutil

    model = shutil.copytree(tiny_wan, tmp_path / "model")
    values = {"height": 64, "width": 48, "frames": 1, "steps": 2, "sparse_algo": "nabla-0.6"}
    (model / "defaults.json").write_text(json.dumps(values))
    result = nabla("generate", *PROMPT, "--model", model, "--output", tmp_path / "a.mp4")
    assert result.exit_code == 0, result.output
    record = RunRecord.load(tmp_path / "a.json")
    assert {name: record.config[name] for name in values} == values


def test_a_first_frame_is_gone_on_from(tiny_wan, tmp_path):
    from PIL import Image
    from tests.training.tiny_pipelines import wan_i2v

    wan_i2v().save_pretrained(tmp_path / "model")
    asked = ["generate", *PROMPT, "--frames", 5, "--height", 32, "--width", 48, "--steps", 2]
    asked += ["--sparse-algo", "nabla-0.5"]

    def make(name, *options):
        return nabla(*asked, *options, "--output", tmp_path / f"{name}.mp4")

    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (48, 32), color).save(tmp_path / f"{name}.png")
        image = ("--model", tmp_path / "model", "--image", tmp_path / f"{name}.png")
        result = make(name, *image)
        assert result.exit_code == 0, result.output
    records = [RunRecord.load(tmp_path / f"{name}.json") for name in ("red", "blue")]
    assert len({record.config["image_sha256"] for record in records}) == 2
    assert len({record.numbers["frames_sha256"] for record in records}) == 2
    Image.new("RGB", (64, 32)).save(tmp_path / "large.png")
    (tmp_path / "list.txt").write_text("a red circle")
    model = ("--model", tmp_path / "model")
    for options, words in [
        ((*model, "--image", tmp_path / "large.png"), "64x32 pixels and the video 48x32"),
        ((*model, "--image", tmp_path / "list.txt"), "is no readable image"),
        (model, "makes videos from a first frame, and got none. Add --image FIRST_FRAME.png"),
        (("--model", tiny_wan, "--image", tmp_path / "red.png"), "takes no image: it makes videos"),
    ]:
        result = make("no", *options)
        assert result.exit_code == 2 and words in " ".join(result.output.split())
    asked[1:3] = ["--prompts", tmp_path / "list.txt"]
    result = make("no", *model, "--image", tmp_path / "red.png")
    assert result.exit_code == 2 and "--image is for one video" in result.output


def test_a_last_frame_is_led_to(tmp_path, monkeypatch):
    from PIL import Image
    from tests.training.tiny_pipelines import wan22_i2v, wan_i2v

    both, first, five = (tmp_path / name for name in ("both", "first", "five"))
    wan_i2v(pos_embed_seq_len=10).save_pretrained(both)
    wan_i2v().save_pretrained(first)
    wan22_i2v().save_pretrained(five)
    asked = ["generate", *PROMPT, "--frames", 5, "--height", 32, "--width", 48, "--steps", 2]
    image = Image.new("RGB", (32, 48), "red")
    image.paste("white", (0, 0, 32, 24))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    image.save(tmp_path / "phone.png", exif=exif)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    Image.new("RGB", (32, 48), "red").save(tmp_path / "tall.png")

    def make(name, model, **images):
        frames = [(f"--{key.replace('_', '-')}", tmp_path / file) for key, file in images.items()]
        options = [part for pair in frames for part in pair]
        return nabla(*asked, *options, "--model", model, "--output", tmp_path / f"{name}.mp4")

    for name in ("red", "phone"):
        result = make(name, both, image="red.png", last_image=f"{name}.png")
        assert result.exit_code == 0, result.output
    records = [RunRecord.load(tmp_path / f"{name}.json") for name in ("red", "phone")]
    assert len({record.config["last_image_sha256"] for record in records}) == 2
    assert len({record.numbers["frames_sha256"] for record in records}) == 2

    # Before any weights are read.
    monkeypatch.setattr("nabla_attn.cli.options.load_quietly", None)
    pair = {"image": "red.png", "last_image": "red.png"}
    for model, images, words in [
        (both, {"image": "red.png"}, "between a first and a last frame, and got the first only"),
        (first, pair, "was trained for a first frame only. Drop --last-image"),
        (five, pair, "reads a first frame only. Drop --last-image"),
        (both, {"last_image": "red.png"}, "--last-image needs the first frame too"),
        (both, pair | {"last_image": "tall.png"}, "tall.png has 32x48 pixels and the video 48x32"),
        (both, {}, "makes videos from a first frame, and got none. Add --image"),
    ]:
        result = make("no", model, **images)
        assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output


def test_python_dash_m_warns_in_one_line(tiny_wan, tmp_path):
    command = [sys.executable, "-m", "nabla_attn.cli", "generate", "--prompt", "red " * 600]
    command += ["--model", tiny_wan, *SIZE, *SMALLEST, "--output", tmp_path / "a.mp4"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.mp4").is_file()
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert warnings == [
        "warning: the prompt has 601 tokens and the text encoder reads 512: the rest is ignored."
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_no_mp4(tiny_wan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["--model", tiny_wan, *SIZE, "--steps", 20000, "--output", out / "a.mp4"]
    command = NablaCommand(tmp_path / "said", "generate", "--prompt", "a red unicorn", *arguments)
    # The warning about the unicorn comes just before sampling starts.
    command.wait_for("unicorn", command.stderr)
    assert "note: memory" in command.stderr.read_text().splitlines()[0]
    assert command.send(signal.SIGINT) == 130
    said = command.stderr.read_text()
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not list(out.iterdir())
