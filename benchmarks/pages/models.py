"""The table of docs/models.md: what each row of the models gains."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_attn.files import write_text
from nabla_attn.models.row import ModelRow
from nabla_attn.models.table import model_rows

# Share of token pairs dropped for the "gain" column: what the paper runs at 0.7 (Table 1).
SPARSITY = 0.8
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True, kw_only=True)
class Usual:
    """A model at the size it is usually run at.

    Attributes:
        family: The name for readers.
        size: Width x height, and frames.
        grid: Latent patch tokens along (frames, height, width).
        text: Number of joint text tokens, and of tokens of a history in front.
        dim: Number of channels of the transformer.
        weights: Weights of a block that each video token passes, in units of dim * dim.
        pipeline: Whether a whole pipeline is run in the tests.
    """

    family: str
    size: str
    grid: tuple[int, int, int]
    dim: int
    weights: float
    text: int = 0
    pipeline: bool = False

    @property
    def tokens(self) -> int:
        """The number of video tokens."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def attention_share(self) -> float:
        """The share of dense self-attention in the operations of a block."""
        attention = 4 * (self.tokens + self.text) * self.dim
        return attention / (attention + 2 * self.weights * self.dim**2)

    @property
    def gain(self) -> float:
        """The bound on the transformer's speed-up at `SPARSITY`, with the text kept dense."""
        kept = 1 - SPARSITY * (self.tokens / (self.tokens + self.text)) ** 2
        return 1 / (1 - self.attention_share * (1 - kept))


_WAN: dict[str, Any] = dict(size="1280x720, 81", grid=(21, 45, 80), dim=5120, weights=11.4)
_HUNYUAN: dict[str, Any] = dict(dim=3072, weights=12.0)
_USUAL = {
    "WanTransformer3DModel": Usual(
        family="Wan 2.1, 2.2: T2V, I2V, FLF2V (14B)", pipeline=True, **_WAN
    ),
    "WanVACETransformer3DModel": Usual(family="Wan 2.1 VACE (14B)", **_WAN),
    "WanAnimateTransformer3DModel": Usual(
        family="Wan 2.2 Animate (14B)", **_WAN | {"size": "1280x720, 77"}
    ),
    "SkyReelsV2Transformer3DModel": Usual(
        family="SkyReels-V2 (14B)",
        pipeline=True,
        **_WAN | {"size": "960x544, 97", "grid": (25, 34, 60)},
    ),
    "ChronoEditTransformer3DModel": Usual(
        family="ChronoEdit (14B)", **_WAN | {"size": "832x480, 81", "grid": (21, 30, 52)}
    ),
    "AnyFlowTransformer3DModel": Usual(
        family="AnyFlow (14B)", **_WAN | {"size": "832x480, 81", "grid": (21, 30, 52)}
    ),
    "HeliosTransformer3DModel": Usual(
        family="Helios (14B, one chunk)",
        text=2400,
        **_WAN | {"size": "640x384, 33", "grid": (9, 24, 40)},
    ),
    "HunyuanVideoTransformer3DModel": Usual(
        family="HunyuanVideo",
        size="1280x720, 129",
        grid=(33, 45, 80),
        text=256,
        pipeline=True,
        **_HUNYUAN,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Usual(
        family="FramePack (one section)",
        size="832x480, 33",
        grid=(9, 30, 52),
        text=4200,
        **_HUNYUAN,
    ),
    "HunyuanVideo15Transformer3DModel": Usual(
        family="HunyuanVideo 1.5",
        size="1280x720, 121",
        grid=(31, 45, 80),
        text=2000,
        dim=2048,
        weights=12,
        pipeline=True,
    ),
    "Kandinsky5Transformer3DModel": Usual(
        family="Kandinsky 5 Lite",
        size="768x512, 121",
        grid=(31, 32, 48),
        dim=1792,
        weights=14,
        pipeline=True,
    ),
    "Kandinsky6Transformer3DModel": Usual(
        family="Kandinsky 6", size="768x512, 121", grid=(31, 32, 48), dim=4096, weights=14
    ),
    "CosmosTransformer3DModel": Usual(
        family="Cosmos 1, 2, 2.5", size="1280x704, 93", grid=(24, 44, 80), dim=4096, weights=14
    ),
    "LTXVideoTransformer3DModel": Usual(
        family="LTX-Video (2B)",
        size="704x480, 161",
        grid=(21, 15, 22),
        dim=2048,
        weights=14,
        pipeline=True,
    ),
    "LTX2VideoTransformer3DModel": Usual(
        family="LTX-2",
        size="1216x704, 121",
        grid=(16, 22, 38),
        dim=4096,
        weights=15,
        pipeline=True,
    ),
    "CogVideoXTransformer3DModel": Usual(
        family="CogVideoX 1.0, 1.5 (1.5 5B)",
        size="1360x768, 81",
        grid=(11, 48, 85),
        text=226,
        dim=3072,
        weights=12,
        pipeline=True,
    ),
    "ConsisIDTransformer3DModel": Usual(
        family="ConsisID", size="720x480, 49", grid=(13, 30, 45), text=226, dim=3072, weights=12
    ),
    "MochiTransformer3DModel": Usual(
        family="Mochi 1",
        size="848x480, 163",
        grid=(28, 30, 53),
        text=256,
        dim=3072,
        weights=12,
        pipeline=True,
    ),
    "AllegroTransformer3DModel": Usual(
        family="Allegro", size="1280x720, 88", grid=(22, 45, 80), dim=2304, weights=14
    ),
    "EasyAnimateTransformer3DModel": Usual(
        family="EasyAnimate 5.1 (12B)",
        size="1024x1024, 49",
        grid=(13, 64, 64),
        text=256,
        dim=3072,
        weights=12,
        pipeline=True,
    ),
    "MotifVideoTransformer3DModel": Usual(
        family="Motif-Video",
        size="1280x736, 121",
        grid=(31, 46, 80),
        text=256,
        dim=3072,
        weights=12,
        pipeline=True,
    ),
}
_FAMILIES = {"Kandinsky6SRTransformer3DModel": "Kandinsky 6 super-resolution"}


def render_table() -> str:
    """Return the rows as Markdown tables: what works, and what is refused."""
    works = [row for row in model_rows() if row.refusal is None and row.name in _documented()]
    refused = [row for row in model_rows() if row.refusal is not None]
    lines = [
        f"| model | class | usual size | tokens | attention | gain at {SPARSITY:.0%} sparse | text "
        "| attention through | ranks | tested |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in works),
        "",
        "| not shared by several processes | why |",
        "|---|---|",
        *(f"| `{row.name}` | {row.no_ranks} |" for row in works if row.no_ranks),
        "",
        "| refused | why |",
        "|---|---|",
        *(f"| `{row.name}` | {row.refusal} |" for row in refused),
    ]
    return "\n".join(lines)


def write_table(path: Path) -> None:
    """Replace the table in a Markdown file, between its two marks.

    Raises:
        ValueError: The file has no marks.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no place for the table: it needs {BEGIN} and {END}.")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    write_text(path, f"{head}{BEGIN}\n{render_table()}\n{END}{tail}")


def _ranks(row: ModelRow) -> str:
    if row.no_ranks is not None:
        return "no"
    if row.cp_plan is None:
        return "diffusers' plan"
    return "plan supplied" if row.cp_trains else "plan supplied, inference"


def _documented() -> set[str]:
    return _USUAL.keys() | _FAMILIES.keys()


def _line(row: ModelRow) -> str:
    return "| " + " | ".join(_cells(row)) + " |"


def _cells(row: ModelRow) -> Iterator[str]:
    usual = _USUAL.get(row.name)
    yield usual.family if usual else _FAMILIES[row.name]
    yield f"`{row.name}`"
    if usual is None:
        yield from ("-", "-", "-", "-")
    else:
        yield usual.size
        yield f"{usual.tokens:,}" + (f" + {usual.text:,}" if usual.text else "")
        yield f"{usual.attention_share:.0%}"
        yield f"{usual.gain:.1f}x"
    history = "history in front, " if row.prefix else ""
    text = f"joint, {row.text}" if row.text else "cross-attention or none"
    yield f"{history}{text}"
    yield "port" if row.ports else "dispatcher"
    yield _ranks(row)
    yield "model, pipeline" if usual and usual.pipeline else "model"
