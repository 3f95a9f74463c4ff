"""HunyuanVideo 1.5: its processor builds a tokens x tokens mask, 12.5 GB at 720p."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from nabla_attn.models.attend import attend
from nabla_attn.models.processor import LayerPort
from nabla_attn.models.projections import (
    join,
    project,
    project_out,
    project_text,
    rotate_video,
)


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
        q, k, v = project(attn, hidden_states)
        if image_rotary_emb is not None:
            q, k = (rotate_video(x, image_rotary_emb) for x in (q, k))
        q, k, v = join((q, k, v), project_text(attn, encoder_hidden_states))
        out = self._attend(q, k, v, attention_mask.bool()).flatten(2).to(q.dtype)
        return project_out(attn, out[:, :num_video]), attn.to_add_out(out[:, num_video:])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, text_valid: Tensor) -> Tensor:
        if not self.layer.is_dense:
            return attend(self.layer, q, k, v, text_valid=text_valid)
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
