"""Conversion to a diffusers directory: same pipeline, resumed, verified, within its memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import tiny_wan
from nabla_attn.generation.request import ModelDefaults
from nabla_attn.wan import WAN_FAMILIES, load_wan_pipeline, load_wan_transformer, read_layout
from nabla_attn.wan.convert import LOCK, RECORD, convert_wan
from nabla_attn.wan.tasks import TASKS

FP32 = torch.float32
STEM = "diffusion_pytorch_model"


def components(pipe):
    names = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
    parts = {name: getattr(pipe, name, None) for name in names}
    return {name: part.state_dict() for name, part in parts.items() if part is not None}


@pytest.mark.parametrize("family", WAN_FAMILIES)
def test_round_trip_through_plain_diffusers(tmp_path, family):
    from diffusers import DiffusionPipeline

    source = tiny_wan.write_checkpoint(tmp_path / "src", family)
    target = convert_wan(source, tmp_path / "dst", max_shard_bytes=40_000)
    pipe = DiffusionPipeline.from_pretrained(target, local_files_only=True)
    ours = load_wan_pipeline(source, dtype=FP32, text_dtype=FP32)
    assert type(pipe) is type(ours)
    assert pipe.config.get("boundary_ratio") == ours.config.get("boundary_ratio")
    for name, state in components(ours).items():
        converted = components(pipe)[name]
        assert state.keys() == converted.keys()
        for key, value in state.items():
            assert torch.equal(value, converted[key].float()), (name, key)
    assert len(list((target / "transformer").glob("*.safetensors"))) > 1
    assert pipe.tokenizer("abc").input_ids == ours.tokenizer("abc").input_ids


def test_the_algorithm_comes_along(tmp_path):
    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v", sparse_algo="nabla-0.7")
    target = convert_wan(source, tmp_path / "dst", dtype=torch.bfloat16)
    assert ModelDefaults.load(target).sparse_algo == "nabla-0.7"


def test_resumes_where_it_was_stopped(tmp_path):
    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v", num_layers=2)
    target = tmp_path / "dst"

    def stop(stage, done, total):
        if "transformer" in stage and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_wan(source, target, max_shard_bytes=20_000, on_progress=stop)
    assert not (target / "model_index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*.safetensors")}
    torn = next(iter(sorted(target.glob("transformer/*.safetensors"))))
    torn.write_bytes(torn.read_bytes()[:-7])
    convert_wan(source, target, max_shard_bytes=20_000)
    assert (target / "model_index.json").is_file()
    for path, written in before.items():
        assert (path.stat().st_mtime_ns == written) == (path != torn), path
    assert not list(target.rglob("*.tmp"))


def test_bad_writing_is_noticed(tmp_path, monkeypatch):
    import safetensors.torch

    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v")
    save = safetensors.torch.save_file

    def corrupt(tensors, path, metadata):
        save({n: t + 1 for n, t in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", corrupt)
    with pytest.raises(ValueError, match="differs from its source after writing"):
        convert_wan(source, tmp_path / "dst")


def test_other_targets_are_left_alone(tmp_path, monkeypatch):
    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v")
    target = tmp_path / "dst"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert_wan(source, target)
    (target / "mine.txt").unlink()
    convert_wan(source, target)
    with pytest.raises(ValueError, match="another dtype"):
        convert_wan(source, target, dtype=torch.bfloat16)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="the disk has"):
        convert_wan(source, tmp_path / "full")


def test_room_is_asked_for_in_the_dtype_that_is_written(tmp_path, monkeypatch):
    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v", num_layers=2)
    wide = convert_wan(source, tmp_path / "wide", dtype=torch.float32)
    narrow = convert_wan(source, tmp_path / "narrow", dtype=torch.bfloat16)
    sizes = [sum(p.stat().st_size for p in at.rglob("*.safetensors")) for at in (wide, narrow)]
    assert sizes[1] < sizes[0]
    usage = type("Usage", (), {"free": sum(sizes) // 2})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    convert_wan(source, tmp_path / "again", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the disk has"):
        convert_wan(source, tmp_path / "full", dtype=torch.float32)


MEASURE = """
import sys, threading
import diffusers, transformers
from nabla_attn.wan import load_wan_transformer
from nabla_attn.wan.convert import convert_wan

def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

convert_wan(sys.argv[1], sys.argv[2])  # imports and caches
peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())

before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
work = convert_wan if len(sys.argv) > 4 else load_wan_transformer
kept = work(*sys.argv[3:])
done.set()
watcher.join()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("verb", ["convert", "load"])
def test_memory_of_the_process(tmp_path, monkeypatch, verb):
    small = tiny_wan.write_checkpoint(tmp_path / "small", "t2v")
    monkeypatch.setattr(tiny_wan, "WIDTH", 384)
    monkeypatch.setattr(tiny_wan, "FFN", 1024)
    big = tiny_wan.write_checkpoint(tmp_path / "big", "t2v", num_layers=12, num_heads=3)
    largest = (big / f"{STEM}.safetensors").stat().st_size
    paths = [small, tmp_path / "warm", big]
    if verb == "convert":
        paths.append(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True
    )
    peak = int(done.stdout.split()[-1])
    assert peak <= 1.2 * largest, f"{peak / largest:.2f} of the largest part"


@pytest.mark.parametrize("family", WAN_FAMILIES)
def test_samples_as_the_task_does(tmp_path, family):
    source = tiny_wan.write_checkpoint(tmp_path / "src", family)
    target = convert_wan(source, tmp_path / "dst")
    task = TASKS[read_layout(source).task]
    scheduler = json.loads((target / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == task.shift
    found = ModelDefaults.load(target)
    assert (found.fps, found.frames, found.steps) == (task.fps, task.frames, task.steps)
    assert found.guidance == task.guidance
    assert f"{found.width}*{found.height}" == task.usual_size
    assert task.shift_for((found.width, found.height)) == task.shift


def test_the_size_of_a_model_tells_its_task():
    t2v = WAN_FAMILIES["t2v"]
    assert (t2v.task_for(1536), t2v.task_for(5120)) == ("t2v-1.3B", "t2v-14B")
    assert TASKS["t2v-1.3B"].usual_size == "832*480"


def break_off(source, target, **options):
    def stop(stage, done, total):
        if stage == "converting transformer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_wan(source, target, on_progress=stop, **options)


def test_what_a_killed_run_left_is_removed(tmp_path):
    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v")
    break_off(source, tmp_path / "dst")
    torn = tmp_path / "dst" / "transformer" / f".{STEM}.safetensors.0123456789abcdef.tmp"
    torn.write_bytes(b"half")
    (tmp_path / "dst" / f".{RECORD}.0123456789abcdef.tmp").write_bytes(b"{")
    convert_wan(source, tmp_path / "dst")
    assert not [path for path in (tmp_path / "dst").rglob("*") if path.name.startswith(".")]


def test_a_damaged_source_that_is_replaced_is_accepted(tmp_path):
    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v")
    path = source / "models_t5_umt5-xxl-enc-bf16.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="models_t5"):
        convert_wan(source, tmp_path / "dst")
    path.write_bytes(whole)
    assert (convert_wan(source, tmp_path / "dst") / "model_index.json").is_file()


def test_what_lies_there_is_compared_with_the_new_source(tmp_path):
    """Weights of another download with the same shapes, in other numbers of files."""
    source, target = tmp_path / "src", tmp_path / "dst"
    tiny_wan.write_checkpoint(source, "t2v", num_layers=2)
    break_off(source, target, max_shard_bytes=20_000)
    torch.manual_seed(99)
    tiny_wan.write_transformer(source, "t2v", num_layers=2)
    convert_wan(source, target)
    written = load_file(target / "transformer" / f"{STEM}.safetensors")
    expected = load_wan_transformer(source).state_dict()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert len(list((target / "transformer").glob("*.safetensors*"))) == 1
    with pytest.raises(ValueError, match="was made from other files"):
        tiny_wan.write_transformer(source, "t2v", num_layers=2)
        convert_wan(source, target)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*_, **__):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v")
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match=r"cannot write [^\n]*: no space left on device\.$"):
        convert_wan(source, tmp_path / "dst")


def test_two_at_once_do_not_meet(tmp_path):
    from filelock import FileLock

    source = tiny_wan.write_checkpoint(tmp_path / "src", "t2v")
    break_off(source, tmp_path / "dst")
    with (
        FileLock(tmp_path / "dst" / LOCK),
        pytest.raises(ValueError, match="another process converts to"),
    ):
        convert_wan(source, tmp_path / "dst")
