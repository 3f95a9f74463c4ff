import pytest
from typer.testing import CliRunner

from nabla_attn import fusion
from nabla_attn.cli import app

SIZE = ["--height", "128", "--width", "128", "--frames", "5", "--device", "cpu"]


@pytest.fixture
def compiled(monkeypatch):
    """Functions that were asked for compiled; run as they are."""
    asked = []
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(fusion, "SAVED_SECONDS_PER_PAIR", 1.0)
    monkeypatch.setattr(
        fusion, "compiled", lambda function, dynamic=None: asked.append(function) or function
    )
    return asked


def nabla(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_every_algorithm_runs_one_step(tiny_wan, compiled):
    algorithms = ["--sparse-algo", "nabla-0.4", "--sparse_algo", "sta-1-1-1"]
    result = nabla("warmup", "--model", tiny_wan, *algorithms, *SIZE)
    assert result.exit_code == 0, result.output
    first, second, last = result.stdout.splitlines()
    assert first.startswith("nabla-0.4, 5 frames of 128x128:") and "graphs compiled" in first
    assert second.startswith("sta-1-1-1")
    assert last.startswith("cache: /")
    assert compiled


def test_what_a_generation_would_not_compile_is_not_compiled(tiny_wan, monkeypatch):
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(fusion, "compiled", lambda *_: pytest.fail("it was compiled"))
    result = nabla("warmup", "--model", tiny_wan, "--sparse-algo", "nabla-0.4", *SIZE)
    assert result.exit_code == 0 and "0 graphs compiled" in result.stdout


def test_bad_input_is_one_line(tiny_wan):
    result = nabla("warmup", "--model", tiny_wan, "--sparse-algo", "nabla-7", *SIZE)
    assert result.exit_code == 2 and "threshold" in result.stderr
    result = nabla("warmup", "--model", tiny_wan, *SIZE[:-2], "--frames", "6", "--device", "cpu")
    assert result.exit_code == 2 and "4n+1" in result.stderr
