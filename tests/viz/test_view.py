import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tests.viz.view_helpers import make_frames, make_maps, make_record
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.generation.map_file import MAX_BYTES, RecordedMaps
from nabla_attn.generation.video import write_video
from nabla_attn.record import RunRecord
from nabla_attn.viz import view
from nabla_attn.viz.view import build_view, encode_frames, pick_frames, write_view


def test_the_page_needs_nothing_else(tmp_path):
    write_view(tmp_path / "a.html", make_frames(), make_maps(), make_record())
    page = (tmp_path / "a.html").read_text()
    assert len(page) < 6_000_000
    # Every address is inside the page; the one of SVG is a name.
    addresses = set(re.findall(r"https?://[^\"' ]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page


def test_the_same_input_gives_the_same_bytes():
    assert build_view(make_frames(), make_maps()) == build_view(make_frames(), make_maps())


def test_a_prompt_cannot_leave_its_script_element():
    page = build_view(make_frames(), make_maps(), make_record("</script><script>alert(1)</script>"))
    assert "<script>alert" not in page
    assert page.count("</script>") == 2


def test_a_page_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="Record fewer"):
        write_view(tmp_path / "a.html", make_frames(), make_maps())
    assert not (tmp_path / "a.html").exists()


def test_the_largest_recording_fits_the_page():
    # Random bytes do not compress: the worst that a full recording can be.
    rng = np.random.default_rng(0)
    noise = rng.integers(255, size=(21, 320, 480, 3), dtype=np.uint8)
    frames = sum(map(len, encode_frames(noise)))
    assert frames <= view.MAX_FRAME_BYTES
    assert MAX_BYTES * 4 / 3 + frames + 60_000 < view.MAX_BYTES


def test_frames_match_the_blocks_in_time():
    frames = np.arange(17, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert pick_frames(frames, 5)[:, 0, 0, 0].tolist() == [0, 4, 8, 12, 16]
    assert len(pick_frames(frames, 1)) == 1


def test_the_command(tmp_path):
    write_video(make_frames(), tmp_path / "v.mp4", 8)
    make_maps().save(tmp_path / "v.maps.safetensors")
    make_record().save(tmp_path / "v.json")
    for target in (
        *(tmp_path / f"v{end}" for end in (".mp4", ".json", ".maps.safetensors")),
        tmp_path,
    ):
        result = CliRunner().invoke(app, ["view", str(target)])
        assert result.exit_code == 0, result.output
    assert "red circle" in (tmp_path / "v.html").read_text()
    assert (tmp_path / "v-4.html").is_file(), "nothing is replaced unasked"
    result = CliRunner().invoke(app, ["view", str(tmp_path / "v.mp4"), "--overwrite", "--json"])
    assert not (tmp_path / "v-5.html").exists()
    paths = {"page": "v.html", "video": "v.mp4", "maps": "v.maps.safetensors"}
    assert json.loads(result.stdout) == {k: str(tmp_path / v) for k, v in paths.items()} | {
        "bytes": (tmp_path / "v.html").stat().st_size
    }
    (tmp_path / "v.maps.safetensors").unlink()
    result = CliRunner().invoke(app, ["view", str(tmp_path / "v.mp4")])
    assert result.exit_code == 2
    assert "--record-maps" in result.output


def test_maps_without_scores():
    page = build_view(make_frames(), make_maps(has_scores=False))
    assert '"scoreBits":0' in page
    assert build_view(make_frames()[:1], replace(make_maps(), algorithm="sta-3-3-3"))


def test_from_prompt_to_page(tiny_wan, tmp_path):
    arguments = [
        "generate", "--prompt", "a red circle", "--model", str(tiny_wan), "--device", "cpu",
        "--height", "64", "--width", "160", "--frames", "5", "--steps", "2",
        "--sparse-algo", "nabla-0.4", "--output", str(tmp_path / "v.mp4"), "--record-maps",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--map-steps", "1", "--map_layers", "0,1"])
    assert result.exit_code == 0, result.output
    assert RecordedMaps.load(tmp_path / "v.maps.safetensors").selection.steps == (1,)
    assert RunRecord.load(tmp_path / "v.json").numbers["seconds"]["recording"] > 0
    assert CliRunner().invoke(app, ["view", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "v.html").stat().st_size < 6_000_000
    for wrong, message in (
        (["--map-steps", "2"], "0 to 1"),
        (["--map-heads", "x"], "whole numbers"),
        (["--sparse-algo", "dense"], "dense attention has no maps"),
    ):
        result = CliRunner().invoke(app, [*arguments, *wrong])
        assert result.exit_code == 2
        assert message in result.output
    again = [word for word in arguments if word != "--record-maps"]
    result = CliRunner().invoke(app, [*again, "--map-steps", "1"])
    assert result.exit_code == 2 and "--record-maps" in result.output
    assert CliRunner().invoke(app, [*again, "--overwrite"]).exit_code == 0
    # Maps of the run before would be drawn over this one's video.
    assert not (tmp_path / "v.maps.safetensors").exists()
