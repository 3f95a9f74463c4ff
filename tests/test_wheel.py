"""The wheel, installed in an environment of its own that only borrows the dependencies."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import nabla_attn as na

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", ROOT, *options, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment with the wheel; what it needs is looked up where torch lies."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    found = folder / "bin" / "python"
    run(found, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    return found


def test_it_works_from_another_directory(python, tmp_path):
    nabla = python.with_name("nabla")
    place = run(python, "-c", "import nabla_attn; print(nabla_attn.__file__)", cwd=tmp_path)
    assert Path(place).is_relative_to(python.parents[1])
    assert run(nabla, "--version", cwd=tmp_path) == f"nabla-attn {na.__version__}"
    size = ("--height", "64", "--width", "64", "--frames", "5", "--steps", "1")
    run(nabla, "generate", "--prompt", "a red circle", *size, "--output", "a.mp4", cwd=tmp_path)
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert (tmp_path / "a.json").is_file()


def test_it_holds_what_users_need_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        page = Parser().parsestr(archive.read(metadata).decode()).get_payload()
    assert "nabla_attn/py.typed" in names
    assert any(name.startswith("nabla_attn/moving_shapes/model/") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]
    # A package index knows no other file of the project.
    assert "](docs/" not in page and "](CONTRIBUTING" not in page
    assert page.startswith("# nabla-attn") and "](https://arxiv.org" in page
