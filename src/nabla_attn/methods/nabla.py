"""NABLA: the fewest blocks of each row that hold a share of the pooled map's probability."""

from types import SimpleNamespace

from nabla_attn.core.grid import TokenGrid
from nabla_attn.core.select import select_by_mass
from nabla_attn.methods.contract import pooled
from nabla_attn.methods.parameters import share


def _target(grid: TokenGrid, params: SimpleNamespace) -> list[float]:
    return [params.threshold] * grid.num_blocks


METHOD = pooled(
    select_by_mass,
    _target,
    name="nabla",
    title="kept probability mass of pooled blocks",
    parameters=(share("threshold", "the kept probability mass", example=0.7),),
    exactness="code",
    paper="arXiv:2507.13546",
    code="gen-ai-team/Wan2.1-NABLA@d5c50a8 wan/modules/attention.py:243-276",
    licence="Apache-2.0",
    published="nabla-0.7_sta-11-3-3",
)
