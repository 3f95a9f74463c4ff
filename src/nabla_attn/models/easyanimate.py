"""EasyAnimate: its processor calls SDPA directly, so it leaves no door."""

from typing import Any

import torch
from torch import Tensor

from nabla_attn.models.attend import attend
from nabla_attn.models.processor import LayerPort
from nabla_attn.models.projections import (
    join,
    project,
    project_out,
    project_text,
    rotate_video,
)


class EasyAnimatePort(LayerPort):
    """Joint attention of text and video, text first, with or without projections of its own.

    Source: diffusers 0.42 EasyAnimateAttnProcessor2_0 (transformer_easyanimate.py:112).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and return (video, text)."""
        self.refuse(attention_mask=attention_mask)
        num_text = encoder_hidden_states.shape[1]
        if attn.add_q_proj is None:
            q, k, v = project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        else:
            text = project_text(attn, encoder_hidden_states)
            q, k, v = join(text, project(attn, hidden_states))
        if image_rotary_emb is not None:
            q, k = (rotate_video(x, image_rotary_emb, num_text) for x in (q, k))
        out = attend(self.layer, q, k, v).flatten(2)
        text_out, video_out = out[:, :num_text], out[:, num_text:]
        if getattr(attn, "to_out", None) is not None:
            video_out = project_out(attn, video_out)
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return video_out, text_out
