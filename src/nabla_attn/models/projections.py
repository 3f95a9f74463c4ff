"""What the ports share: tokens to q, k, v, in diffusers' names for the layers."""

from typing import Any

import torch
from torch import Tensor, nn


def project(attn: Any, tokens: Tensor, *, is_fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [batch, tokens, channels] to normalised q, k and v [batch, tokens, heads, dim]."""
    if is_fused:
        q, k, v = attn.to_qkv(tokens).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    return _heads(attn, (q, k, v), attn.norm_q, attn.norm_k)


def project_text(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for text tokens that have projections of their own."""
    qkv = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    return _heads(attn, qkv, attn.norm_added_q, attn.norm_added_k)


def join(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put the tokens of two (q, k, v) one behind the other."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))


def rotate_video(x: Tensor, rotary: Any, num_text: int = 0) -> Tensor:
    """Rotate the video tokens of a sequence that may start with text."""
    from diffusers.models.embeddings import apply_rotary_emb

    video: Any = apply_rotary_emb(x[:, num_text:], rotary, sequence_dim=1)
    return torch.cat([x[:, :num_text], video], dim=1)


def project_out(attn: Any, video: Tensor) -> Tensor:
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
