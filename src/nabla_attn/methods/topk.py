"""Top share: the highest blocks of each row of the pooled map, the same number in all rows."""

from types import SimpleNamespace

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.select import count_of_share, select_top
from nabla_attn.methods.contract import pooled
from nabla_attn.methods.parameters import share


def _target(grid: TokenGrid, params: SimpleNamespace) -> list[float]:
    """Blocks out of those of a row's own packed clip."""
    per_time = grid.num_blocks // grid.blocks[0]
    lengths = [times * per_time for times in grid.segment_blocks]
    return [
        float(count)
        for n in lengths
        for count in [count_of_share(params.share, n)]
        for _ in range(n)
    ]


METHOD = pooled(
    select_top,
    _target,
    name="topk",
    title="top share of pooled blocks",
    parameters=(share("share", "kept blocks / all blocks", example=0.2),),
    exactness="code",
    paper="arXiv:2507.13546",
    code="kandinskylab/kandinsky-5@6e2a805 (top-k of Kandinsky 6 SR, without its top-p)",
    licence="MIT",
    published="topk-0.2",
)
