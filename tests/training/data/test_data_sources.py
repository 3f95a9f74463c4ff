import io
import json
import shutil
import tarfile

import av
import numpy as np
import pytest

from nabla_attn.generation.video import write_video
from nabla_attn.moving_shapes.dataset import WorldSource
from nabla_attn.training.data.clip import Clip, Skipped, read_clip
from nabla_attn.training.data.folder import FolderSource
from nabla_attn.training.data.resize import Size, choose_size, fit
from nabla_attn.training.data.tars import TarSource


def video(frames=5, height=16, width=32, step=40):
    """Grey frames, each `step` brighter than the one before."""
    levels = np.arange(frames, dtype=np.uint8) * step + 10
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


def levels(frames):
    """Which frame of `video` each is."""
    return [round((float(frame.mean()) - 10) / 40) for frame in frames]


def listed(source):
    result = []
    for clip in source.read(0, len(source)):
        try:
            result.append((clip.name, clip.caption, read_clip(clip, None, None).shape))
        except Skipped as reason:
            result.append((clip.name, clip.caption, str(reason)))
    return result


def test_sidecars_at_any_depth(tmp_path):
    write_video(video(), tmp_path / "b.mp4", 8)
    write_video(video(3), tmp_path / "deep" / "a.MP4", 8)
    write_video(video(), tmp_path / "silent.mp4", 8)
    (tmp_path / "b.txt").write_text(" a red\n circle ")
    (tmp_path / "deep" / "a.txt").write_text("two")
    assert listed(FolderSource(tmp_path)) == [
        ("b.mp4", "a red circle", (5, 16, 32, 3)),
        ("deep/a.MP4", "two", (3, 16, 32, 3)),
        ("silent.mp4", "", "no caption: silent.txt is missing"),
    ]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path, kind, column):
    write_video(video(), tmp_path / "a.mp4", 8)
    rows = [("a.mp4", 'one, "two"'), ("gone.mp4", "three"), ("a.mp4", "again")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, column: text}) for name, text in rows]
        lines += ["", '{"file_name": "a.mp4", "title": "none"}']
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    else:
        text = f'file_name,{column}\na.mp4,"one, ""two"""\ngone.mp4,three\na.mp4,again\n'
        (tmp_path / "metadata.csv").write_text("\ufeff" + text)
    found = listed(FolderSource(tmp_path))
    assert found[:3] == [
        ("a.mp4", 'one, "two"', (5, 16, 32, 3)),
        ("gone.mp4", "", "no video: gone.mp4 is missing"),
        ("a.mp4", "again", (5, 16, 32, 3)),
    ]
    if kind == "jsonl":
        assert found[3][2] == "no caption: line 5: it has none of text, caption, prompt"


def test_an_empty_caption_gives_way_to_the_next_name(tmp_path):
    write_video(video(), tmp_path / "a.mp4", 8)
    rows = [{"text": " ", "caption": "real"}, {"caption": "", "prompt": "x"}, {"text": ""}]
    lines = [json.dumps({"file_name": "a.mp4"} | row) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    first, second, third = listed(FolderSource(tmp_path))
    assert (first[1], second[1]) == ("real", "x")
    assert third[2] == "no caption: line 3: it has none of text, caption, prompt"


def test_blank_text_beside_a_video_is_no_caption(tmp_path):
    write_video(video(), tmp_path / "a.mp4", 8)
    (tmp_path / "a.txt").write_text(" \n")
    assert listed(FolderSource(tmp_path)) == [("a.mp4", "", "no caption: a.txt is empty")]
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name in ("1", "2"):
            add(file, f"{name}.mp4", (tmp_path / "a.mp4").read_bytes())
            add(file, f"{name}.txt", b"\n")
        add(file, "2.json", b'{"text": "real"}')
    one, two = listed(TarSource([tmp_path / "a.tar"]))
    assert one[2].startswith("no caption") and two[1] == "real"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_only_newlines_end_a_line(tmp_path, kind):
    write_video(video(), tmp_path / "a.mp4", 8)
    caption = "one\u2028two\x85three\x0cfour"
    row = json.dumps({"file_name": "a.mp4", "text": caption}, ensure_ascii=False) + "\r\n"
    text = row + row if kind == "jsonl" else f'file_name,text\r\na.mp4,{caption}\r\na.mp4,"x\ny"'
    (tmp_path / f"metadata.{kind}").write_text(text, encoding="utf-8", newline="")
    captions = [entry[1] for entry in listed(FolderSource(tmp_path))]
    assert captions == ["one two three four", "x y" if kind == "csv" else "one two three four"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", '{"file_name": "a.mp4"', "line 1: not valid JSON"),
        ("metadata.jsonl", "\n[1]", "line 2: expected an object"),
        ("metadata.jsonl", '{"text": "a"}', "line 1: no file_name"),
        ("metadata.jsonl", '{"file_name": "../a.mp4", "text": ""}', "outside the folder"),
        ("metadata.jsonl", '{"file_name": "none.mp4", "text": ""}', "none of them is there"),
        ("metadata.jsonl", b"\xff\xfe\xff", "line 1: not UTF-8"),
        ("metadata.csv", "name,text\na.mp4,b\n", "no column file_name"),
        ("metadata.csv", 'file_name,text\na.mp4,"b', "unexpected end"),
        ("metadata.csv", "", "no column file_name"),
        ("note.txt", "", "no videos"),
    ],
)
def test_bad_folders(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        FolderSource(tmp_path)


def test_videos_without_any_caption_and_no_folder(tmp_path):
    write_video(video(), tmp_path / "a.mp4", 8)
    with pytest.raises(ValueError, match="1 videos and no captions"):
        FolderSource(tmp_path)
    with pytest.raises(ValueError, match="no folder of videos"):
        FolderSource(tmp_path / "gone")


def add(file, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    file.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path):
    write_video(video(), tmp_path / "v.mp4", 8)
    data = (tmp_path / "v.mp4").read_bytes()
    with tarfile.open(tmp_path / "a{0}.tar", "w") as file:
        add(file, "x/1.mp4", data)
        add(file, "x/1.txt", b"one")
        add(file, "x/lonely.txt", b"no video")
        add(file, "x/2.json", b'{"caption": "two"}')
        add(file, "x/2.mp4", data)
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        add(file, "3.mp4", data)
        add(file, "4.mp4", b"no mp4")
        add(file, "4.txt", b"four")
        add(file, "5.mp4", data)
        add(file, "5.json", b"{")
    return sorted(tmp_path.glob("*.tar"))


def test_tar_files(tars):
    source = TarSource(tars)
    found = listed(source)
    assert found[:2] == [
        ("a{0}.tar/x/1.mp4", "one", (5, 16, 32, 3)),
        ("a{0}.tar/x/2.mp4", "two", (5, 16, 32, 3)),
    ]
    assert [entry[2].partition(":")[0] for entry in found[2:]] == [
        "no caption",
        "unreadable",
        "no caption",
    ]
    parts = [clip.name for start in range(5) for clip in source.read(start, start + 1)]
    assert parts == [entry[0] for entry in found]
    assert [clip.name for clip in source.read(1, 3)] == parts[1:3]


def test_a_tar_file_that_ends_early_costs_its_last_videos_alone(tars):
    whole = listed(TarSource(tars))
    source = TarSource(tars)
    content = tars[0].read_bytes()
    tars[0].write_bytes(content[: len(content) // 2])
    found = listed(source)
    assert found[0] == whole[0] and found[2:] == whole[2:]
    assert found[1][2].startswith("unreadable: a{0}.tar: ")


def test_bad_tar_files(tars):
    tars[1].write_bytes(b"no tar file at all")
    whole = listed(TarSource(tars[:1]))
    assert listed(TarSource(tars)) == [
        *whole,
        (
            "b.tar, damaged",
            "",
            "unreadable: b.tar: not a whole tar file (truncated header)",
        ),
    ]
    with pytest.raises(ValueError, match=r"b\.tar: no videos.*not a whole tar file"):
        TarSource(tars[1:])
    with tarfile.open(tars[1], "w") as file:
        add(file, "a.txt", b"words")
    with pytest.raises(ValueError, match="no videos"):
        TarSource(tars[1:])
    with pytest.raises(ValueError, match="no tar files"):
        TarSource([])


def test_identity_follows_the_clips(tmp_path, tars):
    assert TarSource(tars).identity() != TarSource(tars[:1]).identity()
    write_video(video(), tmp_path / "d" / "a.mp4", 8)
    (tmp_path / "d" / "a.txt").write_text("one")
    before = FolderSource(tmp_path / "d").identity()
    assert FolderSource(tmp_path / "d").identity() == before
    (tmp_path / "d" / "a.txt").write_text("two")
    assert FolderSource(tmp_path / "d").identity() != before


@pytest.mark.parametrize("change", ["longer", "start", "end", "gone"])
@pytest.mark.parametrize("has_metadata", [True, False])
def test_identity_follows_what_the_videos_show(tmp_path, has_metadata, change):
    folder = tmp_path / "d"
    path = folder / "deep" / "a.mp4"
    for file in (path, folder / "b.mp4"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(100_000))
        file.with_suffix(".txt").write_text("one")
    if has_metadata:
        names = ("deep/a.mp4", "b.mp4")
        lines = [json.dumps({"file_name": name, "text": "one"}) for name in names]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    before = FolderSource(folder).identity()
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert FolderSource(tmp_path / "copy").identity() == before
    content = {"longer": bytes(100_001), "start": b"x" + bytes(99_999), "end": bytes(99_999) + b"x"}
    path.write_bytes(content[change]) if change in content else path.unlink()
    assert FolderSource(folder).identity() != before


def test_world():
    source = WorldSource(5, (Size(5, 16, 32), Size(1, 16, 16)), seed=3, shapes=(1, 2))
    clips = list(source.read(0, 5))
    assert [clip.open().shape for clip in clips[:2]] == [(5, 16, 32, 3), (1, 16, 16, 3)]
    later = list(WorldSource(9, (Size(5, 16, 32),), seed=3, shapes=(1, 2)).read(3, 99))
    assert len(later) == 6 and later[0].caption == clips[3].caption
    assert "moving" in clips[0].caption
    for arguments in [(0, (Size(1, 16, 16),)), (1, (Size(1),)), (1, (Size(1, 8, 8),), 0, (4,))]:
        with pytest.raises(ValueError, match=r"clips|frames, height|shapes"):
            WorldSource(*arguments)


def clip_of(frames, tmp_path, fps):
    write_video(frames, tmp_path / "v.mp4", fps)
    return Clip("v", "", lambda: tmp_path / "v.mp4")


def test_no_more_frames_than_needed_and_other_rates(tmp_path):
    clip = clip_of(video(6), tmp_path, 8)
    assert levels(read_clip(clip, None, None)) == [0, 1, 2, 3, 4, 5]
    assert levels(read_clip(clip, 4, None)) == [0, 1, 2, 3]
    assert levels(read_clip(clip, None, 8.0)) == [0, 1, 2, 3, 4, 5]
    assert levels(read_clip(clip, None, 4.0)) == [0, 2, 4]
    assert levels(read_clip(clip, 5, 16.0)) == [0, 0, 1, 1, 2]
    assert levels(read_clip(clip, None, 6.0)) == [0, 1, 2, 4, 5]
    assert levels(read_clip(clip_of(video(1), tmp_path, 8), None, 24.0)) == [0]


def test_titles_may_be_in_any_encoding(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Cafe01"
        stream = container.add_stream("mpeg4", rate=8, width=32, height=16)
        for picture in video():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Cafe01", "Café01".encode("latin-1")))
    assert len(read_clip(Clip("a", "b", lambda: path), None, None)) == 5


def test_upright(tmp_path):
    frames = video(2, 16, 32)
    frames[:, :8] = 250  # bright above
    clip = clip_of(frames, tmp_path, 8)
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    # The matrix of the track header: turned by 90 degrees clockwise for display.
    place = data.index(b"tkhd") + 44
    turned = (0, 1 << 16, 0, -(1 << 16) % (1 << 32), 0, 0, 0, 0, 1 << 30)
    data[place : place + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    (tmp_path / "v.mp4").write_bytes(data)
    shown = read_clip(clip, None, None)
    assert shown.shape == (2, 32, 16, 3)
    assert shown[0, :, 10:].mean() > 200 > 100 > shown[0, :, :6].mean()


@pytest.mark.parametrize("damage", ["text", "empty", "half", "missing"])
def test_unreadable(tmp_path, damage):
    path = tmp_path / "v.mp4"
    write_video(video(9, 64, 64), path, 8)
    if damage == "missing":
        path.unlink()
    else:
        data = {"text": b"words", "empty": b"", "half": path.read_bytes()[:900]}
        path.write_bytes(data[damage])
    with pytest.raises(Skipped) as found:
        read_clip(Clip("v", "", lambda: path), None, None)
    assert found.value.kind == "unreadable"


def test_sizes_are_read_and_checked():
    assert Size.parse("480x832X81") == Size(81, 480, 832)
    for text in ("480x832", "axbxc", "1x2x3x4", "-1x2x3", "0x16x1"):
        with pytest.raises(ValueError, match=r"HEIGHTxWIDTHxFRAMES|at least 1"):
            Size.parse(text)
    with pytest.raises(ValueError, match="go together"):
        Size(5, 16, None)


def test_the_closest_aspect_ratio_that_fits():
    sizes = tuple(map(Size.parse, ["480x832x81", "832x480x81", "640x640x81", "240x416x17"]))
    assert choose_size(sizes, 99, 1080, 1920) == sizes[0]
    assert choose_size(sizes, 99, 1920, 1080) == sizes[1]
    assert choose_size(sizes, 81, 900, 800) == sizes[2]
    assert choose_size(sizes, 80, 1080, 1920) == sizes[3]
    assert choose_size(sizes, 99, 479, 832) == sizes[3]
    with pytest.raises(Skipped, match="too short: 16 frames, 17 are needed"):
        choose_size(sizes, 16, 1080, 1920)
    with pytest.raises(Skipped, match="too small: 100x100"):
        choose_size(sizes, 99, 100, 100)


def test_fit_scales_down_and_cuts_around_the_middle():
    frames = video(4, 40, 120)
    frames[:, :, 40:80] = 200
    small = fit(frames, Size(3, 20, 20))
    assert small.shape == (3, 20, 20, 3) and (np.abs(small[:, :, 4:-4].astype(int) - 200) < 3).all()
    assert fit(frames, Size()) is not None and np.array_equal(fit(frames, Size()), frames)
    assert np.array_equal(fit(frames, Size(2, 40, 120)), frames[:2])
    assert np.array_equal(fit(frames, Size(None, 40, 40)), frames[:, :, 40:80])
