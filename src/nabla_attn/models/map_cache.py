"""Maps that serve more than one call: for a few steps, or for both guidance branches."""

import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nabla_attn.block_selection import select_blocks
from nabla_attn.config import SparseConfig
from nabla_attn.core.block_map import BlockMap, block_map_of
from nabla_attn.core.order import TokenLayout
from nabla_attn.schedule import Schedule
from nabla_attn.shapes import Bool

KeptFor = tuple[int, tuple[int, ...] | None]
"""What a map is kept for: the guidance branch, and the heads of a group or None for all."""


@dataclass(frozen=True)
class _Kept:
    packed: Tensor
    num_columns: int
    origin: Hashable


class MapCache:
    """The maps that one layer keeps, a bit per pair of blocks.

    There is one for each guidance branch, and for each group of heads with an algorithm of its own.

    Compiled graphs do not refer to it, so keeping and recalling is no new graph. A copy of a model
    starts with nothing.
    """

    def __init__(self) -> None:
        self._kept: dict[KeptFor, _Kept] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}

    def select(
        self,
        q: Tensor,
        k: Tensor,
        layout: TokenLayout,
        config: SparseConfig,
        *,
        kept_for: KeptFor,
        copies: int = 1,
        scale: float | None = None,
        text_valid: Tensor | None = None,
        measure: bool = False,
        **options: Any,
    ) -> BlockMap:
        """The kept map if one fits; otherwise a new one, which is then kept.

        A kept map has no `kept_mass`, and a copy of another sample's has NaN there.

        Args:
            q: Queries in block order [batch, heads, slots, dim].
            k: Keys, like q.
            layout: Where the tokens are.
            config: Which blocks are kept.
            kept_for: The guidance branch and the heads.
            copies: Equal parts of the batch that share the map of the last one.
            scale: Factor on q.k; None is 1/sqrt(dim).
            text_valid: Bool [batch, text tokens], False at padding.
            measure: Whether to measure the kept mass of a new map.
            options: Passed on to `select_blocks`.
        """
        samples = q.shape[0] // copies
        origin = (config, layout.grid)
        kept = self.recall(kept_for, origin, samples, q.shape[1], q.device)
        if kept is not None:
            return block_map_of(kept.repeat(copies, 1, 1, 1), layout, text_valid)
        chosen = slice(q.shape[0] - samples, None)
        mine: dict[str, Any] = {
            key: x[chosen] if isinstance(x, Tensor) else x for key, x in options.items()
        }
        block_map = select_blocks(
            q[chosen],
            k[chosen],
            layout,
            config,
            scale=scale,
            text_valid=None if text_valid is None else text_valid[chosen],
            measure=measure,
            **mine,
        )
        if block_map.q_order is not None or block_map.treatment is not None:
            # It is more than its mask.
            if copies == 1:
                return block_map
            raise ValueError(
                f"the schedule shares a map between both guidance branches, and that of {config} "
                "belongs to one call. Use a schedule without reuse_guidance."
            )
        count = layout.grid.num_blocks
        video = block_map.mask[:, :, :count, :count]
        self.keep(kept_for, origin, video)
        if copies == 1:
            return block_map
        mass = block_map.kept_mass
        if mass is not None:
            unknown = torch.full_like(mass, float("nan")).repeat(copies - 1, 1)
            mass = torch.cat([unknown, mass])
        return block_map_of(video.repeat(copies, 1, 1, 1), layout, text_valid, kept_mass=mass)

    def keep(self, kept_for: KeptFor, origin: Hashable, mask: Tensor) -> None:
        """Keep a map.

        Args:
            kept_for: The guidance branch and the heads.
            origin: What it was built from besides the tokens; only an equal one recalls it.
            mask: Bool [batch, heads, q_blocks, kv_blocks] of the video's blocks.
        """
        self._kept[kept_for] = _Kept(pack_bits(mask), mask.shape[-1], origin)

    def recall(
        self, kept_for: KeptFor, origin: Hashable, batch: int, heads: int, device: torch.device
    ) -> Tensor | None:
        """The kept map, or None if there is none that fits."""
        kept = self._kept.get(kept_for)
        if kept is None or kept.origin != origin:
            return None
        if kept.packed.shape[:2] != (batch, heads) or kept.packed.device != device:
            return None
        return unpack_bits(kept.packed, kept.num_columns)

    def forget(self, heads: tuple[int, ...] | None = None) -> None:
        """Drop all maps, or those of a group of heads."""
        if heads is None:
            self._kept.clear()
            return
        for key in list(self._kept):
            _, kept = key
            if kept is None or not set(heads).isdisjoint(kept):
                del self._kept[key]


class MapReuse:
    """Decides which kept map a forward of one model may use, and drops old ones.

    Args:
        schedule: The schedule, with `reuse_steps`, also of its rules, and `reuse_guidance`.

    Attributes:
        is_fresh: Whether this forward starts with no maps kept.
        call: Number of this forward among those of its step, from 0.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.is_fresh = True
        self.call = 0
        self._moment: tuple[int, int | None] | None = None
        self._before: tuple[int, int | None] | None = None
        self._is_mixed = False

    def begin(
        self,
        step: int | None,
        generation: int,
        caches: Iterable[MapCache],
        *,
        max_branches: int,
    ) -> int | None:
        """The branch that a forward's maps belong to; None where each map is built anew.

        More calls of a step than branches may be those of another video: from there on the period
        keeps no maps.

        Args:
            step: Denoising step; None with gradients.
            generation: Number of the generation.
            caches: The maps that the model's layers keep.
            max_branches: Most calls that a step of one video has.
        """
        self._before, self._moment = self._moment, (generation, step)
        self.call = self.call + 1 if self._before == self._moment else 0
        if not self.schedule.reuses_maps:
            return None
        if step is None or torch.is_grad_enabled():
            _warn_about_gradients()
            return None
        is_new = all(map(self.is_new, self.schedule.periods))
        self._is_mixed = self.call >= max_branches or (self._is_mixed and not is_new)
        self.is_fresh = is_new or self._is_mixed
        if self.is_fresh:
            for cache in caches:
                cache.forget()
        if self._is_mixed:
            return None
        return 0 if self.schedule.reuse_guidance else self.call

    def is_new(self, reuse_steps: int) -> bool:
        """Whether this forward is the first in which a map that serves so many steps is built."""
        before, now = self._before, self._moment
        if before is None or now is None or before[0] != now[0]:
            return True
        return (before[1] or 0) // reuse_steps != (now[1] or 0) // reuse_steps


def pack_bits(mask: Bool[Tensor, "*rows columns"]) -> Tensor:
    """Eight entries of the last axis in one byte, the first in the lowest bit; uint8."""
    padded = pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = padded[..., 0].to(torch.uint8)
    for bit in range(1, 8):
        packed |= padded[..., bit].to(torch.uint8) << bit
    return packed


def unpack_bits(packed: Tensor, num_columns: int) -> Bool[Tensor, "*rows columns"]:
    """Undo `pack_bits`."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> bits) & 1).bool().flatten(-2)[..., :num_columns]


def _warn_about_gradients() -> None:
    # Python shows one place's warning once.
    warnings.warn(
        "the schedule reuses maps, which is for inference: with gradients every forward builds its "
        "own. Use torch.no_grad().",
        stacklevel=2,
    )
