"""Kandinsky 6 SR: its processor is NABLA already, bound to diffusers' flex backend."""

from typing import Any

from torch import Tensor

from nabla_attn.models.attend import attend
from nabla_attn.models.processor import LayerPort


class Kandinsky6SRPort(LayerPort):
    """Video self-attention of the super-resolution model, whose tokens come in block order.

    Its own processor is NABLA on diffusers' flex backend, which computes dense attention unless
    the model is compiled; so dense layers run here too.

    Source: diffusers 0.42 Kandinsky6SRAttnProcessor (transformer_kandinsky6_sr.py:169).
    """

    runs_dense = True

    def __call__(
        self, attn: Any, hidden_states: Tensor, rotary_emb: Tensor, sparse_params: dict[str, Any]
    ) -> Tensor:
        """Attend; the block pattern that the model brings is not used."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.transformers.transformer_kandinsky6_sr import apply_rotary

        q, k, v = (
            layer(hidden_states).unflatten(-1, (attn.num_heads, -1))
            for layer in (attn.to_query, attn.to_key, attn.to_value)
        )
        q = apply_rotary(attn.query_norm(q.float()).type_as(q), rotary_emb)
        k = apply_rotary(attn.key_norm(k.float()).type_as(k), rotary_emb)
        if self.layer.is_dense:
            out = dispatch_attention_fn(q, k, v, parallel_config=self.original._parallel_config)
        else:
            out = attend(self.layer, q, k, v)
        return attn.out_layer(out.flatten(2))
