"""CogVideoX and ConsisID: their processors call SDPA directly, so they leave no door."""

from typing import Any

import torch
from torch import Tensor

from nabla_attn.models.attend import attend
from nabla_attn.models.processor import LayerPort
from nabla_attn.models.projections import project, project_out, rotate_video


class CogVideoXPort(LayerPort):
    """Joint attention of text and video, text first; fused projections too.

    Source: diffusers 0.42 CogVideoXAttnProcessor2_0 (attention_processor.py:2277).
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
        # The module says it is fused even after unfuse_qkv_projections.
        is_fused = type(self.original).__name__.startswith("Fused")
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = project(attn, tokens, is_fused=is_fused)
        if image_rotary_emb is not None:
            q, k = (rotate_video(x, image_rotary_emb, num_text) for x in (q, k))
        out = project_out(attn, attend(self.layer, q, k, v).flatten(2))
        return out[:, num_text:], out[:, :num_text]
