"""One self-contained page of a run: its frames, and which blocks attend which."""

import base64
import gzip
import io
from pathlib import Path

import numpy as np

from nabla_attn.files import write_text
from nabla_attn.generation.map_file import SCORE_BITS, RecordedMaps
from nabla_attn.record import RunRecord
from nabla_attn.viz.document import render_page

MAX_BYTES = 6_000_000
MAX_FRAME_BYTES = 1_200_000
WIDTHS = (640, 480, 320, 240, 160)  # pixels of a frame, tried until all frames fit


def write_view(
    path: str | Path, frames: np.ndarray, maps: RecordedMaps, record: RunRecord | None = None
) -> None:
    """Write the page: no server, no network, under 6 MB.

    Args:
        path: HTML file, which appears whole or not at all.
        frames: Video, uint8 [frames, height, width, 3].
        maps: Block maps that were recorded with the video.
        record: Record of the run, for the heading.

    Raises:
        ValueError: The page would be larger than 6 MB.
    """
    page = build_view(frames, maps, record)
    size = len(page.encode())
    if size > MAX_BYTES:
        raise ValueError(
            f"the page would have {size:,} bytes and the limit is {MAX_BYTES:,}. Record fewer "
            "steps, layers or heads."
        )
    write_text(path, page)


def build_view(frames: np.ndarray, maps: RecordedMaps, record: RunRecord | None = None) -> str:
    """Return the page of `write_view` as text; the same input gives the same bytes."""
    chosen = maps.selection
    data = {
        "algorithm": maps.algorithm,
        "prompt": "" if record is None else str(record.config.get("prompt", "")),
        "facts": [] if record is None else _facts(record),
        "blocks": maps.blocks,
        "block": maps.block,
        "grid": maps.grid,
        "steps": chosen.steps,
        "layers": chosen.layers,
        "heads": chosen.heads,
        "counts": tuple(maps.density.shape),
        "scoreBits": SCORE_BITS if chosen.has_scores else 0,
        "density": _heat(maps.density.numpy()),
        "recall": _heat(maps.true_mass.numpy()),
        "best": _heat(maps.best_mass.numpy()),
        "masks": _pack(maps.masks.numpy()),
        "scores": _pack(maps.scores.numpy()),
        "frames": encode_frames(pick_frames(frames, maps.blocks[0])),
    }
    return render_page("view", title=f"What {maps.algorithm} kept", data=data)


def pick_frames(frames: np.ndarray, count: int) -> np.ndarray:
    """Return one frame for each place of blocks in time, the first and the last included."""
    if count == 1:
        return frames[:1]
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def encode_frames(frames: np.ndarray) -> list[str]:
    """Return frames as data addresses of WebP pictures, as wide as the page's limit allows."""
    for width in WIDTHS:
        encoded = [_encode(frame, min(width, frame.shape[1] * 2)) for frame in frames]
        if sum(map(len, encoded)) <= MAX_FRAME_BYTES:
            break
    return encoded


def _encode(frame: np.ndarray, width: int) -> str:
    from PIL import Image

    height = max(1, round(width * frame.shape[0] / frame.shape[1]))
    buffer = io.BytesIO()
    Image.fromarray(frame).resize((width, height)).save(buffer, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(values.tobytes(), 9, mtime=0)).decode()


def _heat(values: np.ndarray) -> list[list[float | None]]:
    """Return the means over heads, [steps][layers]; None where nothing was measured."""
    means = values.mean(axis=-1)
    return [[round(float(v), 4) if np.isfinite(v) else None for v in row] for row in means]


def net_seconds(record: RunRecord) -> float:
    """Return the seconds spent in the transformer, without those of recording maps."""
    seconds = record.numbers["seconds"]
    return float(seconds["transformer"] - seconds.get("recording", 0.0))


def _facts(record: RunRecord) -> list[str]:
    config = record.config
    facts = [f"{config['frames']} frames, {config['width']}×{config['height']}"]
    facts += [f"{config['steps']} steps, seed {record.seed}", str(config.get("model", ""))]
    if "seconds" in record.numbers:
        facts.append(f"{net_seconds(record):.1f} s in the transformer, {record.device}")
    return [fact for fact in facts if fact]
