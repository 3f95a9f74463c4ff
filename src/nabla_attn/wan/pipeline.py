"""Original Wan checkpoints as diffusers models and pipelines."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.wan import solvers
from nabla_attn.wan.families import (
    IMAGE_FAMILIES,
    NEEDS_IMAGE_ENCODER,
    pipeline_class,
    pipeline_options,
)
from nabla_attn.wan.kinds import FAMILIES, check_task
from nabla_attn.wan.layout import WanLayout, read_layout
from nabla_attn.wan.load import (
    fill,
    load_part,
    open_transformer,
    vae_kind,
)
from nabla_attn.wan.sparsity import apply_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_wan_transformer(
    path: str | Path,
    sparse_algo: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Any:
    """Load the transformer of an original Wan checkpoint as diffusers' class.

    Args:
        path: directory with ``diffusion_pytorch_model*.safetensors`` and ``config.json``, or one
            file. Of the two experts of Wan 2.2 the high-noise one is loaded.
        sparse_algo: such as ``"nabla-0.7"`` or ``"dense"``. None: what config.json says, else
            dense. The reference overrides the file's own value by mistake
            (Wan2.1-NABLA text2video.py:93).
        dtype: of the parameters; None as stored.
        progress: called with stage, done, total.

    Returns:
        ``WanTransformer3DModel`` or ``WanVACETransformer3DModel``, in eval mode.

    Raises:
        ValueError: the checkpoint is incomplete, mixed up or unsafe to read; the algorithm is
            unknown. The message names the file.
    """
    layout = read_layout(path)
    model = _load_transformer(layout, 0, dtype, progress)
    apply_sparsity(model, sparse_algo if sparse_algo is not None else layout.sparse_algo)
    return model


def _load_transformer(
    layout: WanLayout, expert: int, dtype: torch.dtype | None, progress: ProgressCallback
) -> Any:
    with open_transformer(layout.transformers[expert]) as plan:
        return fill(plan, dtype, progress)


def load_wan_pipeline(
    path: str | Path,
    task: str | None = None,
    *,
    sparse_algo: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    text_dtype: torch.dtype = torch.bfloat16,
    solver: str = "unipc",
    shift: float = 5.0,
    progress: ProgressCallback = ignore_progress,
) -> Any:
    """Load a whole original Wan checkpoint as the diffusers pipeline of its task.

    Args:
        path: checkpoint directory in the original layout. For a diffusers directory use
            ``nabla_attn.generation.pipeline.load_pipeline``.
        task: such as ``"t2v-14B"``; None takes the first that the checkpoint's keys allow.
        sparse_algo: as in ``load_wan_transformer``; both experts of Wan 2.2 get it.
        dtype: of transformer and image encoder. The reference computes in bfloat16.
        text_dtype: of the text encoder. The VAE stays in float32 as in the reference.
        solver: ``"unipc"`` or ``"dpm++"``.
        shift: of the noise schedule.
        progress: called with stage, done, total.

    Raises:
        ValueError: a part is missing, or the checkpoint is not for ``task``.
    """
    layout = read_layout(path)
    if task is None:
        task = FAMILIES[layout.family][0]
    check_task(task, layout.family, layout.root)
    check_parts(layout)
    assert layout.vae is not None and layout.text_encoder is not None
    parts: dict[str, Any] = {
        "scheduler": solvers.build_solver(solver, shift),
        "vae": load_part(vae_kind(layout.vae), layout.vae, dtype=torch.float32, progress=progress),
        "tokenizer": load_tokenizer(layout),
        "text_encoder": load_part(
            "text encoder", layout.text_encoder, dtype=text_dtype, progress=progress
        ),
        "transformer": _load_transformer(layout, 0, dtype, progress),
    }
    if len(layout.transformers) == 2:
        parts["transformer_2"] = _load_transformer(layout, 1, dtype, progress)
    if layout.family in NEEDS_IMAGE_ENCODER:
        from nabla_attn.wan.image_input import clip_processor

        assert layout.image_encoder is not None
        parts["image_encoder"] = load_part(
            "image encoder", layout.image_encoder, dtype=dtype, progress=progress
        )
        parts["image_processor"] = clip_processor(parts["image_encoder"].config.image_size)
    pipe = _assemble(layout.family, parts)
    apply_sparsity(pipe, sparse_algo if sparse_algo is not None else layout.sparse_algo)
    return pipe


def _assemble(family: str, parts: dict[str, Any]) -> Any:
    """The pipeline of ``family`` from its loaded parts."""
    pipe = pipeline_class(family)(**parts, **pipeline_options(family))
    if family in IMAGE_FAMILIES:
        from nabla_attn.wan.image_input import WanVideoProcessor

        pipe.video_processor = WanVideoProcessor(vae_scale_factor=pipe.vae_scale_factor_spatial)
    return pipe


def check_parts(layout: WanLayout) -> None:
    """Raise ValueError unless every part that the pipeline needs is there."""
    from nabla_attn.wan.layout import CLIP_STEM, T5_STEM, TOKENIZER, VAE_STEMS

    vae_stem = VAE_STEMS[1 if layout.family == "ti2v-2.2" else 0]
    wanted = [(layout.vae, f"{vae_stem}.pth"), (layout.text_encoder, f"{T5_STEM}.pth")]
    wanted.append((layout.tokenizer, f"{TOKENIZER}/"))
    if layout.family in NEEDS_IMAGE_ENCODER:
        wanted.append((layout.image_encoder, f"{CLIP_STEM}.pth"))
    if missing := [name for path, name in wanted if path is None]:
        raise ValueError(
            f"{layout.root} lacks {', '.join(missing)}. Download the whole checkpoint, or use "
            "load_wan_transformer for the transformer alone."
        )
    if layout.vae is not None and not layout.vae.name.startswith(vae_stem):
        raise ValueError(
            f"{layout.root}: its transformer works with {vae_stem}, found {layout.vae.name}."
        )


def load_tokenizer(layout: WanLayout) -> "PreTrainedTokenizerBase":
    """The tokenizer beside the weights; the network is never asked.

    Raises:
        ValueError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            layout.tokenizer, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read the tokenizer in {layout.tokenizer}: {error}.") from error
