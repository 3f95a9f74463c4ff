import os
import signal
import subprocess
import sys

import pytest
from tests.processes import NablaCommand
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.media import read_video
from nabla_attn.record import RunRecord

SIZE = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "2", "--device", "cpu"]
LIST = 'a red circle\n# two\n{"prompt": "a blue square", "seed": 7}\na green circle\n'


@pytest.fixture
def command(tiny_wan, tmp_path):
    (tmp_path / "list.txt").write_text(LIST)
    arguments = ["generate", "--prompts", tmp_path / "list.txt", "--model", tiny_wan, *SIZE]
    return [*map(str, [*arguments, "--output", tmp_path / "out"])]


def nabla(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def whole(folder):
    """Prompts by record, after seeing that nothing but whole videos is there."""
    records = {path.stem: RunRecord.load(path) for path in folder.glob("*.json")}
    names = {f"{stem}{suffix}" for stem in records for suffix in (".json", ".mp4")}
    assert {path.name for path in folder.iterdir()} == names
    for stem in records:
        assert len(read_video(folder / f"{stem}.mp4")) == 5
    return [records[stem].config["prompt"] for stem in sorted(records)]


ALL = ["a red circle", "a blue square", "a green circle"]


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_list_and_again(command, tmp_path, monkeypatch):
    result = nabla(*command)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert whole(out) == ALL
    assert [RunRecord.load(path).seed for path in sorted(out.glob("*.json"))] == [0, 7, 0]
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert "seed 7" in lines[1] and lines[1].endswith("a blue square")
    assert lines[3].endswith("3 videos: 3 made, 0 already there.")
    before = stamps(out)
    with monkeypatch.context() as patch:
        patch.setattr("nabla_attn.cli.options.load_quietly", None)
        again = nabla(*command)
    assert again.exit_code == 0, again.output
    assert again.stdout.endswith("3 videos: 0 made, 3 already there.\n")
    assert stamps(out) == before
    (tmp_path / "list.txt").write_text(LIST.replace("a green", "a small green"))
    assert "1 made, 2 already there" in nabla(*command).stdout
    assert before.items() <= stamps(out).items()


def test_failures_are_told(command, monkeypatch):
    from nabla_attn.generation import generate

    honest = generate.generate

    def fail_blue(pipeline, request, **options):
        if "blue" in request.prompt:
            raise RuntimeError("out of memory")
        return honest(pipeline, request, **options)

    monkeypatch.setattr(generate, "generate", fail_blue)
    result = nabla(*command)
    assert result.exit_code == 1
    assert "3 videos: 2 made, 0 already there, 1 failed." in result.stdout
    assert "out of memory" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["--prompt", "a circle"], "either --prompt TEXT or --prompts FILE"),
        (["--output", "a.mp4"], "writes a folder"),
        (["--record-maps"], "--record-maps is for one video"),
        (["--height", "33"], "height 33"),
        (["--steps", "0"], "steps"),
    ],
)
def test_bad_input_gets_one_line(command, tmp_path, change, words):
    result = nabla(*command, *change)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on(command, tmp_path, number):
    command[command.index("--steps") + 1] = "30"
    running = NablaCommand(tmp_path / "said", *command)
    running.wait_for("a red circle", running.stdout)
    assert running.send(number) == -number
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")}
    done = len(list((tmp_path / "out").glob("*.json")))
    assert 1 <= done < 3
    result = nabla(*command)
    assert f"{3 - done} made, {done} already there" in result.stdout, result.output
    assert whole(tmp_path / "out") == ALL
    finished = [path for path in before if path.suffix == ".json"]
    assert all(path.stat().st_mtime_ns == before[path] for path in finished)


def made_by(output):
    return [line.split("/")[-1].split(".mp4")[0] for line in output.splitlines() if "seed" in line]


def test_two_processes_make_each_once(command, tmp_path):
    (tmp_path / "list.txt").write_text("".join("a red circle\n" for _ in range(8)))
    running = [NablaCommand(tmp_path / f"said-{index}", *command) for index in range(2)]
    assert [each.exit_code() for each in running] == [0, 0]
    made = [name for each in running for name in made_by(each.stdout.read_text())]
    assert len(made) == len(set(made)) == 8
    assert len(whole(tmp_path / "out")) == 8


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]


@pytest.mark.slow
def test_torchrun_shares_a_list(command, tmp_path):
    launcher = [sys.executable, *TORCHRUN, "--master-port=29517", "-m", "nabla_attn.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert len(made_by(done.stdout)) == 3
    assert whole(tmp_path / "out") == ALL


# diffusers counts accelerators to place the processes; on a CPU there are none.
ON_CPU = """
import torch
torch.accelerator.device_count = lambda: 2
from nabla_attn.cli import app
app()
"""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nabla-0.5", "dense"])
def test_torchrun_shares_one_video(tiny_wan, tmp_path, algorithm):
    script = tmp_path / "nabla.py"
    script.write_text(ON_CPU)
    command = ["generate", "--prompt", "a red circle", "--model", tiny_wan, *SIZE]
    command += ["--height", "128", "--width", "128", "--sparse-algo", algorithm]
    command += ["--dtype", "float32", "--output"]
    alone = nabla(*command, tmp_path / "one.mp4")
    assert alone.exit_code == 0, alone.output
    launcher = [sys.executable, *TORCHRUN, "--master-port=29518", script]
    done = subprocess.run(
        [*map(str, [*launcher, *command, tmp_path / "two.mp4"])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.mp4:") == 1
    one, two = (read_video(tmp_path / name).astype(int) for name in ("one.mp4", "two.mp4"))
    assert abs(one - two).max() <= 2
    one, two = (RunRecord.load(tmp_path / name).numbers for name in ("one.json", "two.json"))
    assert abs(one["attention"]["density"] - two["attention"]["density"]) < 1e-3


def test_sharing_one_video_needs_gpus(tiny_wan, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    command = ["--prompt", "a", "--model", tiny_wan, *SIZE, "--output", tmp_path / "a.mp4"]
    result = nabla("generate", *command)
    assert result.exit_code == 2
    assert "this machine has 0" in result.stderr
    assert len(result.stderr.splitlines()) == 1
