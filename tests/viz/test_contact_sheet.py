import numpy as np
import pytest
from PIL import Image

from nabla_attn.record import RunRecord, collect_versions
from nabla_attn.viz import contact_sheet
from nabla_attn.viz.contact_sheet import draw_contact_sheet
from nabla_attn.viz.side_by_side import join_side_by_side

COLOURS = {"dense": (200, 30, 30), "nabla-0.7": (30, 160, 40), "sta-3-3-3": (40, 60, 220)}


def video(algo, frames=9, height=64, width=96):
    pixels = np.full((frames, height, width, 3), COLOURS[algo], np.uint8)
    is_dense = algo == "dense"
    attention = {"density": 1.0 if is_dense else 0.25}
    if not is_dense:
        attention["density_per_step_and_layer"] = [[0.25, None], [0.5, 0.0], [0.1, 0.4]]
    config = {
        "prompt": "a $costly^$ circle_ <b>" + " and so on" * 30,
        "sparse_algo": algo,
        "frames": frames,
        "height": height,
        "width": width,
        "steps": 3,
        "guidance": 4.0,
        "seed": 0,
        "dtype": "float32",
    }
    numbers = {
        "seconds": {"transformer": 4.0 if is_dense else 1.0},
        "attention": attention,
        "tokens": {"frames": 3, "height": 4, "width": 6},
        "to_dense": {"speed_up": 4.0, "psnr": None if is_dense else 30.0, "ssim": 0.95},
    }
    return pixels, RunRecord("generate", config, 0, collect_versions(), "a test", numbers)


def area(sheet, colour):
    return (np.abs(sheet.astype(int) - colour).max(axis=-1) <= 2).sum()


@pytest.mark.parametrize(("frames", "shown"), [(9, 6), (3, 3), (1, 1)])
def test_every_video_has_its_row_of_frames(tmp_path, frames, shown):
    videos = [video(algo, frames) for algo in COLOURS]
    path = tmp_path / "sheet.png"
    draw_contact_sheet(videos, path)
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    assert 600 < sheet.shape[1] < 4000
    one = 225 * 337.5
    rows = []
    for colour in COLOURS.values():
        assert area(sheet, colour) == pytest.approx(shown * one, rel=0.05)
        rows.append(np.argwhere(np.abs(sheet.astype(int) - colour).max(-1) <= 2)[:, 0].mean())
    assert rows == sorted(rows)
    assert (sheet[:2] == 255).all()


def test_a_long_prompt_without_spaces_is_cut_and_not_dropped(monkeypatch):
    texts = []
    _, record = video("dense")
    record.config["prompt"] = "红" * 500
    monkeypatch.setattr(
        contact_sheet._Canvas,
        "text",
        lambda self, left, top, text, *rest, **style: texts.append(text),
    )
    contact_sheet._draw_header(contact_sheet._Canvas(None, 10.0, 3.0), record)
    assert "红" * 50 in texts[0] and texts[0].endswith("…”")


def test_a_long_name_of_an_algorithm_ends_before_the_frames(tmp_path):
    frames, record = video("nabla-0.7")
    record.config["sparse_algo"] = "nabla-0.2_topk-0.05_sta-3-3-3_tail-first"
    draw_contact_sheet([video("dense"), (frames, record)], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        sheet = np.asarray(image.convert("L"))
    edge = int((contact_sheet.MARGIN + contact_sheet.LABEL) * contact_sheet.DPI) - 8
    name = sheet[: sheet.shape[0] // 2 + 150, edge - 120 : edge - 15].min()
    assert name < 100, "the name fills its room"
    strip = sheet[170:-90, edge : edge + 4]
    assert (strip > 200).all(), "nothing but thin rules stands in front of the frames"


def test_same_records_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_contact_sheet([video("dense"), video("nabla-0.7")], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("size", [(160, 64), (64, 240)])
def test_tall_and_wide_videos(tmp_path, size):
    draw_contact_sheet([video("dense", 5, *size), video("nabla-0.7", 5, *size)], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert max(image.size) < 4000


def test_sizes_must_agree(tmp_path):
    with pytest.raises(ValueError, match="one size"):
        draw_contact_sheet([video("dense"), video("nabla-0.7", frames=5)], tmp_path / "a.png")
    with pytest.raises(ValueError, match="one size"):
        draw_contact_sheet([], tmp_path / "a.png")


def test_side_by_side_keeps_pixels_and_makes_even_sizes():
    pixels = [video(algo, 3, 63, 65)[0] for algo in COLOURS]
    joined = join_side_by_side(pixels, ["a", "b", "a label much wider than its small video"])
    assert joined.dtype == np.uint8
    assert joined.shape[0] == 3
    assert joined.shape[1] % 2 == 0
    assert joined.shape[2] % 2 == 0
    for colour in COLOURS.values():
        assert area(joined[1], colour) == 63 * 65
    assert (joined[:, :26] < 100).any(), "labels are drawn"


def test_side_by_side_needs_matching_input():
    pixels = video("dense")[0]
    with pytest.raises(ValueError, match="label each"):
        join_side_by_side([pixels], [])
    with pytest.raises(ValueError, match="one shape"):
        join_side_by_side([pixels, pixels[:2]], ["a", "b"])
