"""Cosmos 1, 2 and 2.5: their processor does not hand the dispatcher a backend, so no door."""

from functools import partial
from typing import Any

from torch import Tensor

from nabla_attn.models.attend import attend
from nabla_attn.models.processor import LayerPort
from nabla_attn.models.projections import project, project_out


class CosmosPort(LayerPort):
    """Video self-attention.

    Source: diffusers 0.42 CosmosAttnProcessor2_0 (transformer_cosmos.py:151).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """Attend."""
        from diffusers.models.embeddings import apply_rotary_emb

        self.refuse(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        q, k, v = project(attn, hidden_states)
        if image_rotary_emb is not None:
            rotate: Any = partial(apply_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1)
            q, k = rotate(q, image_rotary_emb), rotate(k, image_rotary_emb)
        return project_out(attn, attend(self.layer, q, k, v).flatten(2).type_as(q))
