"""The six command lines of the reference's README, and every flag of its generate.py."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_wan
from nabla_attn.cli import app
from nabla_attn.media import read_video
from nabla_attn.wan import tasks as wan_tasks

ROOT = Path(__file__).parents[2]
VALUES = {"prompt": "dragon", "frame_num": 1, "thr": 0.6, "wT": 11, "wH": 3, "wW": 3}
TUNED, PLAIN = "./Wan2.1-T2V-14B-NABLA", "./Wan2.1-T2V-14B"
START = "python generate.py --task t2v-14B --size 1280*720 --ckpt_dir"
END = "--prompt {prompt} --frame_num {frame_num}"
# Line as in the README, and the algorithm that has to run.
LINES = {
    f"{START} {TUNED}-0.7 {END}": "nabla-0.7",
    f"{START} {TUNED}-0.6-STA-11-3-3 {END}": "nabla-0.6_sta-11-3-3",
    f"{START} {TUNED}-0.6-STA-11-5-5 {END}": "nabla-0.5_sta-11-5-5",
    f"{START} {PLAIN} {END} --sparse_algo nabla-{{thr}}": "nabla-0.6",
    f"{START} {PLAIN} {END} --sparse_algo sta-{{wT}}-{{wH}}-{{wW}}": "sta-11-3-3",
    f"{START} {PLAIN} {END} --sparse_algo nabla-{{thr}}_sta-{{wT}}-{{wH}}-{{wW}}": (
        "nabla-0.6_sta-11-3-3"
    ),
}
CHECKPOINTS = {
    f"{TUNED}-0.7": "nabla-0.7",
    f"{TUNED}-0.6-STA-11-3-3": "nabla-0.6_sta-11-3-3",
    f"{TUNED}-0.6-STA-11-5-5": "nabla-0.5_sta-11-5-5",
    PLAIN: None,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A directory with generate.py and the four checkpoints that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "generate.py").symlink_to(ROOT / "generate.py")
    for name, algo in CHECKPOINTS.items():
        config = {} if algo is None else {"sparse_algo": algo}
        tiny_wan.write_checkpoint(folder / name, "t2v", **config)
    return folder


def run(arguments):
    """Run the command in this process; gives its exit code."""
    with pytest.raises(SystemExit) as ended:
        app(arguments, prog_name="generate.py")
    return ended.value.code


def read_result(folder):
    video = sorted(folder.glob("*.mp4"), key=lambda path: path.stat().st_mtime_ns)[-1]
    return read_video(video), json.loads(video.with_suffix(".json").read_text())


@pytest.mark.parametrize("line", LINES)
def test_readme_line_with_two_steps(workdir, monkeypatch, line):
    """As in the README, with two steps of the task's own 50; all but one at a smaller size."""
    monkeypatch.chdir(workdir)
    short = replace(wan_tasks.TASKS["t2v-14B"], steps=2)
    monkeypatch.setitem(wan_tasks.TASKS, "t2v-14B", short)
    width, height = (1280, 720) if line == list(LINES)[-1] else (400, 240)
    words = shlex.split(line.format(**VALUES).replace("1280*720", f"{width}*{height}"))
    assert run(["wan", *words[2:]]) == 0
    video, record = read_result(workdir)
    assert video.shape == (1, height, width, 3)
    assert record["config"]["sparse_algo"] == LINES[line]
    assert record["config"]["wan"]["negative_prompt"] == wan_tasks.NEGATIVE


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_readme_line_verbatim(workdir, line):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = shlex.split(line.format(**VALUES))
    done = subprocess.run(
        command, cwd=workdir, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    video, record = read_result(workdir)
    assert video.shape == (1, 720, 1280, 3)
    assert record["config"]["steps"] == 50
    assert record["config"]["sparse_algo"] == LINES[line]


SMALL = "--size 128*128 --frame_num 5 --sample_steps 1 --prompt a --base_seed 3"


@pytest.fixture
def here(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(workdir)
    return tmp_path


@pytest.mark.parametrize("verb", ["wan", "generate"])
def test_dashes_and_underscores(here, verb):
    out = here / "out.mp4"
    flags = f"--task t2v-14B --ckpt-dir {PLAIN} --save-file {out} {SMALL} --sample-solver dpm++"
    assert run([verb, *shlex.split(flags.replace("--frame_num", "--frame-num"))]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["seed"] == 3
    assert record["config"]["wan"]["solver"] == "dpm++"
    assert record["config"]["sparse_algo"] == "dense"


def test_what_is_said_about_sparsity(here, capsys):
    out = f"--save_file {here / 'o.mp4'}"
    flags = f"--ckpt_dir {PLAIN} {SMALL} --sparse_attention --offload_model True {out}"
    assert run(["wan", *shlex.split(flags)]) == 0
    said = capsys.readouterr().err
    assert "attention dense (the checkpoint names no algorithm" in said
    assert "--sparse_attention has no effect" in said


def test_an_existing_video_is_replaced_only_when_asked(here, capsys):
    out = here / "o.mp4"
    out.write_bytes(b"mine")
    flags = (
        f"--ckpt_dir {PLAIN} {SMALL.replace('--frame_num 5', '--frame_num 1')} --save_file {out}"
    )
    assert run(["wan", *shlex.split(flags)]) == 0
    assert out.read_bytes() == b"mine" and read_video(here / "o-2.mp4").shape[0] == 1
    assert "Pass --overwrite" in capsys.readouterr().err
    assert run(["wan", *shlex.split(flags), "--overwrite"]) == 0
    assert read_video(out).shape[0] == 1


def test_crop_to_blocks(here):
    out = here / "o.mp4"
    flags = f"--ckpt_dir {PLAIN} {SMALL} --crop_to_blocks --save_file {out}"
    assert run(["wan", *shlex.split(flags.replace("128*128", "272*144"))]) == 0
    assert read_video(out).shape == (5, 128, 256, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task t2v-99B", "unknown task 't2v-99B'. Known: t2v-1.3B"),
        ("--task i2v-14B", "i2v-14B needs --image FILE"),
        ("--task i2v-14B --image nothing.png", "no such file: nothing.png"),
        ("--task i2v-14B --image generate.py", "generate.py is no readable image"),
        ("--image generate.py", "t2v-14B takes no --image. Its input flags: none"),
        ("--task vace-14B --src_mask generate.py", "Pass --src_video FILE too"),
        ("--task vace-14B", "is a checkpoint for t2v-1.3B or t2v-14B or t2i-14B"),
        ("--task t2i-14B", "frame_num must be 1, got 5"),
        ("--frame_num 6", "frame_num must be 4n+1, got 6. Nearest: 5 or 9"),
        ("--size 130*128", "width 130 of size 130*128 is no multiple of 16. Nearest: 128 or 144"),
        ("--size wide", "size must be WIDTH*HEIGHT"),
        ("--size 100*100 --crop_to_blocks", "leaves nothing"),
        ("--sample_steps 0", "sample_steps must be at least 1"),
        ("--sample_shift 0", "shift must be positive"),
        ("--sample_solver euler", "unknown solver 'euler'. Known: unipc, dpm++"),
        ("--sparse_algo nabla-7", "nabla threshold must be in (0, 1]"),
        ("--offload_model perhaps", "offload_model must be True or False"),
        ("--ring_size 2 --sparse_algo nabla-0.7", "ring attention passes keys along"),
        ("--ulysses_size 2", "torchrun --nproc_per_node"),
        ("--dit_fsdp", "torchrun --nproc_per_node"),
        ("--use_prompt_extend", "needs an instruct model on disk"),
        ("--use_prompt_extend --prompt_extend_method dashscope", "remote service"),
        ("--save_file out.gif", "writes a .mp4 file"),
        ("--save_file generate.py/out.mp4", "cannot write"),
        ("--ckpt_dir ./nothing", "no such checkpoint"),
        ("--prompt ''", "no prompt"),
    ],
)
def test_bad_input_says_how_to_mend_it(here, capsys, flags, message):
    code = run(["wan", *shlex.split(f"--ckpt_dir {PLAIN} {SMALL} {flags}")])
    said = " ".join(capsys.readouterr().err.split())
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_full_disk(here, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert run(["wan", *shlex.split(f"--ckpt_dir {PLAIN} {SMALL}")]) == 2
    assert "no space for" in capsys.readouterr().err


def test_convert_verb(workdir, tmp_path, capsys):
    source, target = str(workdir / PLAIN), str(tmp_path / "dst")
    assert run(["convert", source, target]) == 0
    assert "compared with" in capsys.readouterr().out
    assert run(["convert", target, str(tmp_path / "again")]) == 2
    assert "is a diffusers directory already" in capsys.readouterr().err
    assert run(["convert", source, target, "--dtype", "int8"]) == 2
