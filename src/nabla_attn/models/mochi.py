"""Mochi: its processor calls SDPA sample by sample, so it leaves no door."""

from typing import Any

import torch
from torch import Tensor

from nabla_attn.models.attend import attend
from nabla_attn.models.processor import LayerPort
from nabla_attn.models.projections import join, project, project_out, project_text


class MochiPort(LayerPort):
    """Joint attention of video and text, text last; padded text is masked, not cut out.

    Source: diffusers 0.42 MochiAttnProcessor2_0 (attention_processor.py:998).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and return (video, text)."""
        num_video = hidden_states.shape[1]
        q, k, v = project(attn, hidden_states)
        if image_rotary_emb is not None:
            q, k = (_rotate(x, *image_rotary_emb) for x in (q, k))
        q, k, v = join((q, k, v), project_text(attn, encoder_hidden_states))
        out = attend(self.layer, q, k, v, text_valid=attention_mask.bool()).flatten(2)
        text_out = out[:, num_video:]
        if hasattr(attn, "to_add_out"):
            text_out = attn.to_add_out(text_out)
        return project_out(attn, out[:, :num_video]), text_out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (even, odd) of the last axis, in fp32."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.to(x.dtype).flatten(-2)
