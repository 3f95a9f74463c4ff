"""Clips of different length in one sequence: none sees another, nor another's text.

Self-attention is cut by the segments of the token grid (`TokenGrid.segments`), cross-attention by a
mask. Rotary positions are relative, so a clip need not start at frame 0.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nabla_attn.training.family import SEGMENTS, TEXTS, Family


class TextMask:
    """Forward pre-hooks that let each packed clip see its own text alone.

    The mask stays until the next forward, for blocks that gradient checkpointing runs again.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the model: read the clips from `attention_kwargs`."""
        packed = kwargs.get("attention_kwargs") or {}
        self._mask = None
        if SEGMENTS in packed:
            hidden = kwargs["hidden_states"]
            config: Any = model.config
            _, rows, columns = config.patch_size
            per_frame = (hidden.shape[3] // rows) * (hidden.shape[4] // columns)
            tokens = [frames * per_frame for frames in packed[SEGMENTS]]
            self._mask = _same_clip(tokens, packed[TEXTS], hidden.device)

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook of a cross-attention (hidden states, text, mask, ...): insert the mask."""
        if self._mask is None:
            return None
        hidden_states, text, _, *rest = args
        return (hidden_states, text, self._mask, *rest)


def let_pack(model: nn.Module, family: Family) -> None:
    """Teach a transformer to keep packed clips apart; NABLA is on it already.

    Raises:
        ValueError: The family's texts cannot be kept apart.
    """
    named = model.named_modules() if family.cross_attention else ()
    found = [part for path, part in named if re.fullmatch(family.cross_attention, path)]
    if not found:
        raise ValueError(
            f"{family.pipeline} cannot train on packed clips: each clip would see the texts of all "
            "of them. Use data.pack=0."
        )
    mask = TextMask()
    model.register_forward_pre_hook(mask.read, with_kwargs=True)
    for module in found:
        module.register_forward_pre_hook(mask.add)


def _same_clip(tokens: Sequence[int], texts: Sequence[int], device: torch.device) -> Tensor:
    """Whether a video token and a text token belong to one clip, bool [1, 1, tokens, texts]."""
    clips = torch.arange(len(tokens), device=device)
    rows = clips.repeat_interleave(torch.tensor(tokens, device=device))
    columns = clips.repeat_interleave(torch.tensor(texts, device=device))
    return (rows[:, None] == columns)[None, None]
