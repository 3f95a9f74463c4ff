"""The commands give with a local Ray of two workers what they give without."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.tiny_diffusers import tiny_wan_pipeline

from nabla_attn.generation.video import write_video

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("ray", reason="Ray is not installed: pip install nabla-attn[ray]")
    folder = tmp_path_factory.mktemp("model")
    tiny_wan_pipeline(folder)
    return folder


def nabla(*arguments):
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nabla_attn.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def by_both(tmp_path, *arguments):
    """What the command prints by locks, and by Ray."""
    yield nabla(*arguments, "--output", tmp_path / "locks")
    yield nabla(*arguments, "--output", tmp_path / "ray", "--engine", "ray", "--workers", 2)


def digests(folder, pattern):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and not path.name.startswith(".")
    }


def test_lists_of_prompts(model, tmp_path):
    (tmp_path / "list.txt").write_text("a red circle\na blue square\nred\n")
    size = ("--height=32", "--width=32", "--frames=5", "--steps=1", "--sparse-algo=nabla-0.7")
    options = ("--model", model, "--device=cpu", "--dtype=float32", *size)
    locks, ray = by_both(tmp_path, "generate", "--prompts", tmp_path / "list.txt", *options)
    assert "3 videos: 3 made" in locks.stdout and "3 videos: 3 made" in ray.stdout
    found = digests(tmp_path / "locks", "*.mp4")
    assert len(found) == 3 and digests(tmp_path / "ray", "*.mp4") == found


def test_encode(model, tmp_path):
    for index in range(5):
        frames = np.random.default_rng(index).integers(0, 255, (5, 32, 32, 3), np.uint8)
        write_video(frames, tmp_path / "data" / f"{index}.mp4", 8)
        (tmp_path / "data" / f"{index}.txt").write_text(f"square {index}")
    options = ("--model", model, "--device=cpu", "--dtype=float32", "--shard-size=2", "--json")
    locks, ray = (
        json.loads(done.stdout) for done in by_both(tmp_path, "encode", tmp_path / "data", *options)
    )
    assert ray == locks | {"folder": str(tmp_path / "ray")} and ray["made"] == 3
    assert digests(tmp_path / "ray", "*") == digests(tmp_path / "locks", "*")


def test_evaluate(model, tmp_path):
    size = ("--height=32", "--width=32", "--frames=5", "--steps=1", "--sparse-algo=nabla-0.7")
    options = ("--model", model, "--device=cpu", "--dtype=float32", "--num-prompts=2", *size)
    list(by_both(tmp_path, "evaluate", *options))
    found = digests(tmp_path / "locks", "*.mp4")
    assert len(found) == 4 and digests(tmp_path / "ray", "*.mp4") == found
    assert (tmp_path / "ray" / "summary.json").is_file()
