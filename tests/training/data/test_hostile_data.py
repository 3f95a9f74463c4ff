"""Damaged, hostile and oddly named data: each costs itself alone, and all of it is counted."""

import csv
import gzip
import io
import json
import os
import tarfile
import unicodedata

import av
import numpy as np
import pytest

from nabla_attn.generation.video import write_video
from nabla_attn.training.data import tars
from nabla_attn.training.data.clip import MAX_CAPTION_BYTES, Clip, Skipped, read_clip
from nabla_attn.training.data.folder import FolderSource, open_source
from nabla_attn.training.data.tars import TarSource


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    write_video(np.zeros((5, 16, 32, 3), np.uint8), path, 8)
    return path.read_bytes()


def listed(source):
    """Name -> caption, or the reason why a clip is skipped, without what is special about it."""
    result = {}
    for clip in source.read(0, len(source)):
        try:
            assert read_clip(clip, None, None).shape == (5, 16, 32, 3)
            result[clip.name] = clip.caption
        except Skipped as reason:
            result[clip.name] = f"<{reason.kind}>"
    assert len(result) == len(source)
    source.identity()
    return result


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def jsonl(folder, *lines):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    put(folder / "metadata.jsonl", b"\n".join(lines))


def row(name, text="a circle"):
    return {"file_name": name, "text": text}


def test_one_broken_line_costs_itself(tmp_path, mp4):
    for name in "abc":
        put(tmp_path / f"{name}.mp4", mp4)
    jsonl(
        tmp_path,
        row("a.mp4"),
        b'{"file_name": "b.mp4"',
        b'{"file_name": "b.mp4", "text": "caf\xe9"}',
        b"[" * 100_000,
        b'{"text": "' + b"x" * 2**21 + b'"}',
        row("../a.mp4"),
        row("/etc/passwd"),
        row("a" * 5000 + ".mp4"),
        row("nul\0.mp4"),
        row("half \ud83d.mp4"),
        row("b.mp4", "x" * (MAX_CAPTION_BYTES + 1)),
        row("c.mp4", 7),
        row("deep/../c.mp4", "c"),
    )
    found = listed(FolderSource(tmp_path))
    assert found == {
        "a.mp4": "a circle",
        **{f"metadata.jsonl, line {n}": "<broken line>" for n in (2, 3, 4, 5)},
        "../a.mp4": "<outside the folder>",
        "/etc/passwd": "<outside the folder>",
        "a" * 5000 + ".mp4": "<no video>",
        "nul\0.mp4": "<no video>",
        "half \\ud83d.mp4": "<no video>",
        "b.mp4": "<caption too long>",
        "c.mp4": "<no caption>",
        "deep/../c.mp4": "c",
    }


def test_a_stray_quote_in_csv_costs_its_line(tmp_path, mp4):
    for name in "abcd":
        put(tmp_path / f"{name}.mp4", mp4)
    lines = ["file_name,text", "a.mp4,one", 'b.mp4,"two', "c.mp4,three, four", "d.mp4,five"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    assert listed(FolderSource(tmp_path)) == {
        "a.mp4": "one",
        "metadata.csv, line 3": "<broken line>",
        "metadata.csv, line 4": "<broken line>",
        "d.mp4": "five",
        "b.mp4": "<no caption>",
        "c.mp4": "<no caption>",
    }
    put(tmp_path / "metadata.csv", b"file_name,text\na.mp4,caf\xe9\nb.mp4,two\n")
    found = listed(FolderSource(tmp_path))
    assert found["metadata.csv, line 2"] == "<broken line>" and found["b.mp4"] == "two"


def test_half_an_emoji_in_a_caption_is_dropped(tmp_path, mp4):
    put(tmp_path / "a.mp4", mp4)
    jsonl(tmp_path, row("a.mp4", "a red circle \ud83d"))
    assert listed(FolderSource(tmp_path)) == {"a.mp4": "a red circle"}
    data = json.dumps({"text": "a \ud83d\ude00 face \ude00"}).encode()
    write_tar(tmp_path / "a.tar", {"1.mp4": mp4, "1.json": data})
    assert listed(TarSource([tmp_path / "a.tar"])) == {"a.tar/1.mp4": "a \U0001f600 face"}


def test_videos_that_metadata_does_not_name_are_counted(tmp_path, mp4):
    for name in ("a.mp4", "deep/b.MP4", ".c.mov"):
        put(tmp_path / name, mp4)
    jsonl(tmp_path, row("a.mp4"))
    assert listed(FolderSource(tmp_path)) == {
        "a.mp4": "a circle",
        "deep/b.MP4": "<no caption>",
        ".c.mov": "<no caption>",
    }


def test_odd_names_with_captions_beside_them(tmp_path, mp4):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    names = ["v1.0.final.mp4", ".mp4", ".hidden.mp4", "日本.mp4", "two\nlines.mp4", "a.mp4.mp4"]
    for name in names:
        put(tmp_path / name, mp4)
        put((tmp_path / name).with_suffix(".txt"), b"fine")
    put(tmp_path / f"{nfd}.mp4", mp4)
    put(tmp_path / f"{nfc}.txt", b"fine")
    put(tmp_path / "b.mp4", mp4)
    put(tmp_path / "b.mp4.txt", b"fine")
    latin = os.fsdecode(b"caf\xe9")
    put(tmp_path / f"{latin}.mp4", mp4)
    put(tmp_path / f"{latin}.txt", b"fine")
    found = listed(FolderSource(tmp_path))
    assert found == dict.fromkeys([*names, f"{nfd}.mp4", "b.mp4", "caf\\udce9.mp4"], "fine")
    json.dumps(list(found), ensure_ascii=False).encode()


def test_twins_keep_to_their_own_captions(tmp_path, mp4):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    videos = [f"{name}.mp4" for name in (nfc, nfd, "A", "a", "b", "b.mp4", "sp", "sp ", "[a]", "x")]
    for name in videos:
        put(tmp_path / name, mp4)
    names = (f"{nfc}.txt", "A.txt", "b.mp4.txt", "sp .txt", "[a].txt", "*.txt")
    for name in names:
        put(tmp_path / name, name.encode())
    expected = dict.fromkeys(videos, "<no caption>")
    owners = (f"{nfc}.mp4", "A.mp4", "b.mp4.mp4", "sp .mp4", "[a].mp4")
    expected |= dict(zip(owners, names, strict=False))
    assert listed(FolderSource(tmp_path)) == expected
    # A line for each twin, and only one of them is there.
    (tmp_path / f"{nfd}.mp4").unlink()
    jsonl(tmp_path, row(f"{nfc}.mp4", "nfc"), row(f"{nfd}.mp4", "nfd"), row("A.mp4"))
    found = listed(FolderSource(tmp_path))
    assert (found[f"{nfc}.mp4"], found[f"{nfd}.mp4"]) == ("nfc", "<no video>")
    assert (found["A.mp4"], found["a.mp4"]) == ("a circle", "<no caption>")


ODD = (
    "two\nlines",
    "-dash",
    "--help",
    "a" * 251,
    " sp ",
    "dot..",
    "%s",
    "*",
    "?",
    "[ab]",
    "#1",
    "~",
)


@pytest.mark.parametrize("place", ["beside", "jsonl", "csv", "tar"])
def test_names_that_shells_and_patterns_would_change(tmp_path, mp4, place):
    expected = {f"{stem}.mp4": f"caption {number}" for number, stem in enumerate(ODD)}
    if place == "tar":
        files = {name.replace(".mp4", ".txt"): text.encode() for name, text in expected.items()}
        members = {name: mp4 for name in expected} | files
        write_tar(tmp_path / "x.tar", dict(sorted(members.items())))
        found = listed(open_source([tmp_path]))
        assert {name.removeprefix("x.tar/"): text for name, text in found.items()} == expected
        return
    for name, text in expected.items():
        put(tmp_path / name, mp4)
        if place == "beside":
            put((tmp_path / name).with_suffix(".txt"), text.encode())
    if place == "jsonl":
        jsonl(tmp_path, *(row(name, text) for name, text in expected.items()))
    elif place == "csv":
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *expected.items()])
    assert listed(open_source([tmp_path])) == expected


def test_links_are_followed_and_what_leads_nowhere_is_counted(tmp_path, mp4):
    data = tmp_path / "data"
    put(tmp_path / "blobs" / "1", mp4)
    put(tmp_path / "blobs" / "2", b"fine")
    put(tmp_path / "other" / "b.mp4", mp4)
    put(tmp_path / "other" / "b.txt", b"fine")
    data.mkdir()
    (data / "a.mp4").symlink_to(tmp_path / "blobs" / "1")
    (data / "a.txt").symlink_to(tmp_path / "blobs" / "2")
    (data / "part").symlink_to(tmp_path / "other")
    (data / "again").symlink_to(tmp_path / "other")
    (data / "gone.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other" / "back").symlink_to(data)  # a loop
    os.mkfifo(data / "pipe.mp4")
    found = listed(FolderSource(data))
    assert found == {
        "a.mp4": "fine",
        "part/b.mp4": "fine",
        "again/b.mp4": "fine",
        "gone.mp4": "<no video>",
        "pipe.mp4": "<no video>",
    }


def test_the_layout_of_the_hubs_cache(tmp_path, mp4):
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    put(blobs / "1", mp4)
    put(blobs / "2", json.dumps(row("videos/a.mp4")).encode())
    (snapshot / "videos").mkdir(parents=True)
    (snapshot / "videos" / "a.mp4").symlink_to("../../../blobs/1")
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/2")
    assert listed(open_source([snapshot])) == {"videos/a.mp4": "a circle"}
    write_tar(blobs / "3", {"1.mp4": mp4, "1.txt": b"fine"})
    (tmp_path / "tars" / "train").mkdir(parents=True)
    (tmp_path / "tars" / "train" / "x.tar").symlink_to(blobs / "3")
    assert listed(open_source([tmp_path / "tars"])) == {"x.tar/1.mp4": "fine"}


def test_tar_files_beside_videos_are_refused(tmp_path, mp4):
    put(tmp_path / "a.mp4", mp4)
    put(tmp_path / "a.txt", b"fine")
    write_tar(tmp_path / "b.tar", {"1.mp4": mp4, "1.txt": b"fine"})
    with pytest.raises(ValueError, match=r"b\.tar and a\.mp4"):
        open_source([tmp_path])


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def test_members_with_any_name_are_counted(tmp_path, mp4):
    members = {
        "clip.001.mp4": mp4,
        "clip.001.txt": b"one",
        "clip.002.mp4": mp4,
        "clip.002.txt": b"two",
        "d/._x.mp4": mp4,
        "d/._x.txt": b"hidden",
        "e.left.mp4": mp4,
        "e.right.mov": mp4,
        "e.txt": b"both",
        os.fsdecode(b"caf\xe9.mp4"): mp4,
        os.fsdecode(b"caf\xe9.txt"): b"latin",
        "F.MP4": mp4,
        "F.TXT": b"upper",
        "long.mp4": mp4,
        "long.json": b'{"text": "' + b"x" * 2**20 + b'"}',
        "latin.mp4": mp4,
        "latin.txt": b"caf\xe9",
    }
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as file:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "clip.001.mp4"
        file.addfile(link)
    found = listed(TarSource([tmp_path / "a.tar"]))
    assert {name.removeprefix("a.tar/"): caption for name, caption in found.items()} == {
        "clip.001.mp4": "one",
        "clip.002.mp4": "two",
        "d/._x.mp4": "hidden",
        "e.left.mp4": "both",
        "e.right.mov": "both",
        "caf\\udce9.mp4": "latin",
        "F.MP4": "upper",
        "long.mp4": "<caption too long>",
        "latin.mp4": "<no caption>",
        "link.mp4": "<unreadable>",
    }


def test_no_member_takes_the_caption_of_another(tmp_path, mp4):
    write_tar(
        tmp_path / "a.tar",
        {
            "clip.001.mp4": mp4,
            "clip.001.txt": b"one",
            "clip.002.mp4": mp4,
            "c.mov": mp4,
            "c.mov.txt": b"mov",
            "c.mp4": mp4,
            "c.mp4.txt": b"mp4",
            "d.mp4": mp4,
            "d.mp4.mp4": mp4,
            "d.mp4.txt": b"twice",
            "e.left.mp4": mp4,
            "e.caption.txt": b"shared",
        },
    )
    found = listed(TarSource([tmp_path / "a.tar"]))
    assert {name.removeprefix("a.tar/"): caption for name, caption in found.items()} == {
        "clip.001.mp4": "one",
        "clip.002.mp4": "<no caption>",
        "c.mov": "mov",
        "c.mp4": "mp4",
        "d.mp4": "<no caption>",
        "d.mp4.mp4": "twice",
        "e.left.mp4": "shared",
    }


def test_damage_in_the_middle_of_a_tar_file_is_counted(tmp_path, mp4):
    path = tmp_path / "a.tar"
    kinds = ((".mp4", mp4), (".txt", b"x"))
    write_tar(path, {f"{i}{end}": data for i in range(3) for end, data in kinds})
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as file:
        place = file.getmember("1.mp4").offset
    data[place : place + 100] = b"\xff" * 100
    path.write_bytes(data)
    found = listed(TarSource([path]))
    assert found["a.tar/0.mp4"] == found["a.tar/2.mp4"] == "x"
    assert found["a.tar, damaged"] == "<unreadable>"
    two = tmp_path / "two.tar"
    write_tar(path, {"0.mp4": mp4, "0.txt": b"x"})
    two.write_bytes(path.read_bytes() * 2)  # cat a.tar a.tar
    assert len(TarSource([two])) == 2


def test_gzipped_tar_files_and_what_grows_beyond_measure(tmp_path, mp4, monkeypatch):
    write_tar(tmp_path / "a.tar", {"1.mp4": mp4, "1.txt": b"fine"})
    good = tmp_path / "good.tar.gz"
    good.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    bomb = tmp_path / "bomb.tar"
    header = tarfile.TarInfo("b.mp4")
    header.size = 2**40
    bomb.write_bytes(gzip.compress(header.tobuf() + bytes(2**22)))
    monkeypatch.setattr(tars, "MAX_UNPACKED_BYTES", 2**21)
    assert listed(TarSource([good, bomb])) == {
        "bomb.tar/b.mp4": "<unreadable>",
        "bomb.tar, damaged": "<unreadable>",
        "good.tar.gz/1.mp4": "fine",
    }
    with pytest.raises(ValueError, match="unpacks to more than"):
        header.size = 2**21 + 1
        bomb.write_bytes(gzip.compress(b"\xff" * 2**22))
        TarSource([bomb])


def test_a_member_that_claims_more_than_there_is(tmp_path, mp4, monkeypatch):
    path = tmp_path / "a.tar"
    write_tar(path, {"0.mp4": mp4, "0.txt": b"x"})
    header = tarfile.TarInfo("1.mp4")
    header.size = 2**33
    with tarfile.open(path) as file:
        end = file.getmember("0.txt").offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + header.tobuf() + bytes(1024))
    found = listed(TarSource([path]))
    assert found.pop("a.tar/0.mp4") == "x"
    assert set(found.values()) == {"<unreadable>"}
    monkeypatch.setattr(tars, "MAX_VIDEO_BYTES", len(mp4) - 1)
    with pytest.raises(ValueError, match="no videos"):
        TarSource([path])


def damaged_videos(folder):
    """A video of noise, and what is left of it after flipped bits or a cut."""
    path = folder / "whole.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), np.uint8)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    start = data.index(b"mdat") + 2000
    for seed in range(3):
        flipped = bytearray(data)
        for place in np.random.default_rng(seed).integers(start, len(data) - 100, 10):
            flipped[place] ^= 4
        yield put(folder / f"flipped-{seed}.mp4", flipped)
    for share in (50, 95, 99):
        yield put(folder / f"cut-{share}.mp4", data[: len(data) * share // 100])


def test_damaged_videos_are_skipped_and_never_smeared(tmp_path):
    for path in damaged_videos(tmp_path):
        with pytest.raises(Skipped) as reason:
            read_clip(Clip("v", "", lambda path=path: path), None, None)
        assert reason.value.kind == "unreadable", path
    whole = read_clip(Clip("v", "", lambda: tmp_path / "whole.mp4"), None, None)
    assert whole.shape == (17, 64, 64, 3)


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_a_matroska_file_that_ends_early_is_skipped(tmp_path, codec):
    path = tmp_path / "v.mkv"
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert len(read_clip(Clip("v", "", lambda: path), None, None)) == 9
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    with pytest.raises(Skipped, match="it ends early"):
        read_clip(Clip("v", "", lambda: path), None, None)
    # The frames that were asked for are there.
    assert len(read_clip(Clip("v", "", lambda: path), 3, None)) == 3


def test_whatever_a_decoder_raises_costs_one_clip(monkeypatch, mp4, tmp_path):
    def fail(source):
        raise IndexError("bytes nobody expected")
        yield

    monkeypatch.setattr("nabla_attn.training.data.clip.iterate_video", fail)
    with pytest.raises(Skipped, match="unreadable: bytes nobody expected"):
        read_clip(Clip("v", "", lambda: put(tmp_path / "v.mp4", mp4)), None, None)
