"""The parts of a pipeline: how each is recognised, renamed, configured and built."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nabla_attn.wan import rules, shapes


@dataclass(frozen=True)
class PartKind:
    """One kind of part.

    Attributes:
        component: its folder and keyword in a diffusers pipeline.
        move: tensor names to new names.
        configure: shapes to the model's config.
        model_class: name of the model's class, in diffusers or, with ``config_class``, in
            transformers.
        config_class: name of the class that holds its config.
        ties: names that share another parameter and are not stored.
    """

    component: str
    move: Callable[[Iterable[str]], rules.Moves]
    configure: Callable[..., dict[str, Any]]
    model_class: str
    config_class: str | None = None
    ties: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The library of the model's class."""
        return "transformers" if self.config_class else "diffusers"

    @property
    def weights_stem(self) -> str:
        """Name of the weight file in a diffusers directory, without suffix."""
        return "model" if self.config_class else "diffusion_pytorch_model"

    def build(self, config: dict[str, Any]) -> Any:
        """The model of ``config``, its parameters on the meta device."""
        import diffusers
        import transformers
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            if self.config_class:
                held = getattr(transformers, self.config_class)(**config)
                return getattr(transformers, self.model_class)(held)
            name = "WanVACETransformer3DModel" if "vace_layers" in config else self.model_class
            return getattr(diffusers, name)(**config)


KINDS = {
    "transformer": PartKind(
        "transformer", rules.move_transformer, shapes.transformer_config, "WanTransformer3DModel"
    ),
    "VAE": PartKind("vae", rules.move_vae, shapes.vae_config, "AutoencoderKLWan"),
    "Wan 2.2 VAE": PartKind("vae", rules.move_vae_2_2, shapes.vae_2_2_config, "AutoencoderKLWan"),
    "text encoder": PartKind(
        "text_encoder",
        rules.move_t5,
        shapes.t5_config,
        "UMT5EncoderModel",
        "UMT5Config",
        ties=("encoder.embed_tokens.weight",),
    ),
    "image encoder": PartKind(
        "image_encoder", rules.move_clip, shapes.clip_config, "CLIPVisionModel", "CLIPVisionConfig"
    ),
}
