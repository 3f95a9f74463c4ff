"""Two processes at one video give the frames of one."""

import os
import shlex
import subprocess
import sys

import pytest

import tiny_wan

# diffusers counts accelerators to place the processes; on a CPU there are none.
ON_CPU = """
import sys, torch
torch.accelerator.device_count = lambda: 2
from nabla_attn.cli import app
app(["wan", *sys.argv[1:]], prog_name="generate.py")
"""
FLAGS = "--size 256*128 --ckpt_dir {} --prompt a --frame_num 5 --sample_steps 2 --base_seed 3"


def run(launcher, task, checkpoint, out, flags=""):
    command = [*launcher, "--task", task, *shlex.split(f"{FLAGS.format(checkpoint)} {flags}")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--save_file", out], env=env, capture_output=True, text=True)
    return done.returncode, done.stderr, out


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t2v", "vace"])
@pytest.mark.parametrize(
    "flags",
    [
        "--dit_fsdp --t5_fsdp --sparse_algo dense",
        "--ulysses_size 2 --sparse_algo dense",
        "--ulysses_size 2 --sparse_algo nabla-0.7",
    ],
)
def test_two_processes(tmp_path, family, flags):
    checkpoint = tiny_wan.write_checkpoint(tmp_path / "ckpt", family, num_heads=2)
    task = "t2v-14B" if family == "t2v" else "vace-14B"
    script = tmp_path / "generate.py"
    script.write_text(ON_CPU)
    python = [sys.executable, script]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script]
    algo = flags[flags.index("--sparse_algo") :]
    code, said, one = run(python, task, checkpoint, tmp_path / "one.mp4", algo)
    assert code == 0, said
    code, said, two = run(torchrun, task, checkpoint, tmp_path / "two.mp4", flags)
    assert code == 0, said
    from nabla_attn.media import read_video

    difference = abs(read_video(one).astype(int) - read_video(two))
    assert difference.max() <= 2


def test_no_accelerator_to_place_processes_on(monkeypatch):
    from nabla_attn.wan.placement import WanPlacement, check_placement

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    with pytest.raises(ValueError, match="this machine has none"):
        check_placement(WanPlacement(ulysses_size=2), is_sparse=True)
    check_placement(WanPlacement(dit_fsdp=True, t5_fsdp=True), is_sparse=True)
    with pytest.raises(ValueError, match="4 \\* 1 is not 2"):
        check_placement(WanPlacement(ulysses_size=4), is_sparse=True)
    with pytest.raises(ValueError, match="t5_cpu and t5_fsdp exclude each other"):
        check_placement(WanPlacement(t5_cpu=True, t5_fsdp=True), is_sparse=True)
