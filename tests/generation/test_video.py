import hashlib
import platform
from threading import Thread

import numpy as np
import pytest

from nabla_attn.generation.video import write_video
from nabla_attn.media import read_video

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (20, 20, 20)]


def stripes(frames=5, height=48):
    video = np.zeros((frames, height, 16 * len(COLOURS), 3), np.uint8)
    for index, colour in enumerate(COLOURS):
        video[:, :, 16 * index : 16 * index + 16] = colour
    for frame in range(frames):
        video[frame, 2 * frame : 2 * frame + 4] = 128
    return video


@pytest.mark.parametrize("frames", [1, 5])
def test_round_trip_keeps_frames_and_colours(tmp_path, frames):
    video = stripes(frames)
    write_video(video, tmp_path / "a.mp4", fps=7.5)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == video.shape
    assert back.dtype == np.uint8
    centres = back[:, 40, 8::16].astype(int)
    assert np.abs(centres - np.array(COLOURS)).max() <= 4
    assert np.abs(back.astype(int) - video).mean() < 3


def test_same_frames_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(stripes(), tmp_path / name, fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def moving(frames=5, height=480, width=832):
    """A pattern that moves, with noise: enough for the encoder to choose quantizers by block."""
    random = np.random.default_rng(0)
    tiles = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = tiles.repeat(8, 0).repeat(8, 1)
    video = np.stack([np.roll(picture, (3 * t, 5 * t), (0, 1)) for t in range(frames)])
    return video // 2 + random.integers(0, 64, video.shape, np.uint8)


def leave_in_memory(seed):
    """Fill the heap with other bytes, and free half of them."""
    random = np.random.default_rng(seed)
    kept = [random.bytes(int(2 ** random.uniform(4, 22))) for _ in range(300)]
    del kept[::2]
    return kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="promised with glibc only")
def test_same_frames_same_bytes_at_full_size_whatever_memory_held_before(tmp_path):
    video, found = moving(), set()
    for seed in range(3):
        kept = leave_in_memory(seed)
        write_video(video, tmp_path / "a.mp4", fps=16)
        found.add(hashlib.sha256((tmp_path / "a.mp4").read_bytes()).hexdigest())
        del kept
    assert len(found) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="promised with glibc only")
def test_a_video_written_meanwhile_changes_no_bytes(tmp_path):
    video = moving()
    write_video(video, tmp_path / "alone.mp4", fps=16)
    kept = leave_in_memory(7)
    others = [
        Thread(target=write_video, args=(stripes(), tmp_path / f"{i}.mp4", 8)) for i in range(2)
    ]
    for other in others:
        other.start()
    write_video(video, tmp_path / "beside.mp4", fps=16)
    for other in others:
        other.join()
    del kept
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "beside.mp4").read_bytes()


def test_odd_sizes_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="even sizes only: got 63x65") as caught:
        write_video(np.zeros((2, 63, 65, 3), np.uint8), tmp_path / "a.mp4", fps=8)
    assert "64x66" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 4), np.uint8),
    ],
)
def test_not_a_video(tmp_path, frames):
    with pytest.raises(ValueError, match="uint8"):
        write_video(frames, tmp_path / "a.mp4", fps=8)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), 1e9])
def test_bad_fps(tmp_path, fps):
    with pytest.raises(ValueError, match="fps must be"):
        write_video(stripes(), tmp_path / "a.mp4", fps=fps)


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    from nabla_attn.generation import video as module

    calls = iter(range(3))

    def interrupt(frame):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return convert(frame)

    convert = module._to_yuv
    monkeypatch.setattr(module, "_to_yuv", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_video(stripes(), tmp_path / "a.mp4", fps=8)
    assert not list(tmp_path.iterdir())


def test_a_relative_name_with_a_colon_and_a_limit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    write_video(frames, "take:1.mp4", 8)
    assert read_video("take:1.mp4").shape == (5, 16, 16, 3)
    assert read_video("take:1.mp4", limit=2).shape == (2, 16, 16, 3)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.mp4"):
        read_video(tmp_path / "missing.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"not a video at all")
    with pytest.raises(ValueError, match=r"bad\.mp4"):
        read_video(tmp_path / "bad.mp4")
