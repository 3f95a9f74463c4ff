import json
import random

import numpy as np
import pytest
import safetensors
import torch
from tests.processes import exit_codes, start_process
from tests.training.data.encode_worker import encode_and_die
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.video import write_video
from nabla_attn.moving_shapes.dataset import WorldSet, WorldSource
from nabla_attn.training.data import EncodedSet, collate
from nabla_attn.training.data import encoded as store
from nabla_attn.training.data.encode import EncodeRequest
from nabla_attn.training.data.encode import encode as encode_with
from nabla_attn.training.data.folder import FolderSource
from nabla_attn.training.data.resize import Size
from nabla_attn.training.encoders import encode_caption, encode_first_frame, encode_video


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


def encode(source, pipeline, folder, request, **options):
    return encode_with(source, lambda: pipeline, folder, request, **options)


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 255, (*shape, 3), np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven videos of 5 frames and one each of what goes wrong."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(7):
        write_video(noise(5, 16, 16 + 16 * (index % 2)), folder / f"{index}.mp4", 8)
        (folder / f"{index}.txt").write_text("a red circle" if index < 3 else f"a square {index}")
    write_video(noise(6, 16, 16), folder / "six.mp4", 8)
    write_video(noise(5, 16, 20), folder / "wide.mp4", 8)
    (folder / "broken.mp4").write_bytes(b"no video")
    for name in ("six", "wide", "broken"):
        (folder / f"{name}.txt").write_text("skipped")
    write_video(noise(5, 16, 16), folder / "silent.mp4", 8)
    return folder


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".encoding.lock"
    }


@pytest.fixture(scope="module")
def encoded(pipeline, videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    seen = []
    request = EncodeRequest(shard_size=2)
    encode(FolderSource(videos), pipeline, folder, request, on_progress=lambda *at: seen.append(at))
    assert seen == [("encode", done, 11) for done in range(12)]
    return folder


def test_each_video_keeps_its_own_first_frame(videos, tmp_path):
    from tests.training.tiny_pipelines import wan_i2v

    from nabla_attn.media import read_video

    pipeline = wan_i2v()
    encode(FolderSource(videos), pipeline, tmp_path, EncodeRequest(shard_size=4))
    data = EncodedSet(tmp_path, "WanImageToVideoPipeline")
    caption = "a square 4"
    item = next(item for item in data if item["caption"] == caption)
    wanted = encode_first_frame(pipeline, read_video(videos / "4.mp4"))
    text = encode_caption(pipeline, caption, frames=5, height=16, width=16)
    for kind in ("conditions", "empty"):
        assert item[kind].keys() == text.keys() | wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(item[kind][name], value.half().float())


def test_what_is_written_is_what_the_pipeline_makes(encoded, pipeline, videos):
    data = EncodedSet(encoded)
    assert len(data) == 7
    assert sorted(set(data.grids)) == [(4, 2, 2, 2), (4, 2, 2, 4)]
    from nabla_attn.media import read_video

    wanted = encode_video(pipeline, read_video(videos / "4.mp4"))
    text = encode_caption(pipeline, "a square 4", frames=5, height=16, width=16)
    item = next(item for item in data if item["caption"] == "a square 4")
    assert item["latents"].dtype == torch.float32
    torch.testing.assert_close(item["latents"], wanted, rtol=2e-3, atol=2e-3)
    assert item["conditions"].keys() == text.keys() == item["empty"].keys()
    assert torch.equal(item["conditions"]["encoder_hidden_states"], text["encoder_hidden_states"])
    assert not torch.equal(item["empty"]["encoder_hidden_states"], text["encoder_hidden_states"])


def test_what_cannot_be_used_is_listed(encoded):
    lines = [json.loads(line) for line in (encoded / "skipped.jsonl").read_text().splitlines()]
    assert {line["name"]: line["kind"] for line in lines} == {
        "broken.mp4": "unreadable",
        "silent.mp4": "no caption",
        "six.mp4": "odd size",
        "wide.mp4": "odd size",
    }
    reasons = " ".join(line["reason"] for line in lines)
    assert "4n+1" in reasons and "multiples of 16" in reasons


def test_captions_are_stored_once(encoded):
    assert len(list((encoded / "captions").rglob("*.safetensors"))) == 1 + 4 + 1
    assert len(list((encoded / "grids").iterdir())) == 2
    assert not list(encoded.rglob("*.tmp")) and not list(encoded.glob(".shard*"))


@pytest.fixture
def run_processes(tiny_wan, videos):
    """Encode to a folder in several processes at once; how each ended."""

    def run(folder, counts):
        arguments = (tiny_wan, videos, folder)
        started = [start_process(encode_and_die, *arguments, count) for count in counts]
        return exit_codes(started)

    return run


def test_killed_in_the_middle_of_a_file_and_resumed(
    encoded, pipeline, videos, run_processes, tmp_path
):
    # Captions, sizes and shards are written in turn, 14 files in all.
    for count in random.Random(5).sample(range(1, 5), 3):
        assert run_processes(tmp_path, [count]) == [-9]
        with pytest.raises(ValueError, match="is not finished"):
            EncodedSet(tmp_path)
    assert list(tmp_path.rglob(".*.tmp"))
    summary = encode(FolderSource(videos), pipeline, tmp_path, EncodeRequest(shard_size=2))
    assert summary.encoded == 7 and 0 < summary.made <= 6
    assert files(tmp_path) == files(encoded)


def test_processes_share_a_folder_though_some_are_killed(encoded, run_processes, tmp_path):
    made = run_processes(tmp_path / "two", [0, 0])
    assert sum(made) == 6 and 99 not in made
    assert files(tmp_path / "two") == files(encoded)
    made = run_processes(tmp_path / "three", [0, 2, 0])
    assert made.count(-9) == 1
    if sum(code for code in made if code > 0) < 6:
        run_processes(tmp_path / "three", [0])
    assert files(tmp_path / "three") == files(encoded)


def test_a_folder_goes_on_with_the_same_request_alone(encoded, pipeline, videos, tmp_path):
    before = files(encoded)
    assert encode(FolderSource(videos), pipeline, encoded, EncodeRequest(shard_size=2)).made == 0
    assert files(encoded) == before
    with pytest.raises(ValueError, match="another shard_size, shards"):
        encode(FolderSource(videos), pipeline, encoded, EncodeRequest(shard_size=3))
    with pytest.raises(ValueError, match="another fps"):
        encode(FolderSource(videos), pipeline, encoded, EncodeRequest(fps=8.0, shard_size=2))
    with pytest.raises(ValueError, match="another source"):
        encode(WorldSource(11, (Size(1, 16, 16),)), pipeline, encoded, EncodeRequest(shard_size=2))
    (tmp_path / "note.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        encode(FolderSource(videos), pipeline, tmp_path, EncodeRequest())


def test_a_replaced_video_is_another_source(pipeline, tmp_path):
    path = tmp_path / "in" / "a.mp4"
    write_video(noise(5, 16, 16), path, 8)
    path.with_suffix(".txt").write_text("a square")
    encode(FolderSource(path.parent), pipeline, tmp_path / "out", EncodeRequest())
    write_video(255 - noise(5, 16, 16), path, 8)
    with pytest.raises(ValueError, match="another source"):
        encode(FolderSource(path.parent), pipeline, tmp_path / "out", EncodeRequest())


def test_another_model_does_not_go_on(encoded, videos, tiny_wan):
    other = load_pipeline(tiny_wan, device="cpu", dtype="float32")
    next(other.vae.parameters()).data.mul_(2)
    with pytest.raises(ValueError, match="another model"):
        encode(FolderSource(videos), other, encoded, EncodeRequest(shard_size=2))


def test_sizes_that_were_asked_for(pipeline, tmp_path):
    for name, shape in {"a": (9, 32, 64), "b": (5, 64, 32), "c": (4, 64, 64)}.items():
        write_video(noise(*shape), tmp_path / "in" / f"{name}.mp4", 8)
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    source = FolderSource(tmp_path / "in")
    request = EncodeRequest(tuple(map(Size.parse, ["16x32x9", "32x16x5"])))
    summary = encode(source, pipeline, tmp_path / "out", request)
    assert (summary.encoded, summary.skipped) == (2, {"too short": 1})
    assert EncodedSet(tmp_path / "out").grids == [(4, 3, 2, 4), (4, 2, 4, 2)]
    with pytest.raises(ValueError, match="height 24 does not fit"):
        encode(source, pipeline, tmp_path / "odd", EncodeRequest((Size(5, 24, 32),)))
    assert not (tmp_path / "odd").exists()


def test_the_world_encoded_and_on_the_fly_are_the_same(pipeline, tmp_path):
    size = {"frames": 5, "height": 16, "width": 32}
    encode(WorldSource(3, (Size(**size),), seed=4), pipeline, tmp_path, EncodeRequest())
    stored, live = EncodedSet(tmp_path), WorldSet(pipeline, clips=3, seed=4, **size)
    assert len(stored) == len(live) == 3 and stored.grids == live.grids
    for one, two in zip(stored, (live[index] for index in range(3)), strict=True):
        assert one["caption"] == two["caption"]
        torch.testing.assert_close(one["latents"], two["latents"], rtol=2e-3, atol=2e-3)
        for part in ("conditions", "empty"):
            for name, value in one[part].items():
                assert torch.equal(value, two[part][name])
    with pytest.raises(IndexError):
        live[3]
    batch = collate([stored[0], stored[1]], 0.0, random.Random(0))
    assert batch["latents"].shape == (2, 4, 2, 2, 4)


def test_a_full_disk_leaves_what_is_whole(pipeline, videos, tmp_path, monkeypatch):
    import safetensors.torch as safe

    real, writes = safe.save_file, []

    def save(tensors, path, metadata=None):
        writes.append(path)
        if len(writes) == 8:
            # As the library says it, which is no OSError.
            text = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise safetensors.SafetensorError(text)
        real(tensors, path, metadata)

    monkeypatch.setattr(safe, "save_file", save)
    with pytest.raises(OSError, match=r"cannot write .*safetensors: no space left on device\."):
        encode(FolderSource(videos), pipeline, tmp_path, EncodeRequest(shard_size=2))
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    encode(FolderSource(videos), pipeline, tmp_path, EncodeRequest(shard_size=2))
    assert len(EncodedSet(tmp_path)) == 7


def test_empty_files_are_made_again(encoded, pipeline, videos, tmp_path):
    import shutil

    folder = shutil.copytree(encoded, tmp_path / "copy")
    caption = store.caption_path(folder, "a square 4")
    emptied = [folder / name for name in ("shard-00002.json", "shard-00003.safetensors")]
    for path in (*emptied, folder / "index.json", folder / "encoding.json"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="not empty: it has"):
        encode(FolderSource(videos), pipeline, folder, EncodeRequest(shard_size=2))
    shutil.copy(encoded / "encoding.json", folder)
    caption.write_bytes(b"")
    summary = encode(FolderSource(videos), pipeline, folder, EncodeRequest(shard_size=2))
    assert summary.made == 2 and files(folder) == files(encoded)
    caption.write_bytes(b"")
    with pytest.raises(ValueError, match="is missing or empty"):
        EncodedSet(folder)


def test_captions_that_are_cut_are_counted_and_told_of_once(pipeline, tmp_path):
    folder = tmp_path / "in"
    long = "circle " * 600
    for name, text in {
        "a": long + "red",
        "b": long + "blue",
        "c": "short",
        "d": long + "red",
    }.items():
        write_video(noise(5, 16, 16), folder / f"{name}.mp4", 8)
        (folder / f"{name}.txt").write_text(text)
    request = EncodeRequest(shard_size=2)
    with pytest.warns(UserWarning, match="does not read captions this long") as told:
        summary = encode(FolderSource(folder), pipeline, tmp_path / "out", request)
    assert summary.cut == 3 and summary.encoded == 4
    assert len([each for each in told if "captions this long" in str(each.message)]) == 1
    assert encode(FolderSource(folder), pipeline, tmp_path / "out", request).cut == 3


def test_a_clip_that_cannot_be_encoded_costs_itself(pipeline, videos, tmp_path, monkeypatch):
    from nabla_attn.training.data import encode as module

    real, calls = module.encode_video, []

    def fail(pipeline, video):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory: 80 GiB")
        return real(pipeline, video) * (float("inf") if len(calls) == 2 else 1)

    monkeypatch.setattr(module, "encode_video", fail)
    summary = encode(FolderSource(videos), pipeline, tmp_path, EncodeRequest(shard_size=9))
    assert summary.encoded == 5 and summary.skipped["cannot be encoded"] == 2
    text = (tmp_path / "skipped.jsonl").read_text()
    assert "out of memory" in text and "overflowed" in text


def test_broken_folders_are_named(encoded, tmp_path):
    import shutil

    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(ValueError, match="nabla encode"):
            EncodedSet(path)
    with pytest.raises(ValueError, match="encoded for WanPipeline, and the model is a LTXPipeline"):
        EncodedSet(encoded, "LTXPipeline")
    broken = shutil.copytree(encoded, tmp_path / "broken")
    shard = broken / "shard-00001.safetensors"
    content = shard.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"words" * 99):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors: missing or damaged"):
            EncodedSet(broken)
    shard.write_bytes(content)
    store.caption_path(broken, "").unlink()
    with pytest.raises(ValueError, match="is missing"):
        EncodedSet(broken)
    index = json.loads((broken / "index.json").read_text())
    texts = ["{", "[]", '{"videos": [{"name": 1}]}', '{"videos": []}', '{"videos": [[]]}']
    for change in ({"shape": [16, -1, 4, 4]}, {"size": [0, 32, 32]}, {"shard": -1}):
        texts.append(json.dumps(index | {"videos": [index["videos"][0] | change]}))
    for text in texts:
        (broken / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index|JSON|skipped"):
            EncodedSet(broken)
    for text in ("[]", '{"videos": 1, "skipped": []}', '{"videos": [], "skipped": [{}]}'):
        (broken / "shard-00000.json").write_text(text)
        with pytest.raises(ValueError, match=r"shard-00000\.json: (damaged|expected)"):
            store.read_shard(broken, "shard-00000")


def run(*arguments):
    return CliRunner().invoke(app, ["encode", *map(str, arguments)])


def test_the_command(tiny_wan, videos, tmp_path):
    options = ("--model", tiny_wan, "--device", "cpu", "--dtype", "float32")
    done = run(videos, "--output", tmp_path / "a", *options)
    assert done.exit_code == 0, done.output
    assert "7 videos encoded, 4 skipped" in done.stdout and "nabla train" in done.stdout
    assert "2 odd size" in done.stderr
    size = ("--height", 16, "--width", 32, "--frames", 5)
    done = run("world", "--clips", 2, *size, "--output", tmp_path / "b", *options)
    assert done.exit_code == 0, done.output
    assert len(EncodedSet(tmp_path / "b")) == 2
    done = run(videos, "--output", tmp_path / "a", *options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["encoded"], found["skipped"]["odd size"], found["made"]) == (7, 2, 0)
    assert run(videos, "--output", tmp_path / "a", *options, "--quiet").stdout == ""


def test_log_files_have_lines_of_progress(capsys, monkeypatch):
    from nabla_attn.cli import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress.Settings, "is_quiet", False)
    with progress.count_bar("encoding", "clips", every_seconds=30) as on_progress:
        for done in range(0, 101, 10):
            on_progress("encode", done, 100)
            now[0] += 20
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encoding: 20 of 100 clips, 0.50 clips/s, 160 s left"
    assert len(lines) == 5
    monkeypatch.setattr(progress.Settings, "is_quiet", True)
    with progress.count_bar("encoding", "clips", every_seconds=0) as on_progress:
        on_progress("encode", 1, 2)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{videos}", "--height", "16"], "go together"),
        (["{videos}", "--height", "24", "--width", "24"], "multiples of 16"),
        (["{videos}", "--frames", "4"], "4n+1"),
        (["{videos}", "--sizes", "16x16"], "HEIGHTxWIDTHxFRAMES"),
        (["{videos}", "--sizes", "16x16x5", "--frames", "5"], "either --sizes or"),
        (["{videos}", "--fps", "0"], "fps"),
        (["{videos}", "--shard-size", "0"], "shard_size"),
        (["{videos}", "--clips", "3"], "'world' alone"),
        (["{videos}", "--frames", "9"], "no video could be used"),
        (["{videos}/gone"], "no such file"),
        (["{videos}/0.mp4"], "not a .tar file"),
        (["world", "--clips", "0"], "clips"),
        (["world", "--shapes", "7"], "shapes"),
        (["world", "--fps", "3"], "--fps"),
        (["{videos}", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(tiny_wan, videos, tmp_path, arguments, words):
    options = ["--device", "cpu", "--dtype", "float32", "--output", tmp_path / "out"]
    if "--model" not in arguments:
        options += ["--model", tiny_wan]
    result = run(*[text.format(videos=videos) for text in arguments], *options)
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line and not line.startswith("skipped: ")]
    assert result.exit_code == 2 and len(errors) == 1, result.output
    assert errors[0].startswith("error: ") and words in errors[0]
