"""Maps that serve more than one call: for a few steps, or for both guidance branches."""

import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_attn.core.bits import pack_bits, unpack_bits
from nabla_attn.schedule import Schedule


@dataclass(frozen=True)
class _Kept:
    packed: Tensor
    num_columns: int
    origin: Hashable


class MapMemory:
    """The maps that one layer keeps, one per guidance branch, a bit per pair of blocks.

    Plans refer to it weakly and compiled graphs not at all, so keeping and recalling is no new
    graph. A copy of a model starts with nothing.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}

    def keep(self, branch: int, origin: Hashable, mask: Tensor) -> None:
        """Keep a map.

        Args:
            branch: the guidance branch.
            origin: what it was made from besides the tokens; only an equal one recalls it.
            mask: bool [batch, heads, q_blocks, kv_blocks] of the video's blocks.
        """
        self._kept[branch] = _Kept(pack_bits(mask), mask.shape[-1], origin)

    def recall(
        self, branch: int, origin: Hashable, batch: int, heads: int, device: torch.device
    ) -> Tensor | None:
        """The kept map, or None if there is none that fits."""
        kept = self._kept.get(branch)
        if kept is None or kept.origin != origin:
            return None
        if kept.packed.shape[:2] != (batch, heads) or kept.packed.device != device:
            return None
        return unpack_bits(kept.packed, kept.num_columns)

    def forget(self) -> None:
        """Drop all maps."""
        self._kept.clear()


class Reuse:
    """Says which kept map a forward of one model may use, and drops old ones.

    Args:
        schedule: with `reuse_steps` and `reuse_guidance`.

    Attributes:
        is_fresh: whether this forward starts with no maps kept.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.is_fresh = True
        self._moment: tuple[int, int] | None = None
        self._call = 0
        self._is_mixed = False

    def begin(
        self,
        step: int | None,
        generation: int,
        memories: Iterable[MapMemory],
        *,
        max_branches: int,
    ) -> int | None:
        """The branch that a forward's maps belong to; None where each map is built anew.

        More calls of a step than branches may be those of another video: from there on the period
        keeps no maps.

        Args:
            step: denoising step; None with gradients.
            generation: number of the generation.
            memories: of the model's layers.
            max_branches: calls that a step of one video has at most.
        """
        if not self.schedule.reuses_maps:
            return None
        if step is None or torch.is_grad_enabled():
            _warn_about_gradients()
            return None
        before, self._moment = self._moment, (generation, step)
        self._call = self._call + 1 if before == self._moment else 0
        is_new = before is None or self._period(before) != self._period(self._moment)
        self._is_mixed = self._call >= max_branches or (self._is_mixed and not is_new)
        self.is_fresh = is_new or self._is_mixed
        if self.is_fresh:
            for memory in memories:
                memory.forget()
        if self._is_mixed:
            return None
        return 0 if self.schedule.reuse_guidance else self._call

    def _period(self, moment: tuple[int, int]) -> tuple[int, int]:
        generation, step = moment
        return generation, step // self.schedule.reuse_steps


def _warn_about_gradients() -> None:
    # Python shows one place's warning once.
    warnings.warn(
        "the schedule reuses maps, which is for inference: with gradients every forward builds its "
        "own. Use torch.no_grad().",
        stacklevel=2,
    )
