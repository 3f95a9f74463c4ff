"""Ports: what runs a layer whose own processor bypasses diffusers' attention dispatcher.

Each is the processor of diffusers that it names, with the attention call replaced.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nabla_attn.models.operator import attend_layer
from nabla_attn.models.processor import LayerPort


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
        q, k, v = _project(attn, tokens, is_fused=is_fused)
        if image_rotary_emb is not None:
            q, k = (_rotate_video(x, image_rotary_emb, num_text) for x in (q, k))
        out = _project_out(attn, attend_layer(self.layer, q, k, v).flatten(2))
        return out[:, num_text:], out[:, :num_text]


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
        """Attend as the original processor does."""
        from diffusers.models.embeddings import apply_rotary_emb

        self.refuse(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        q, k, v = _project(attn, hidden_states)
        if image_rotary_emb is not None:
            rotate: Any = partial(apply_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1)
            q, k = rotate(q, image_rotary_emb), rotate(k, image_rotary_emb)
        return _project_out(attn, attend_layer(self.layer, q, k, v).flatten(2).type_as(q))


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
        """Attend as the original processor does."""
        from diffusers.models.embeddings import apply_rotary_emb_allegro

        self.refuse(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        q, k, v = _project(attn, hidden_states)
        if image_rotary_emb is not None:
            # This rotation takes [batch, heads, tokens, dim] alone.
            q, k = (
                apply_rotary_emb_allegro(x.transpose(1, 2), *image_rotary_emb[:2]).transpose(1, 2)
                for x in (q, k)
            )
        out = _project_out(attn, attend_layer(self.layer, q, k, v).flatten(2).to(q.dtype))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


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
        q, k, v = _project(attn, hidden_states)
        if image_rotary_emb is not None:
            q, k = (_rotate(x, *image_rotary_emb) for x in (q, k))
        q, k, v = _join((q, k, v), _project_text(attn, encoder_hidden_states))
        out = attend_layer(self.layer, q, k, v, text_valid=attention_mask.bool()).flatten(2)
        text_out = out[:, num_video:]
        if hasattr(attn, "to_add_out"):
            text_out = attn.to_add_out(text_out)
        return _project_out(attn, out[:, :num_video]), text_out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (even, odd) of the last axis, in fp32."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.to(x.dtype).flatten(-2)


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
            q, k, v = _project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        else:
            text = _project_text(attn, encoder_hidden_states)
            q, k, v = _join(text, _project(attn, hidden_states))
        if image_rotary_emb is not None:
            q, k = (_rotate_video(x, image_rotary_emb, num_text) for x in (q, k))
        out = attend_layer(self.layer, q, k, v).flatten(2)
        text_out, video_out = out[:, :num_text], out[:, num_text:]
        if getattr(attn, "to_out", None) is not None:
            video_out = _project_out(attn, video_out)
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return video_out, text_out


class HunyuanVideo15Port(LayerPort):
    """Joint attention of video and text, text last, with a mask of keys alone.

    Outputs of padded text differ from diffusers' and are never attended. Dense layers run here too,
    so that the large mask is not built for them either.

    Source: diffusers 0.42 HunyuanVideo15AttnProcessor2_0 (transformer_hunyuan_video15.py:44).
    """

    runs_dense = True

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
        q, k, v = _project(attn, hidden_states)
        if image_rotary_emb is not None:
            q, k = (_rotate_video(x, image_rotary_emb) for x in (q, k))
        q, k, v = _join((q, k, v), _project_text(attn, encoder_hidden_states))
        out = self._attend(q, k, v, attention_mask.bool()).flatten(2).to(q.dtype)
        return _project_out(attn, out[:, :num_video]), attn.to_add_out(out[:, num_video:])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, text_valid: Tensor) -> Tensor:
        if not self.layer.current.is_dense:
            return attend_layer(self.layer, q, k, v, text_valid=text_valid)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        valid = functional.pad(text_valid, (q.shape[1] - text_valid.shape[1], 0), value=True)
        return dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=valid[:, None, None, :],
            backend=self.original._attention_backend,
            parallel_config=self.original._parallel_config,
        )


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
        if self.layer.current.is_dense:
            out = dispatch_attention_fn(q, k, v, parallel_config=self.original._parallel_config)
        else:
            out = attend_layer(self.layer, q, k, v)
        return attn.out_layer(out.flatten(2))


def _project(attn: Any, tokens: Tensor, *, is_fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [batch, tokens, channels] to normalised q, k and v [batch, tokens, heads, dim]."""
    if is_fused:
        q, k, v = attn.to_qkv(tokens).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    return _heads(attn, (q, k, v), attn.norm_q, attn.norm_k)


def _project_text(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for text tokens that have projections of their own."""
    qkv = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    return _heads(attn, qkv, attn.norm_added_q, attn.norm_added_k)


def _join(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put the tokens of two (q, k, v) one behind the other."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))


def _rotate_video(x: Tensor, rotary: Any, num_text: int = 0) -> Tensor:
    """Rotate the video tokens of a sequence that may start with text."""
    from diffusers.models.embeddings import apply_rotary_emb

    video: Any = apply_rotary_emb(x[:, num_text:], rotary, sequence_dim=1)
    return torch.cat([x[:, :num_text], video], dim=1)


def _project_out(attn: Any, video: Tensor) -> Tensor:
    """The output projection and its dropout."""
    return attn.to_out[1](attn.to_out[0](video))


def _heads(
    attn: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    norm_q: nn.Module | None,
    norm_k: nn.Module | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in qkv)
    return (q if norm_q is None else norm_q(q)), (k if norm_k is None else norm_k(k)), v
