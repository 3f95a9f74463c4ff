"""The text side, the transformer and the loss of the built-in model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from nabla_attn.moving_shapes.loop import RecipeStep, autocast
from nabla_attn.moving_shapes.places import PlaceProbe
from nabla_attn.moving_shapes.recipe import TransformerPhase
from nabla_attn.moving_shapes.scene import BACKGROUNDS, COLOURS, DIRECTIONS, KINDS, SIZES, describe
from nabla_attn.moving_shapes.vae import LatentSet
from nabla_attn.training.noise import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    flow_target,
    spread_times,
)

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
        tokenizer: Tokenizer from `build_tokenizer`.
        encoder: Text encoder from `build_text_encoder`.
        num_tokens: Length of the result; zeros fill it, as in `WanPipeline`.
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
                f"a caption must leave room for padding in {self._num_tokens} tokens: got "
                f"{tokens.input_ids.shape[1]} in {caption!r}. Shorten it, or raise text_tokens."
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


def build_transformer(seed: int) -> WanTransformer3DModel:
    """Make an untrained transformer: 6 layers of 3 heads of 64, one latent pixel a token."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    nn.init.zeros_(model.proj_out.weight)
    for name, parameter in model.named_parameters():
        # Padding is all zeros: without biases it starts as keys and values of zero.
        if name.endswith("bias") and ("attn2.to_" in name or "text_embedder" in name):
            nn.init.zeros_(parameter)
    return model


class PadWeight:
    """Lets one padding token stand for the hundreds that `WanPipeline` appends to a prompt.

    n equal keys are one key with log n added to its score. The weight grows slowly from 1 during
    training: at full weight from the start, the padding would drown the words.

    Args:
        num_tokens: Length of the captions in training, padding included.
    """

    def __init__(self, num_tokens: int) -> None:
        self._bias = torch.zeros(1, 1, 1, num_tokens)
        self._full = PIPELINE_TOKENS - num_tokens + 1

    def set(self, share: float) -> None:
        """Let the last token count for `full ** share` tokens."""
        self._bias[..., -1] = share * math.log(self._full)

    def _add_bias(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, text, _, *rest = args
        return (hidden_states, text, self._bias.to(text.device), *rest)

    @contextmanager
    def applied(self, model: WanTransformer3DModel) -> Iterator[None]:
        """Weigh the padding in every cross-attention of a model."""
        hooks = [block.attn2.register_forward_pre_hook(self._add_bias) for block in model.blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def is_image_step(phase: TransformerPhase, number: int) -> bool:
    """Whether a step sees images; they are spread evenly over the phase."""
    return int((number + 1) * phase.image_share) > int(number * phase.image_share)


def _draw(
    clips: LatentSet, images: LatentSet, phase: TransformerPhase, step: RecipeStep
) -> tuple[Tensor, list[str], float]:
    """A batch of latents and captions, some empty for guidance, and the shift of their noise."""
    is_image = is_image_step(phase, step.number)
    data, batch, shift = clips, phase.batch, phase.shift
    if is_image:
        data, batch = images, phase.image_batch or phase.batch * clips.latents.shape[2]
        shift = phase.shift if phase.image_shift is None else phase.image_shift
    indices = [step.rng.randrange(len(data.scenes)) for _ in range(batch)]
    latents = data.latents[indices].float()
    captions = [
        ""
        if step.rng.random() < phase.empty_share
        else describe(data.scenes[index], step.rng, phase.short_share)
        for index in indices
    ]
    return (latents[:, :, :1] if is_image else latents), captions, shift


def flow_loss(
    model: nn.Module,
    clips: LatentSet,
    text: CaptionEncoder,
    phase: TransformerPhase,
    step: RecipeStep,
    *,
    images: LatentSet | None = None,
    probe: PlaceProbe | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity, and with a probe the loss of places.

    Args:
        model: The transformer.
        clips: Clips that video steps draw from.
        text: Encoder of the captions.
        phase: The stage.
        step: The step, with all that is random about it.
        images: Clips that image steps draw from; None takes `clips`.
        probe: The model's probe, if it is taught where tokens lie.
    """
    latents, captions, shift = _draw(clips, images or clips, phase, step)
    noise = torch.randn(latents.shape, generator=step.generator)
    sigma = spread_times(step.number, len(latents), shift)
    device = next(model.parameters()).device
    latents, noise, sigma = (x.to(device) for x in (latents, noise, sigma))
    with autocast(device):
        predicted = model(
            add_noise(latents, noise, sigma),
            timestep=sigma * NUM_TRAIN_TIMESTEPS,
            encoder_hidden_states=text(captions).to(device),
            return_dict=False,
        )[0]
    error = (predicted.float() - flow_target(latents, noise)).square().mean()
    if probe is None:
        return error
    return error + phase.place_weight * probe.loss(tuple(latents.shape[2:]))


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter of the transformer: the matrices of its blocks."""
    return parameter.ndim == 2 and name.startswith("blocks.")
