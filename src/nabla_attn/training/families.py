"""The pipelines that can be trained: one row each, and the sizes that they take."""

from collections.abc import Mapping
from typing import Any

from nabla_attn.sizes import patch_size, side_multiple, vae_strides
from nabla_attn.training.family import EXTRA_LATENTS, Family

_LTX_GRID = ("num_frames", "height", "width", "rope_interpolation_scale")
_LTX2_GRID = ("num_frames", "height", "width", "fps", "audio_num_frames", "use_cross_timestep")
# Videos have no sound here: LTX-2's weights for it stay as they are, and the video ignores it.
_LTX2: dict[str, Any] = {
    "layout": "tokens c",
    "by_grid": (*_LTX2_GRID, "audio_hidden_states", "video_coords", "audio_coords"),
    "unbatched": _LTX2_GRID,
    "fixed": {"isolate_modalities": True},
    "unguided": {"audio_guidance_scale": 1.0},
    "frozen": "audio|av_cross_attn|a2v_cross_attn",
}
_ROWS = (
    Family(pipeline="WanPipeline", cross_attention=r"blocks\.\d+\.attn2"),
    Family(
        pipeline="WanImageToVideoPipeline",
        by_image=(EXTRA_LATENTS, "encoder_hidden_states_image"),
    ),
    Family(pipeline="SkyReelsV2Pipeline"),
    Family(
        pipeline="SkyReelsV2ImageToVideoPipeline",
        by_image=(EXTRA_LATENTS, "encoder_hidden_states_image"),
    ),
    Family(pipeline="HunyuanVideoPipeline"),
    Family(pipeline="HunyuanSkyreelsImageToVideoPipeline", by_image=(EXTRA_LATENTS,)),
    Family(pipeline="HunyuanVideo15Pipeline"),
    Family(pipeline="MotifVideoPipeline"),
    Family(pipeline="EasyAnimatePipeline"),
    Family(pipeline="LTXPipeline", layout="tokens c", by_grid=_LTX_GRID, unbatched=_LTX_GRID),
    Family(
        pipeline="LTXImageToVideoPipeline",
        layout="tokens c",
        by_grid=_LTX_GRID,
        unbatched=_LTX_GRID,
        keeps_first=True,
        has_token_times=True,
    ),
    Family(pipeline="LTX2Pipeline", times=("timestep", "sigma"), **_LTX2),
    Family(
        pipeline="LTX2ImageToVideoPipeline",
        times=("timestep", "sigma", "audio_timestep"),
        keeps_first=True,
        has_token_times=True,
        **_LTX2,
    ),
    Family(
        pipeline="CogVideoXPipeline",
        layout="f c h w",
        prediction="v_prediction",
        by_grid=("image_rotary_emb",),
        unbatched=("image_rotary_emb",),
    ),
    Family(
        pipeline="CogVideoXImageToVideoPipeline",
        layout="f c h w",
        prediction="v_prediction",
        by_grid=("image_rotary_emb",),
        unbatched=("image_rotary_emb",),
        by_image=(EXTRA_LATENTS,),
    ),
    Family(
        pipeline="Kandinsky5T2VPipeline",
        layout="f h w c",
        by_grid=("visual_rope_pos", "scale_factor"),
        unbatched=("visual_rope_pos", "scale_factor", "text_rope_pos"),
        ignored=("sparse_params",),
    ),
    Family(
        pipeline="Kandinsky5I2VPipeline",
        layout="f h w c",
        by_grid=("visual_rope_pos", "scale_factor", EXTRA_LATENTS),
        unbatched=("visual_rope_pos", "scale_factor", "text_rope_pos"),
        ignored=("sparse_params",),
        keeps_first=True,
    ),
    Family(pipeline="MochiPipeline", is_reversed=True),
)
_TABLE = {row.pipeline: row for row in _ROWS}
# Wan 2.2 5B: the same class as Wan 2.1, with `expand_timesteps` in its configuration.
_WAN_TOKEN_TIMES = Family(
    pipeline="WanImageToVideoPipeline", keeps_first=True, has_token_times=True
)


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline that can be trained.

    Raises:
        ValueError: Its class has no row, or it has no VAE, text encoder or transformer.
    """
    family = find_family(type(pipeline), pipeline.config)
    parts = {"vae": "VAE", "text_encoder": "text encoder", "tokenizer": "tokenizer"}
    for name, meaning in {**parts, "transformer": "transformer"}.items():
        if getattr(pipeline, name, None) is None:
            raise ValueError(
                f"this {family.pipeline} has no {meaning}. Training needs the whole pipeline: "
                f"load a directory whose model_index.json names {name}."
            )
    patch = patch_size(pipeline.transformer)
    if family.layout == "tokens c" and patch != (1, 1, 1):
        raise ValueError(f"{family.pipeline} with patches of {patch} cannot be trained.")
    return family


def find_family(pipeline_class: type, config: Mapping[str, Any]) -> Family:
    """The family of a pipeline class, or of its nearest base class.

    Args:
        pipeline_class: A pipeline class of diffusers.
        config: The pipeline's configuration, as in its `model_index.json`.

    Raises:
        ValueError: It has no row.
    """
    names = [cls.__name__ for cls in pipeline_class.__mro__]
    family = next((_TABLE[name] for name in names if name in _TABLE), None)
    if family is None:
        raise ValueError(
            f"{names[0]} cannot be trained: how it encodes videos is not known. "
            f"Known: {', '.join(_TABLE)}."
        )
    if family.pipeline == _WAN_TOKEN_TIMES.pipeline and config.get("expand_timesteps"):
        return _WAN_TOKEN_TIMES
    return family


def size_steps(pipeline: Any) -> tuple[int, int, int]:
    """The sizes a model takes: frames a + b n, and height and width in multiples of c.

    Returns:
        (a, b, c): fewest frames, step of frames, step of height and width.
    """
    temporal, _ = vae_strides(pipeline)
    patch_frames, _, _ = patch_size(pipeline.transformer)
    # The latent frames, 1 + (frames - 1) / temporal, are cut into patches.
    fewest, step = 1 + (patch_frames - 1) * temporal, patch_frames * temporal
    if find_family(type(pipeline), pipeline.config).keeps_first:
        # The image alone leaves nothing to predict.
        fewest += step
    return fewest, step, side_multiple(pipeline)[0]


def check_size(pipeline: Any, frames: int, height: int, width: int) -> None:
    """Check that the model takes a size.

    Raises:
        ValueError: It does not; the sizes that it takes are named.
    """
    fewest, step, multiple = size_steps(pipeline)
    if frames < fewest or (frames - fewest) % step:
        raise ValueError(
            f"{frames} frames do not fit this model: it takes {step}n+{fewest}, "
            f"such as {fewest + step * max(0, (frames - fewest) // step)}."
        )
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % multiple:
            raise ValueError(
                f"{name} {value} does not fit this model: it takes multiples of {multiple}."
            )
