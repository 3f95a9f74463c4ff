"""Tables of methods that need one: dense calls -> an entry for each layer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nabla_attn.core.order import TokenLayout, block_order
from nabla_attn.methods import MethodUse, find
from nabla_attn.methods.contract import Calibrator, Moment, State


class TableMaker:
    """Gives calls of dense runs to the calibrators of a method, one for each layer.

    Args:
        uses: The methods of an algorithm, one of which needs a table.

    Attributes:
        use: That one.

    Raises:
        ValueError: None of them needs a table, or more than one does.
    """

    def __init__(self, uses: Sequence[MethodUse]) -> None:
        needing = [use for use in uses if "table" in find(use.name).needs]
        if len(needing) != 1:
            given = "_".join(map(str, uses)) or "none"
            raise ValueError(f"a table is made for one method that needs one: got {given}.")
        (self.use,) = needing
        self._calibrators: dict[int, Calibrator] = {}

    def add(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, moment: Moment, scale: float
    ) -> None:
        """Show a call to its layer's calibrator.

        Args:
            q: Queries [1, heads, slots, dim] in block order, text behind the video.
            k: Keys, like q.
            v: Values, like q.
            layout: Where the video's tokens and the text's are, in the blocks of the algorithm.
            moment: Step and layer.
            scale: Factor on q.k.
        """
        grid, method = layout.grid, find(self.use.name)
        if moment.layer not in self._calibrators:
            assert method.calibrate is not None
            params = method.params(self.use.values)
            self._calibrators[moment.layer] = method.calibrate(params, grid)
        counts = block_order(layout, q.device).counts[: grid.num_blocks]
        state = State(**vars(moment), scale=scale, counts=counts)
        video = slice(grid.num_slots)
        q, k, v = (x[:, :, video].float() for x in (q, k, v))
        self._calibrators[moment.layer].observe(q, k, v, state)

    def entries(self) -> dict[int, Any]:
        """Layer -> what its calibrator found."""
        return {layer: self._calibrators[layer].entry() for layer in sorted(self._calibrators)}
