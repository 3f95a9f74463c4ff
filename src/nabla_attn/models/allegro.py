"""Allegro: its processor calls SDPA directly, so it leaves no door."""

from typing import Any

from torch import Tensor

from nabla_attn.models.attend import attend
from nabla_attn.models.processor import LayerPort
from nabla_attn.models.projections import project, project_out


class AllegroPort(LayerPort):
    """Video self-attention.

    Source: diffusers 0.42 AllegroAttnProcessor2_0 (attention_processor.py:1993).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """Attend."""
        from diffusers.models.embeddings import apply_rotary_emb_allegro

        self.refuse(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        q, k, v = project(attn, hidden_states)
        if image_rotary_emb is not None:
            # This rotation takes [batch, heads, tokens, dim] alone.
            q, k = (
                apply_rotary_emb_allegro(x.transpose(1, 2), *image_rotary_emb[:2]).transpose(1, 2)
                for x in (q, k)
            )
        out = project_out(attn, attend(self.layer, q, k, v).flatten(2).to(q.dtype))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor
