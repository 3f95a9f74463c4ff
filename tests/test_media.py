"""Images and videos from outside are read as a person sees them, or refused with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest

from nabla_attn.generation.video import write_video
from nabla_attn.media import UnreadableMedia, iterate_video, read_image, read_video

RED, GREY = (250, 0, 0), (20, 20, 20)


def corner(height=48, width=96, mark=RED):
    """Grey pixels with a mark in the upper left quarter."""
    pixels = np.full((height, width, 3), GREY, np.uint8)
    pixels[: height // 2, : width // 2] = mark
    return pixels


def marked_corner(picture):
    """Row and column, 0 or 1, of the quarter with the mark."""
    values = np.asarray(picture)[..., 0].astype(int)
    height, width = values.shape
    quarters = values[[4, 4, height - 5, height - 5], [4, width - 5, 4, width - 5]]
    assert (quarters > 128).sum() == 1, quarters
    return divmod(int(quarters.argmax()), 2)


# What a viewer shows for each EXIF orientation: corner of the mark, and whether sides swap.
ORIENTATIONS = {
    1: ((0, 0), False),
    2: ((0, 1), False),
    3: ((1, 1), False),
    4: ((1, 0), False),
    5: ((0, 0), True),
    6: ((0, 1), True),
    7: ((1, 1), True),
    8: ((1, 0), True),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_photos_stand_upright(tmp_path, orientation, suffix):
    from PIL import Image

    image = Image.fromarray(corner())
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    shown = read_image(tmp_path / f"a.{suffix}")
    where, is_swapped = ORIENTATIONS[orientation]
    assert shown.size == ((48, 96) if is_swapped else (96, 48))
    assert marked_corner(shown) == where
    assert shown.mode == "RGB"


def test_sixteen_bits_and_floats_keep_their_greys(tmp_path):
    from PIL import Image

    ramp = np.linspace(0, 65535, 64 * 4).reshape(4, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "b.tiff")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "c.tiff")
    for name in ("a.png", "b.tiff", "c.tiff"):
        shown = np.asarray(read_image(tmp_path / name)).astype(int)
        assert np.abs(shown - (ramp / 257)[..., None]).max() <= 1, name
    Image.fromarray((ramp - 10).astype(np.float32)).save(tmp_path / "d.tiff")
    with pytest.raises(ValueError, match=r"d\.tiff .*floats from 0 to 1"):
        read_image(tmp_path / "d.tiff")


def test_palettes_grey_and_cmyk(tmp_path):
    from PIL import Image

    image = Image.fromarray(corner())
    image.quantize(4).save(tmp_path / "palette.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.convert("1").save(tmp_path / "bits.png")
    for name in ("palette.png", "cmyk.jpg"):
        assert np.abs(np.asarray(read_image(tmp_path / name)).astype(int) - corner()).max() < 12
    assert read_image(tmp_path / "grey.png").getpixel((4, 4)) == (75, 75, 75)
    assert read_image(tmp_path / "bits.png").mode == "RGB"


def transparent(mode, tmp_path):
    """A picture whose right half is clear and hides black; its left half is red."""
    from PIL import Image

    pixels = np.zeros((8, 16, 4), np.uint8)
    pixels[:, :8] = (*RED, 255)
    image = Image.fromarray(pixels)
    if mode == "P":
        flat = Image.fromarray(pixels[..., :3]).quantize(2)
        flat.save(tmp_path / "a.png", transparency=flat.getpixel((12, 4)))
    elif mode == "RGB":
        image.convert("RGB").save(tmp_path / "a.png", transparency=(0, 0, 0))
    else:
        image.convert(mode).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_becomes_white_and_says_so(tmp_path, mode):
    path = transparent(mode, tmp_path)
    with pytest.warns(UserWarning, match=r"a\.png is transparent in places; they become white"):
        shown = read_image(path)
    assert shown.getpixel((12, 4)) == (255, 255, 255)
    assert shown.getpixel((4, 4))[0] > 70


def test_opaque_alpha_is_no_transparency(tmp_path, recwarn):
    from PIL import Image

    Image.fromarray(corner()).convert("RGBA").save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), corner())
    assert not recwarn.list


def swapped_profile():
    """A profile whose red primary is sRGB's green, and the other way round."""
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    places = {}
    for index in range(count):
        place = 132 + 12 * index
        places[bytes(profile[place : place + 4])] = place + 4
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    profile[red : red + 8], profile[green : green + 8] = (
        profile[green : green + 8],
        profile[red : red + 8],
    )
    return (
        bytes(profile).replace(b"s\0R\0G\0B", b"s\0w\0a\0p").replace(b"sRGB built", b"swap built")
    )


def test_colour_profiles_are_applied(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=swapped_profile())
    red, green, blue = read_image(tmp_path / "a.png").getpixel((4, 4))
    assert green > 240 and red < 15 and blue < 15
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "b.png", icc_profile=b"no profile")
    with pytest.warns(UserWarning, match=r"b\.png: its colour profile cannot be used"):
        assert read_image(tmp_path / "b.png").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("dpi", "size"), [((72, 72), (96, 48)), ((100, 200), (192, 48)), ((200, 100), (96, 96))]
)
def test_pixels_that_are_not_square_are_stretched(tmp_path, dpi, size, recwarn):
    from PIL import Image

    image = Image.fromarray(corner())
    exif = image.getexif()
    for name in ("a.jpg", "a.png", "a.tiff"):
        image.save(tmp_path / name, dpi=dpi)
        shown = read_image(tmp_path / name)
        assert shown.size == size, name
        assert marked_corner(shown) == (0, 0)
    assert bool(recwarn.list) == (dpi[0] != dpi[1])
    exif[0x0112] = 6
    image.save(tmp_path / "b.jpg", dpi=dpi, exif=exif)
    assert read_image(tmp_path / "b.jpg").size == size[::-1]


def test_animations_give_their_first_picture(tmp_path):
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"a\.gif has 2 pictures; the first is used"):
        assert read_image(tmp_path / "a.gif").getpixel((4, 4)) == (255, 0, 0)


def bomb():
    """A PNG of a few bytes that claims four thousand million pixels."""
    size = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def png(tmp_path):
    from PIL import Image

    written = io.BytesIO()
    Image.fromarray(corner()).save(written, "PNG")
    return written.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        bomb(),
        "short",
        "cut",
    ],
    ids=["empty", "text", "program", "bomb", "short", "cut"],
)
def test_what_is_no_image_is_one_line(tmp_path, content):
    if content == "short":
        content = png(tmp_path)[:-40]
    elif content == "cut":
        content = png(tmp_path).replace(b"IDAT", b"IDAX")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png is no readable image: [^\n]*$"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"missing\.png is no readable image: no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="is no readable image: is a directory"):
        read_image(tmp_path)


# Display matrix of the container: where (x, y) goes. Then the corner of the mark.
MATRICES = {
    (1, 0, 0, 1): (0, 0),
    (0, 1, -1, 0): (0, 1),
    (-1, 0, 0, -1): (1, 1),
    (0, -1, 1, 0): (1, 0),
    (-1, 0, 0, 1): (0, 1),
    (1, 0, 0, -1): (1, 0),
    (0, 1, 1, 0): (0, 0),
    (0, -1, -1, 0): (1, 1),
}


def turn(path, matrix):
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    place = data.index(b"tkhd") + 44
    entries = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[place : place + 36] = b"".join((v % 2**32).to_bytes(4, "big") for v in entries)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_stand_upright(tmp_path, matrix):
    path = tmp_path / "a.mp4"
    write_video(np.stack([corner()] * 3), path, 8)
    turn(path, matrix)
    video = read_video(path)
    is_turned = matrix[0] == 0
    assert video.shape == ((3, 96, 48, 3) if is_turned else (3, 48, 96, 3))
    assert marked_corner(video[1]) == MATRICES[matrix]


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", tags=None, metadata=None, **settings):
    """Write frames with settings that `write_video` does not have."""
    import av

    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.options = {"crf": "10"} if codec == "libx264" else {}
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            kind = "rgba" if frame.shape[-1] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(frame, format=kind)
            container.mux(stream.encode(picture.reformat(format=pix_fmt, **_matrix(tags))))
        container.mux(stream.encode())
    return path


def _matrix(tags):
    names = {"colorspace": "dst_colorspace", "color_range": "dst_color_range"}
    return {names[name]: value for name, value in (tags or {}).items() if name in names}


@pytest.mark.parametrize(("space", "color_range"), [(1, 1), (1, 2), (5, 1), (5, 2)])
def test_colours_are_read_by_their_tags(tmp_path, space, color_range):
    frames = [np.full((32, 32, 3), (30, 200, 60), np.uint8)] * 2
    tags = {"colorspace": space, "color_range": color_range}
    path = encode(tmp_path / "a.mp4", frames, tags=tags)
    assert np.abs(read_video(path).astype(int) - frames[0]).max() <= 6


def test_untagged_video_in_hd_has_the_colours_of_hd(tmp_path):
    frames = [np.full((720, 1280, 3), (30, 200, 60), np.uint8)]
    path = encode(tmp_path / "a.avi", frames, codec="mpeg4", tags={"colorspace": 1})
    assert np.abs(read_video(path).astype(int) - frames[0]).max() <= 8


def test_wide_colours_become_srgb(tmp_path):
    """sRGB red in the primaries of BT.2020 has much green; read as it stands it would be orange."""
    frames = [np.full((32, 32, 3), (202, 59, 18), np.uint8)] * 2
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 1, "color_range": 1}
    path = encode(tmp_path / "a.mp4", frames, tags=tags)
    red, green, blue = read_video(path)[0, 16, 16].astype(int)
    assert red > 225 and green < 45 and blue < 45


def test_transparent_video_lies_on_white(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16] = (*RED, 255)
    path = encode(tmp_path / "a.mov", [pixels] * 2, codec="qtrle", pix_fmt="argb")
    video = read_video(path)
    assert tuple(video[0, 4, 28]) == (255, 255, 255)
    assert tuple(video[0, 4, 4]) == RED


@pytest.mark.parametrize(("aspect", "shape"), [((2, 1), (48, 192)), ((1, 2), (96, 96))])
def test_videos_with_pixels_that_are_not_square(tmp_path, aspect, shape):
    from fractions import Fraction

    frames = [corner()] * 2
    path = encode(tmp_path / "a.mp4", frames, sample_aspect_ratio=Fraction(*aspect))
    with pytest.warns(UserWarning, match=r"a\.mp4: its pixels are not square; 96x48 becomes"):
        video = read_video(path)
    assert video.shape == (2, *shape, 3)
    assert marked_corner(video[0]) == (0, 0)


def test_titles_in_any_encoding(tmp_path):
    path = encode(tmp_path / "a.mp4", [corner()] * 2, metadata={"title": "TITLEXTITLE"})
    path.write_bytes(path.read_bytes().replace(b"TITLEXTITLE", b"Caf\xe9 \xfcber.."))
    assert read_video(path).shape == (2, 48, 96, 3)


def test_a_size_that_changes_is_named(tmp_path):
    for name, height in (("a.h264", 48), ("b.h264", 64)):
        encode(tmp_path / name, [corner(height)] * 3)
    joined = tmp_path / "c.h264"
    joined.write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    with pytest.raises(ValueError, match=r"c\.h264: its size changes from 96x48 to 96x64 at frame"):
        read_video(joined)
    assert read_video(joined, limit=2).shape == (2, 48, 96, 3)


def noisy(path):
    rows, columns = np.mgrid[0:96, 0:128]
    moving = [(columns + 4 * t) % 256 + 0 * rows for t in range(25)]
    noise = np.random.default_rng(0).integers(0, 40, (25, 96, 128, 3))
    frames = (np.stack([np.stack([m, rows, m], -1) for m in moving]) * 0.8 + noise).astype(np.uint8)
    write_video(frames, path, 8)
    return path


def test_damage_is_never_taken_for_pictures(tmp_path):
    import random

    path = noisy(tmp_path / "a.mp4")
    intact, whole = read_video(path).astype(int), path.read_bytes()
    start = whole.index(b"mdat") + 2000
    for seed in range(4):
        rng, data = random.Random(seed), bytearray(whole)
        for place in rng.sample(range(start, len(data) - 100), 10):
            data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            video = read_video(path)
        except ValueError:
            continue
        assert np.abs(video - intact).mean((1, 2, 3)).max() < 5
    path.write_bytes(whole[: int(len(whole) * 0.9)])
    with pytest.raises(ValueError, match=r"a\.mp4: "):
        read_video(path)


@pytest.mark.parametrize(
    "content", [b"", b"not a video", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n"]
)
def test_what_is_no_video_is_one_line(tmp_path, content):
    write_video(np.stack([corner()] * 3), tmp_path / "other.mp4", 8)
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the video [^\n]*a\.mp4: [^\n]*$"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "bmp"])
def test_a_picture_where_a_video_is_needed_and_the_other_way_round(tmp_path, kind):
    from PIL import Image

    Image.fromarray(corner()).save(tmp_path / f"a.{kind}")
    picture = (tmp_path / f"a.{kind}").rename(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"a\.mp4: it is a picture \(\w+\), and a video is needed"):
        read_video(picture)
    with pytest.raises(UnreadableMedia, match="a video is needed"):
        next(iterate_video(io.BytesIO(picture.read_bytes())))
    write_video(np.stack([corner()] * 3), tmp_path / "v.mp4", 8)
    video = (tmp_path / "v.mp4").rename(tmp_path / "v.png")
    with pytest.raises(ValueError, match=r"v\.png is no .* it is a video, and a picture is"):
        read_image(video)


def test_sound_alone_and_too_many_frames(tmp_path, monkeypatch):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="it has no video stream"):
        read_video(path)
    write_video(np.stack([corner()] * 5), tmp_path / "a.mp4", 8)
    monkeypatch.setattr("nabla_attn.media.MAX_VIDEO_BYTES", 4 * corner().nbytes)
    with pytest.raises(ValueError, match="cut it shorter"):
        read_video(tmp_path / "a.mp4")
    assert len(read_video(tmp_path / "a.mp4", limit=3)) == 3


def test_frames_come_with_their_times_from_bytes_too(tmp_path):
    write_video(np.stack([corner()] * 3), tmp_path / "a.mp4", 8)
    with (tmp_path / "a.mp4").open("rb") as file:
        times = [time for time, _ in iterate_video(file)]
    assert times == [0, 0.125, 0.25]
    with pytest.raises(UnreadableMedia, match="no such file"):
        next(iterate_video(tmp_path / "missing.mp4"))


@pytest.mark.parametrize("name", ["fragments.mp4", "reordered.mkv"])
def test_what_counts_no_frames_must_be_as_long_as_it_says(tmp_path, name):
    import av

    options = {"movflags": "frag_keyframe+empty_moov"} if name.endswith("mp4") else {}
    frames = np.random.default_rng(0).integers(0, 255, (21, 32, 32, 3), np.uint8)
    with av.open(str(tmp_path / name), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.options = {"g": "4"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert len(read_video(tmp_path / name)) == 21
    content = (tmp_path / name).read_bytes()
    last = content.rindex(b"moof" if name.endswith("mp4") else b"\x1f\x43\xb6\x75")
    # In the head of the last part, and in its middle: the part is gone without an error.
    for end in (last + 20, (last + len(content)) // 2):
        (tmp_path / name).write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"it (is damaged, or )?ends early"):
            read_video(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "codec", "kind"),
    [("a.gif", "gif", "rgb8"), ("a.apng", "apng", "rgb24"), ("a.ts", "mpeg2video", "yuv420p")],
)
def test_animations_and_transport_streams_that_are_cut(tmp_path, name, codec, kind):
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8)
    path = encode(tmp_path / name, frames, codec, kind)
    assert len(read_video(path)) == 9
    content = path.read_bytes()
    for share in (0.5, 0.8, 0.95):
        path.write_bytes(content[: int(len(content) * share) | 1])
        with pytest.raises(ValueError, match="cannot read the video"):
            read_video(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="cannot read the video"):
        read_video(path)


@pytest.mark.parametrize(("gamma", "shown"), [(1.0, 188), (0.45455, 128), (0.55, 144), (None, 128)])
def test_the_gamma_of_png_files_is_applied(tmp_path, gamma, shown):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if gamma is not None:
        info.add(b"gAMA", round(gamma * 100000).to_bytes(4, "big"))
    Image.new("RGB", (8, 8), (128, 128, 128)).save(tmp_path / "a.png", pnginfo=info)
    assert abs(read_image(tmp_path / "a.png").getpixel((3, 3))[0] - shown) <= 2


def test_the_cover_of_a_sound_file_is_no_video(tmp_path):
    import av
    from av.stream import Disposition

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 96, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(corner(), format="rgb24")))
        container.mux(cover.encode())
    with pytest.raises(ValueError, match="its only picture is a cover"):
        read_video(tmp_path / "a.mp4")


def test_sixteen_bit_grey_that_is_clear_in_places(tmp_path):
    from PIL import Image

    greys = np.zeros((8, 16), np.uint16)
    greys[:, 8:] = 300
    Image.fromarray(greys).save(tmp_path / "plain.png")
    head, rest = (tmp_path / "plain.png").read_bytes()[:33], b"tRNS" + struct.pack(">H", 300)
    chunk = struct.pack(">I", 2) + rest + struct.pack(">I", zlib.crc32(rest))
    (tmp_path / "a.png").write_bytes(head + chunk + (tmp_path / "plain.png").read_bytes()[33:])
    with pytest.warns(UserWarning, match=r"a\.png is transparent in places"):
        shown = read_image(tmp_path / "a.png")
    assert [shown.getpixel((x, 4))[0] for x in (4, 12)] == [0, 255]
