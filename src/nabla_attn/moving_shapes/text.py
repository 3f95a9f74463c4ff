"""The text side of the built-in model: a word-level tokenizer and a tiny frozen UMT5 encoder."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from nabla_attn.moving_shapes.scene import BACKGROUNDS, COLOURS, DIRECTIONS, KINDS, SIZES

PIPELINE_TOKENS = 512
"""Text length that `WanPipeline` pads every prompt to, with zeros that attention does see."""

_VOCABULARY_SIZE = 64
_WORDS = ("a", "an", "and", "on", "moving", "background", *SIZES, *COLOURS, *KINDS, *DIRECTIONS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: one token a word, `</s>` at the end, unknown words as `<unk>`."""
    words = ("<pad>", "</s>", "<unk>", *_WORDS, *BACKGROUNDS)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=PIPELINE_TOKENS,
    )


def build_text_encoder(seed: int) -> UMT5EncoderModel:
    """Make the text encoder: random weights, never trained; the transformer learns to read it."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=_VOCABULARY_SIZE,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config).eval()


class CaptionEncoder:
    """Captions to embeddings, each distinct caption encoded once.

    Args:
        tokenizer: As `build_tokenizer` makes it.
        encoder: As `build_text_encoder` makes it.
        num_tokens: Length of the result; the rest is zeros, as in `WanPipeline`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, num_tokens: int
    ) -> None:
        self._tokenizer, self._encoder, self._num_tokens = tokenizer, encoder, num_tokens
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def _encode(self, caption: str) -> Tensor:
        tokens = self._tokenizer(caption, return_tensors="pt")
        if tokens.input_ids.shape[1] >= self._num_tokens:
            raise ValueError(
                f"caption too long: {tokens.input_ids.shape[1]} tokens need at least one pad in "
                f"{self._num_tokens}. Raise text_tokens or shorten {caption!r}."
            )
        hidden = self._encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
        padded = hidden.new_zeros(self._num_tokens, hidden.shape[1])
        padded[: len(hidden)] = hidden
        return padded

    def __call__(self, captions: list[str]) -> Tensor:
        """Embeddings [captions, num_tokens, dim]."""
        for caption in captions:
            if caption not in self._known:
                self._known[caption] = self._encode(caption)
        return torch.stack([self._known[caption] for caption in captions])
