import json
import shutil

import pytest
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.cli.group import spell_as_declared

SIZE = {"--height": "64", "--width": "64", "--frames": "5", "--steps": "2", "--device": "cpu"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def run(verb, **options):
    args = [text for name, value in options.items() for text in (name, str(value))]
    return CliRunner().invoke(app, [verb, *args])


def one_line(result, *words):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def good(tiny_wan, tmp_path):
    values = {"--prompt": "a red circle", "--model": tiny_wan, "--output": tmp_path / "a.mp4"}
    yield values | SIZE
    assert not list(tmp_path.rglob("*.mp4"))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--sparse-algo": "magic-3"}, ["magic-3", "nabla-0.7"]),
        ({"--sparse-algo": "nabla-1.7"}, ["nabla-1.7", "(0, 1]"]),
        ({"--sparse-algo": ""}, ["empty"]),
        ({"--height": "100"}, ["height 100", "96 or 112"]),
        ({"--width": "1"}, ["width 1 ", "16"]),
        ({"--frames": "6"}, ["frames 6", "5 or 9"]),
        ({"--frames": "0"}, ["frames must be at least 1"]),
        ({"--steps": "-4"}, ["steps must be at least 1, got -4"]),
        ({"--steps": "many"}, ["--steps", "integer"]),
        ({"--guidance": "nan"}, ["guidance"]),
        ({"--seed": "-1"}, ["seed"]),
        ({"--fps": "0"}, ["fps"]),
        ({"--device": "abacus"}, ["abacus"]),
        ({"--dtype": "int4"}, ["int4", "bfloat16"]),
        ({"--schedule": "/nowhere.json"}, ["/nowhere.json"]),
        ({"--output": "/proc/nowhere/a.mp4"}, ["/proc/nowhere/a.mp4"]),
        ({"--output": "a.gif"}, [".mp4", "a.gif"]),
        ({"--model": "/nowhere"}, ["/nowhere", "not found"]),
        ({"--colour": "red"}, ["--colour"]),
    ],
)
def test_bad_values_get_one_line(good, change, words):
    one_line(run("generate", **(good | change)), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "abacus"], ["abacus"]),
        (["--scaling", "--base", "HEAD"], ["--scaling", "drop --workload, --base"]),
        (["--crossover", "--workload", "map-36k"], ["--crossover", "drop --workload"]),
        (["--layers", "2"], ["--layers", "--model"]),
        (["--docs", "docs", "--base", "HEAD"], ["--docs", "--workload", "drop --base"]),
    ],
)
def test_a_benchmark_ignores_nothing(flags, words, tmp_path):
    one_line(CliRunner().invoke(app, ["bench", "--output", str(tmp_path), *flags]), *words)


def test_a_missing_prompt_and_an_unknown_verb(good):
    del good["--prompt"]
    one_line(run("generate", **good), "--prompt")
    one_line(run("genarate"), "there is no command 'genarate'. Did you mean generate?")


def test_output_under_a_file(good, tmp_path):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "a.mp4"
    one_line(run("generate", **(good | {"--output": output})), str(output))


def test_broken_models_get_one_line(good, tiny_wan, tmp_path):
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    good["--model"] = model
    weights = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(weights[:5000])
    one_line(run("generate", **good), WEIGHTS, "truncated")
    (model / WEIGHTS).write_bytes(weights)
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 5}))
    one_line(run("generate", **good), str(config), "does not match")
    (model / "model_index.json").unlink()
    one_line(run("generate", **good), "model_index.json")


def test_a_broken_schedule_is_named(good, tmp_path):
    path = tmp_path / "rules.json"
    for text in ("{", '{"algorithm": "magic"}', '{"algorithm": "nabla-0.7", "speed": 9}'):
        path.write_text(text)
        one_line(run("generate", **(good | {"--schedule": path})), "rules.json")


def test_compare_needs_something_to_compare(good, tmp_path):
    good |= {"--output": tmp_path / "out", "--sparse-algo": "dense"}
    one_line(run("compare", **good), "nothing to compare")


def test_other_errors_keep_their_traceback(good, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("nabla_attn.generation.job.generate", fail)
    result = run("generate", **good)
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--sparse_algo", "a_b"], ["--sparse-algo", "a_b"]),
        (["--sparse_algo=a_b"], ["--sparse-algo=a_b"]),
        (["--frame-num", "5"], ["--frame_num", "5"]),
        (["--unknown_name", "x"], ["--unknown_name", "x"]),
        (["--", "--sparse_algo"], ["--", "--sparse_algo"]),
        (["-h", "some_text"], ["-h", "some_text"]),
    ],
)
def test_spelling(args, expected):
    assert spell_as_declared(args, ["--sparse-algo", "--frame_num", "-h"]) == expected
