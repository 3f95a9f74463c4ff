"""Images and videos from outside, as a person sees them: the readers that every verb shares.

Pictures come upright and unmirrored, in sRGB with eight bits a channel and square pixels, on white
where they were transparent. What cannot be read whole is refused with the reason.
"""

import io
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from nabla_attn.errors import first_line

if TYPE_CHECKING:
    from PIL.Image import Image

# Of formats that run no other program and open no other file.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,h264,hevc,flv,ogg,asf,gif,apng,mxf,ivf"
MAX_FRAME_PIXELS = 2**26
MAX_VIDEO_BYTES = 4 * 2**30
GAMMA_ALIKE = 0.05
"""Exponents of a PNG this close to 1 are those of sRGB, rounded."""
TS_PACKET, TS_SYNC = 188, 0x47
MAX_PIXEL_ASPECT = 8
"""Pixels that are more oblong than this are a mistake in the file, and read as square."""
UNKNOWN_COLOURS, WIDE_PRIMARIES, HDR_CURVES = 2, (9, 11, 12), (16, 18)
"""ffmpeg's numbers: unspecified; BT.2020 and both kinds of P3; PQ and HLG."""


class UnreadableMedia(ValueError):
    """A file that is no whole picture or video; the text is the reason alone."""


def read_image(path: str | Path) -> "Image":
    """Read an image file as a person sees it.

    Orientation and mirroring of the file are applied, 16 bits, palettes, CMYK and colour profiles
    become sRGB, and pixels that are not square are stretched. Transparency is laid on white and
    the first picture of an animation is taken, with a warning.

    Args:
        path: The image file, in one of `IMAGE_FORMATS`.

    Returns:
        A `PIL.Image.Image` in mode RGB.

    Raises:
        ValueError: The file is missing, damaged, far too large or no image; the file is named.
    """
    from PIL import Image, ImageOps

    known = _known_formats()
    try:
        with Image.open(path, formats=known) as image:
            if (count := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
                warnings.warn(f"{path} has {count} pictures; the first is used.", stacklevel=2)
            image.load()
            picture = _to_rgb(image, path)
            width, height = _square_size(image.width, image.height, _pixel_aspect(image))
            if (width, height) != picture.size:
                _warn_stretched(path, picture.size, (width, height))
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            picture.info, picture._exif = {}, image.getexif()  # type: ignore[attr-defined]
            return ImageOps.exif_transpose(picture)
    except OSError as error:
        if not error.strerror and _is_video(path):
            raise ValueError(
                f"{path} is no readable image: it is a video, and a picture is needed. Pass one of "
                "its frames."
            ) from error
        reason = error.strerror or "it is damaged, or no image of a known format"
        raise ValueError(
            f"{path} is no readable image: {reason.lower()}. Known: {', '.join(known)}."
        ) from error
    except Exception as error:
        # Decoders meet hostile bytes with every kind of error.
        raise ValueError(f"{path} is no readable image: {first_line(error)}.") from error


def read_video(path: str | Path, limit: int | None = None) -> np.ndarray:
    """Read the frames of a video file as a person sees them.

    Args:
        path: The video file.
        limit: Number of frames after which reading stops; None reads all.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        ValueError: The file is missing, damaged, too large or no video, or its size changes; the
            file is named.
    """
    try:
        return stack_frames(islice((picture for _, picture in iterate_video(path)), limit))
    except UnreadableMedia as error:
        raise ValueError(f"cannot read the video {path}: {error}.") from error


def iterate_video(source: str | Path | BinaryIO) -> Iterator[tuple[float | None, np.ndarray]]:
    """Decode a video, one upright frame after another.

    The result is the same whatever the number of threads. Errors in the stream end the iteration
    instead of passing as smeared frames.

    Args:
        source: The video file, or its bytes in an open binary file.

    Yields:
        The time in seconds, None where the file has none, and uint8 [height, width, 3].

    Raises:
        UnreadableMedia: The file is missing, damaged, cut short or too large, or has no video.
    """
    import av
    from av.stream import Disposition
    from av.video.reformatter import VideoReformatter

    # Absolute: a relative name with a colon would be the address of something elsewhere.
    place = str(Path(source).absolute()) if isinstance(source, str | Path) else source
    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:
        # Titles and the like may be in any encoding, and nobody reads them.
        with av.open(place, metadata_errors="replace", options=options) as container:
            # The best one, as the first may be the picture of a cover.
            stream: Any = container.streams.best("video")
            if stream is None or stream.disposition & Disposition.attached_pic:
                what = "it has no video stream" if stream is None else "its only picture is a cover"
                raise UnreadableMedia(what)
            context = stream.codec_context
            context.options = {"err_detect": "explode", "max_pixels": str(MAX_FRAME_PIXELS)}
            context.thread_type = "NONE"
            if _is_stretched(aspect := stream.sample_aspect_ratio):
                size = _square_size(context.width, context.height, aspect)
                _warn_stretched(
                    getattr(source, "name", source), (context.width, context.height), size
                )
            # One for all frames, as it keeps its tables of colours.
            reformatter = VideoReformatter()
            for frame in _decode(container, stream):
                yield frame.time, _to_picture(frame, aspect, reformatter)
            # Where the container counts no frames, its own length says whether all of it is there.
            counts = stream.frames and container.format.name not in ("gif", "apng")
            if not counts and _is_cut(source):
                raise UnreadableMedia("it ends early: less is there than it says")
    except (av.FFmpegError, OSError, MemoryError, ValueError) as error:
        if isinstance(error, UnreadableMedia):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        if kind := _picture_kind(source):
            reason = f"it is a picture ({kind}), and a video is needed"
        raise UnreadableMedia(reason[:1].lower() + reason[1:]) from error


def _known_formats() -> list[str]:
    """Those of `IMAGE_FORMATS` that the installed Pillow reads."""
    from PIL import Image

    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _picture_kind(source: str | Path | BinaryIO) -> str | None:
    """Format of a file that is a picture; None where it is none."""
    from PIL import Image

    try:
        if not isinstance(source, str | Path):
            source.seek(0)
        with Image.open(source, formats=_known_formats()) as image:
            # One of several pictures is a video too, and something else is wrong with it.
            return image.format if getattr(image, "n_frames", 1) == 1 else None
    except Exception:  # of every kind, where the bytes are hostile
        return None


def _is_video(path: str | Path) -> bool:
    """Whether the first frame of a video can be read."""
    try:
        return next(iterate_video(path), None) is not None
    except UnreadableMedia:
        return False


def stack_frames(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Join the frames of one video to uint8 [frames, height, width, 3].

    Raises:
        UnreadableMedia: There is no frame, their size changes, or they would fill the memory.
    """
    frames: list[np.ndarray] = []
    size = 0
    for picture in pictures:
        frames.append(picture)
        size += picture.nbytes
        if picture.shape != frames[0].shape:
            (height, width), (first_height, first_width) = picture.shape[:2], frames[0].shape[:2]
            raise UnreadableMedia(
                f"its size changes from {first_width}x{first_height} to {width}x{height} at frame "
                f"{len(frames)}"
            )
        if size > MAX_VIDEO_BYTES:
            raise UnreadableMedia(
                f"its frames take more than {MAX_VIDEO_BYTES // 2**30} GiB; cut it shorter"
            )
    if not frames:
        raise UnreadableMedia("it has no frames")
    return np.stack(frames)


def _to_rgb(image: "Image", path: str | Path) -> "Image":
    """A loaded image in 8-bit sRGB, on white where it is transparent."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        greys = np.asarray(image)
        shown, clear = _to_8_bits(greys), greys == image.info.get("transparency")
        if clear.any():
            _warn_white(path)
        return Image.fromarray(np.where(clear, np.uint8(255), shown)).convert("RGB")
    is_clear = image.has_transparency_data
    if not is_clear:
        return _to_srgb(image, image, path)
    layers = image.convert("RGBA")
    alpha = layers.getchannel("A")
    colours = _to_srgb(layers.convert("RGB"), image, path)
    if alpha.getextrema()[0] == 255:
        return colours
    _warn_white(path)
    return Image.composite(colours, Image.new("RGB", image.size, "white"), alpha)


def _warn_white(path: str | Path) -> None:
    warnings.warn(f"{path} is transparent in places; they become white.", stacklevel=4)


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits, or floats from 0 to 1, as uint8."""
    values = pixels.astype(np.float64)
    is_float = pixels.dtype.kind == "f"
    top = 1.0 if is_float else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        known = "floats from 0 to 1" if is_float else "16 bits"
        raise ValueError(f"its grey values are not {known}. Save it with 8 or 16 bits a channel")
    return np.rint(values / top * 255).astype(np.uint8)


def _to_srgb(image: "Image", original: "Image", path: str | Path) -> "Image":
    """The colours of `image` by the profile of the file it comes from, in sRGB."""
    from PIL import ImageCms

    profile = original.info.get("icc_profile")
    plain = image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")
    if not profile:
        return _apply_gamma(plain.convert("RGB"), original)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return plain.convert("RGB")
        # The profile of a palette or of grey with alpha describes what was there before.
        if source.profile.xcolor_space.strip() == "GRAY":
            plain = plain.convert("L")
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(plain, source, target, outputMode="RGB")  # type: ignore[return-value]
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        warnings.warn(
            f"{path}: its colour profile cannot be used ({first_line(error)}); its colours are "
            "read as sRGB.",
            stacklevel=4,
        )
        return plain.convert("RGB")


def _apply_gamma(image: "Image", original: "Image") -> "Image":
    """The colours of an RGB image by the gAMA of its PNG file, where that is another than sRGB's.

    Source: PNG, section 13.13, with a display of gamma 2.2.
    """
    gamma = original.info.get("gamma")
    if "srgb" in original.info or not isinstance(gamma, float) or not 0.1 <= gamma <= 2:
        return image
    exponent = 1 / (2.2 * gamma)
    if abs(exponent - 1) < GAMMA_ALIKE:
        return image
    return image.point([round(255 * (level / 255) ** exponent) for level in range(256)] * 3)


def _pixel_aspect(image: "Image") -> Fraction | None:
    """Width over height of a pixel, from the image's resolution; None where it says nothing."""
    names = ("jfif_density", "aspect", "dpi")
    density: Any = next((image.info[name] for name in names if image.info.get(name)), None)
    try:
        across, down = density
        return Fraction(down).limit_denominator(1000) / Fraction(across).limit_denominator(1000)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _is_stretched(aspect: Fraction | None) -> bool:
    """Whether pixels are visibly not square; more than eight to one is an error in the file."""
    if not aspect or aspect < 0:
        return False
    return 1.01 < max(aspect, 1 / aspect) <= MAX_PIXEL_ASPECT


def _square_size(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """The size with square pixels; the shorter direction grows, so that nothing is lost."""
    if aspect is None or not _is_stretched(aspect):
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _warn_stretched(path: object, old: tuple[int, int], new: tuple[int, int]) -> None:
    warnings.warn(
        f"{path}: its pixels are not square; {old[0]}x{old[1]} becomes {new[0]}x{new[1]}.",
        stacklevel=3,
    )


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    packets, end, length = 0, Fraction(0), Fraction(0)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UnreadableMedia("it is damaged, or ends early")
        packets += packet.size > 0
        if packet.pts is not None and packet.duration:
            length = packet.duration * packet.time_base
            end = max(end, packet.pts * packet.time_base + length)
        for frame in packet.decode():
            if frame.is_corrupt:
                raise UnreadableMedia("it is damaged")
            yield frame
    if packets < stream.frames:
        raise UnreadableMedia(f"it ends early: {packets} of {stream.frames} frames are there")
    if end and end + length * 9 / 10 < (declared := _declared_end(stream)):
        raise UnreadableMedia(f"it ends early: {float(end):.3f} of {float(declared):.3f} seconds")


def _is_cut(source: str | Path | BinaryIO) -> bool:
    """Whether a file is shorter than its outermost parts say, in the formats that say it."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            return _is_cut(file)
    size = source.seek(0, 2)
    head = _read_at(source, 0, 189)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _gif_end(source) is None
    if head.startswith(b"\x89PNG"):
        return not size >= _png_end(source) > 0
    if len(head) > TS_PACKET and head[0] == head[TS_PACKET] == TS_SYNC:
        return bool(size % TS_PACKET)
    is_matroska = head.startswith(b"\x1aE\xdf\xa3")
    measure = _element_end if is_matroska else _box_end
    if not is_matroska and head[4:8] not in (b"ftyp", b"styp", b"moov", b"moof"):
        return False
    place = 0
    while 0 <= place < size:
        place = measure(source, place)
    return place > size


def _gif_end(file: BinaryIO) -> int | None:
    """Where a GIF has its last byte; None where it is not there."""
    place = 13 + _colour_table(_read_at(file, 10, 1))
    while head := _read_at(file, place, 10):
        if head[0] == ord(";"):
            return place
        # An extension, or a picture with its table and code size; then pieces up to an empty one.
        place += 2 if head[0] == ord("!") else 11 + _colour_table(head[9:])
        while length := _read_at(file, place, 1):
            place += 1 + length[0]
            if not length[0]:
                break
    return None


def _colour_table(flags: bytes) -> int:
    """Bytes of the table of colours that a GIF's flags announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _png_end(file: BinaryIO) -> int:
    """Where a PNG ends; 0 where its last part is not there."""
    place = 8
    while len(head := _read_at(file, place, 8)) == 8:
        place += 12 + int.from_bytes(head[:4], "big")
        if head[4:] == b"IEND":
            return place
    return 0


def _box_end(file: BinaryIO, place: int) -> int:
    """Where a box of MP4 ends; below 0 where it does not say."""
    head = _read_at(file, place, 16)
    length = int.from_bytes(head[:4], "big")
    if length == 1:
        length = int.from_bytes(head[8:], "big")
    return place + length if length >= 8 else -1


def _element_end(file: BinaryIO, place: int) -> int:
    """Where an element of Matroska ends; below 0 where it does not say, as in a live recording."""
    head = _read_at(file, place, 16)
    name = 9 - head[0].bit_length()
    if not 1 <= name <= 4 or len(head) <= name or not head[name]:
        return -1
    count = 9 - head[name].bit_length()
    bits = 7 * count
    length = int.from_bytes(head[name : name + count], "big") & ((1 << bits) - 1)
    return place + name + count + length if length != (1 << bits) - 1 else -1


def _read_at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _declared_end(stream: Any) -> Fraction:
    """Where a stream of Matroska or WebM ends, as its writer noted it; 0 where there is no note."""
    parts = stream.metadata.get("DURATION", "").rstrip("\0").split(":")
    try:
        hours, minutes, seconds = map(Fraction, parts)
    except ValueError:
        return Fraction(0)
    return 3600 * hours + 60 * minutes + seconds


def _to_picture(frame: Any, aspect: Fraction | None, reformatter: Any) -> np.ndarray:
    """One frame as uint8 [height, width, 3]: sRGB, square pixels, upright."""
    from av.video.reformatter import Colorspace, Interpolation

    width, height = _square_size(frame.width, frame.height, aspect)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    options: dict[str, Any] = {"format": "rgba" if has_alpha else "rgb24"}
    options |= {"width": width, "height": height, "threads": 1}
    if (width, height) != (frame.width, frame.height):
        options["interpolation"] = Interpolation.BICUBIC
    # Players take the colours of large videos without a tag for those of television in HD.
    if frame.colorspace == UNKNOWN_COLOURS and (frame.width >= 1280 or frame.height > 576):
        options["src_colorspace"] = Colorspace.ITU709
    if frame.color_primaries in WIDE_PRIMARIES or frame.color_trc in HDR_CURVES:
        options |= {"dst_color_primaries": 1, "dst_color_trc": 1}
    picture = reformatter.reformat(frame, **options).to_ndarray()
    if has_alpha:
        share = picture[..., 3:].astype(np.float32) / 255
        picture = np.rint(picture[..., :3] * share + 255 * (1 - share)).astype(np.uint8)
    return _upright(picture, frame)


def _upright(picture: np.ndarray, frame: Any) -> np.ndarray:
    """Turn and mirror a picture as the display matrix of its frame says."""
    entry = frame.side_data.get("DISPLAYMATRIX")
    if entry is None:
        return picture
    across, down, _, across_2, down_2 = np.frombuffer(bytes(entry), np.int32)[:5].astype(np.int64)
    # A point (x, y) is shown at (across x + across_2 y, down x + down_2 y).
    if abs(down) > abs(across):
        picture = picture.swapaxes(0, 1)
        across, down_2 = across_2, down
    picture = picture[:, ::-1] if across < 0 else picture
    return picture[::-1] if down_2 < 0 else picture
