"""CLIP score of a video and its prompt, from a local CLIP directory; nothing is downloaded."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nabla_attn.files import read_json
from nabla_attn.generation.video import check_frames

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, for directories without a preprocessor_config.json."""


class ClipScore:
    """100 x cosine of prompt and frame, mean over frames, as CLIPScore without its factor 2.5.

    Args:
        directory: a CLIP model with its tokenizer, as transformers saves them.

    Raises:
        ValueError: it cannot be loaded.

    Source: Hessel et al., arXiv:2104.08718.
    """

    def __init__(self, directory: str | Path) -> None:
        from transformers import CLIPModel, CLIPTokenizerFast

        try:
            self._model = CLIPModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
            self._tokenizer = CLIPTokenizerFast.from_pretrained(directory, local_files_only=True)
        except Exception as error:
            raise ValueError(f"{directory}: cannot load a CLIP model ({error}).") from error
        config = Path(directory) / "preprocessor_config.json"
        values = read_json(config) if config.is_file() else {}
        self._mean = torch.tensor(values.get("image_mean", MEAN))[:, None, None]
        self._std = torch.tensor(values.get("image_std", STD))[:, None, None]
        self._size = int(self._model.config.vision_config.image_size)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, prompt: str) -> float:
        """The score of frames, uint8 [frames, height, width, 3]."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(prompt, return_tensors="pt", truncation=True, max_length=length)
        outputs = self._model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=self.prepare(frames),
        )
        text = functional.normalize(outputs.text_embeds, dim=-1)
        images = functional.normalize(outputs.image_embeds, dim=-1)
        return round(100 * (images @ text.T).mean().item(), 4)

    def prepare(self, frames: np.ndarray) -> Tensor:
        """Shorter side to the model's size, centre cut out, normalised: [frames, 3, size, size]."""
        pixels = torch.from_numpy(check_frames(frames)).permute(0, 3, 1, 2).float() / 255
        height, width = pixels.shape[2:]
        ratio = self._size / min(height, width)
        target = [max(self._size, round(side * ratio)) for side in (height, width)]
        pixels = functional.interpolate(
            pixels, size=target, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)
        top, left = ((side - self._size) // 2 for side in target)
        pixels = pixels[:, :, top : top + self._size, left : left + self._size]
        return (pixels - self._mean) / self._std
