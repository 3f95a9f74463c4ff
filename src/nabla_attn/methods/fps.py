"""FPSAttention: windows and FP8 quantisation on the same tiles, both by the denoising step."""

from types import SimpleNamespace

import torch
from torch import Tensor

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.quantise import scale_of, to_e4m3
from nabla_attn.core.window import build_window_map
from nabla_attn.methods.contract import Method, Selection, State
from nabla_attn.methods.parameters import number, share, sides, word

# Tiles that share one scale in the first, second and last part of the steps.
TILES_PER_SCALE = (4, 1, 2)


def _check(params: SimpleNamespace) -> None:
    if params.first > params.second:
        raise ValueError(
            f"fps: the first part of the steps must end before the second: got first "
            f"{params.first} and second {params.second}."
        )


def part_of(params: SimpleNamespace, state: State) -> int:
    """Which part of the steps a call is in: 0, 1 or 2; the second where the step is not known."""
    if state.step is None or not state.num_steps:
        return 1
    progress = state.step / state.num_steps
    return int(progress >= params.first) + int(progress >= params.second)


def window_of(params: SimpleNamespace, part: int) -> tuple[int, int, int]:
    """The window of a part of the steps: narrow, whole, and halfway between."""
    share = (params.narrow, 1.0, (1 + params.narrow) / 2)[part]
    return tuple(max(1, round(side * share)) for side in params.window)  # type: ignore[return-value]


def select(
    q: Tensor, k: Tensor, grid: TokenGrid, params: SimpleNamespace, state: State
) -> Selection:
    """Tiles in the window of this step; tokens are rounded before attention."""
    part = part_of(params, state)
    mask = build_window_map(grid, window_of(params, part), q.device)[None, None]
    if params.precision == "full":
        return Selection(mask)
    tiles = TILES_PER_SCALE[part]
    valid = None if state.valid is None else state.valid[:, None, :, None]

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (_by_tiles(x, grid.block.tokens * tiles, valid) for x in (q, k))
        return q, k, to_e4m3(v, scale_of(v, (2,), valid))

    return Selection(mask, prepare=prepare)


def _by_tiles(x: Tensor, tokens: int, valid: Tensor | None) -> Tensor:
    """x with one scale for every run of tokens in block order."""
    runs = x.split(tokens, dim=2)
    valids = [None] * len(runs) if valid is None else valid.split(tokens, dim=2)
    return torch.cat(
        [to_e4m3(run, scale_of(run, (2, 3), some)) for run, some in zip(runs, valids, strict=True)],
        dim=2,
    )


METHOD = Method(
    select=select,
    name="fps",
    title="windows and FP8 on the same tiles, by the step",
    parameters=(
        sides("window", example=(6, 6, 1)),
        share("narrow", "the narrow window / the whole one", default=0.5),
        number("first", least=0, most=1, default=0.25),
        number("second", least=0, most=1, default=0.75),
        word("precision", ("fp8", "full"), default="fp8"),
    ),
    check=_check,
    kind="static",
    exactness="reconstructed",
    ours="where the parts of the steps end (first, second), how narrow the narrow window is, which "
    "tiles share a scale (4, 1, 2 in block order), and the order of the axes of the published "
    "window; probabilities are not rounded, since backends do not show them; calls that know no "
    "step, as in training, are of the second part",
    paper="arXiv:2506.04648",
    published="fps-6-6-1",
    needs=("step",),
    keeps_constants=False,
    packs=False,
    takes_order=False,
)
