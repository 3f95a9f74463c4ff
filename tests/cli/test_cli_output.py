"""What is printed, and which files are written."""

import json
import logging

import pytest
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.cli.output import free_path, table_lines

SIZE = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "1", "--device", "cpu"]


def nabla(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def make(tiny_wan, tmp_path):
    """Make a small video, with further options."""
    asked = ["generate", "--prompt", "red", "--model", tiny_wan, "--dtype", "float32", *SIZE]
    return lambda *options: nabla(*asked, "--output", tmp_path / "a.mp4", *options)


HEADER = ("algorithm", "pairs kept", "transformer", "speed-up")
ROWS = [("dense", "100.0%", "12.10 s", "1.00x"), ("nabla-0.7_sta-3-3-3", "7.9%", "9.00 s", "1.34x")]


@pytest.mark.parametrize("width", [None, 80, 40, 10])
def test_tables_are_whole_at_any_width(width):
    lines = table_lines(HEADER, ROWS, width)
    words = " ".join(lines).split()
    for cell in ("dense", "nabla-0.7_sta-3-3-3", "100.0%", "1.00x", "1.34x"):
        assert cell in words
    assert "pairs kept" in "\n".join(lines)
    if width in (80, 40):
        assert max(map(len, lines)) <= width
    if width is None:
        assert len(lines) == 4


def test_nothing_is_replaced_unasked(make, tmp_path):
    assert make().exit_code == 0
    first = (tmp_path / "a.mp4").read_bytes()
    result = make("--sparse-algo", "dense", "--seed", 1)
    assert f"a.mp4 exists: writing {tmp_path / 'a-2.mp4'}" in result.stderr
    assert (tmp_path / "a.mp4").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.mp4", "a.json", "a-2.mp4", "a-2.json",
    }  # fmt: skip
    result = make("--seed", 2, "--overwrite")
    assert result.exit_code == 0 and "exists" not in result.stderr
    assert (tmp_path / "a.mp4").read_bytes() != first


def test_folders_are_not_replaced_either(tmp_path):
    (tmp_path / "out").mkdir()
    assert free_path(tmp_path / "out", overwrite=False) == tmp_path / "out"
    (tmp_path / "out" / "file").touch()
    assert free_path(tmp_path / "out", overwrite=False) == tmp_path / "out-2"
    assert free_path(tmp_path / "out", overwrite=True) == tmp_path / "out"


def test_results_as_one_json_object(make, tmp_path):
    result = make("--json")
    values = json.loads(result.stdout)
    assert values.keys() == {"video", "record", "memory", "config", "numbers"}
    assert values["video"] == str(tmp_path / "a.mp4")
    assert values["config"] == json.loads((tmp_path / "a.json").read_text())["config"]


def test_quiet_prints_warnings_only(make):
    result = make("--quiet", "--negative-prompt", "blue", "--guidance", 1)
    assert result.exit_code == 0 and not result.stdout
    assert result.stderr.splitlines() == [
        "warning: the negative prompt is ignored: guidance 1 is none. Pass --guidance above 1."
    ]
    assert "nabla" in nabla("info").stdout


def test_warnings_of_libraries_are_shown_once(make, monkeypatch):
    from nabla_attn.generation import job

    real = job.generate

    def generate(*args, **options):
        for _ in range(2):
            logging.getLogger("diffusers.pipelines").warning("half of the\nLoRA is dropped")
            logging.getLogger("diffusers.pipelines").warning(
                "Guiders are currently an experimental"
            )
        return real(*args, **options)

    monkeypatch.setattr(job, "generate", generate)
    note, warning = make().stderr.splitlines()
    assert note.startswith("note: memory") and warning == "warning: half of the LoRA is dropped"


@pytest.mark.parametrize("name", ["--prompt", "--prompts"])
def test_empty_prompts_are_refused(tiny_wan, tmp_path, name):
    (tmp_path / "list.txt").write_text("\n# nothing\n")
    value = {"--prompt": "  ", "--prompts": tmp_path / "list.txt"}[name]
    output = ("--output", tmp_path / "x.mp4")
    result = nabla("generate", name, value, "--model", tiny_wan, *SIZE, *output)
    assert result.exit_code == 2 and "prompt" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
