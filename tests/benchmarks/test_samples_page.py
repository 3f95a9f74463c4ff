import numpy as np
import pytest
from benchmarks.choose_demo import choose
from benchmarks.pages import samples as page
from benchmarks.samples import write_gif, write_sheet
from PIL import Image

from nabla_attn.media import read_video
from nabla_attn.moving_shapes.judge import JUDGE
from nabla_attn.record import RunRecord, collect_versions

ALGORITHM = "topk-0.25_tail-first"


def videos(count=2, frames=9):
    noise = np.random.default_rng(0)
    flat = noise.integers(0, 255, (count, frames, 1, 1, 3), np.uint8)
    return list(np.broadcast_to(flat, (count, frames, 32, 48, 3)))


def save(folder, name, config, numbers):
    RunRecord("test", config, 0, collect_versions(), "a CPU", numbers).save(folder / f"{name}.json")


@pytest.fixture
def records(tmp_path):
    prompts = [
        {"prompt": f"a {colour} circle moving up", "seed": seed, "ssim": 0.9 + seed / 100}
        for seed, colour in enumerate(("red", "blue", "green"))
    ]
    folder = tmp_path / "records"
    numbers = {"count": 3, "chosen": prompts[1], "prompts": prompts}
    save(folder, "demo_choice", {"sparse_algo": ALGORITHM}, numbers)
    for name, outline in (("dense", 0.95), (ALGORITHM, 0.8)):
        right = {"shape": outline > 0.92, "outline": outline, "outline_min": outline - 0.1}
        judged = [{"prompt": prompt["prompt"], "right": right} for prompt in prompts]
        save(folder, f"judge-{JUDGE}_trained_{name}", {}, {"prompts": judged})
    for index in range(3):
        write_sheet(videos(), tmp_path / "samples-images" / f"{index:02d}.png")
    return folder


def test_the_page_shows_every_prompt(tmp_path, records):
    page.write_page(tmp_path / "samples.md", records)
    text = (tmp_path / "samples.md").read_text()
    assert text.count("](samples-images/") == 3
    assert "| dense |  | 0.950 | 0.850 | 100% |" in text
    assert f"| {ALGORITHM} | 0.910 | 0.800 | 0.700 | 0% |" in text.replace("\\", "")
    assert "the median by SSIM, “a blue circle moving up”" in text
    assert "Seed 2. SSIM 0.920; outline 0.95 dense, 0.80" in text


def test_prompts_that_were_not_judged_are_named(tmp_path, records):
    save(records, f"judge-{JUDGE}_trained_dense", {}, {"prompts": []})
    with pytest.raises(ValueError, match="judges 0 of 3 prompts"):
        page.write_page(tmp_path / "samples.md", records)


def test_without_pictures_there_is_no_page(tmp_path):
    page.write_page(tmp_path / "samples.md", tmp_path)
    assert not (tmp_path / "samples.md").exists()


def test_a_sheet_has_a_row_for_each_video(tmp_path):
    write_sheet(videos(), tmp_path / "sheet.png")
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert picture.shape == (2 * 32 + 4, 5 * 48 + 4 * 4, 3)
    first, last = videos()[0][0], videos()[0][-1]
    assert np.array_equal(picture[:32, :48], first) and np.array_equal(picture[:32, -48:], last)


def test_the_moving_picture_shows_every_second_frame(tmp_path):
    (video,) = videos(1)
    write_gif(video, tmp_path / "demo.gif")
    moving = read_video(tmp_path / "demo.gif")
    assert moving.shape == (5, 32, 48, 3)
    assert np.array_equal(moving[2], video[4])


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (3, 1), (4, 2)])
def test_the_demo_shows_the_median_by_closeness(count, seed):
    # The median of all four outlines is 15: the third is closer to it than the second.
    outlines = (0, 20, 14, 16)
    prompts = [
        {"seed": index, "ssim": 0.9 + index / 100, "outline": outlines[index]}
        for index in range(count)
    ]
    assert choose(prompts[::-1])["seed"] == seed
