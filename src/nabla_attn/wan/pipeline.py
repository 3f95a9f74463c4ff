"""Original Wan checkpoints as diffusers models and pipelines."""

from pathlib import Path
from typing import Any

import torch

from nabla_attn.config import parse
from nabla_attn.errors import first_line
from nabla_attn.models import apply
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.wan.layout import WanLayout, read_layout
from nabla_attn.wan.parts import fill, load_part, vae_kind
from nabla_attn.wan.tasks import WanFamily, check_task


def load_wan_transformer(
    path: str | Path,
    sparse_algo: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Any:
    """Load the transformer of an original Wan checkpoint as diffusers' class.

    Args:
        path: The directory with `diffusion_pytorch_model*.safetensors` and `config.json`, or one
            file. Of the two experts of Wan 2.2 the high-noise one is loaded.
        sparse_algo: The algorithm, such as `"nabla-0.7"` or `"dense"`. None is the one that
            config.json names, else dense. The reference overrides the file's own value by mistake
            (Wan2.1-NABLA text2video.py:93).
        dtype: Dtype of the parameters; None is the stored one.
        on_progress: Called with stage, done, total.

    Returns:
        `WanTransformer3DModel` or `WanVACETransformer3DModel`, in eval mode.

    Raises:
        ValueError: The checkpoint is incomplete, mixed up or unsafe to read, or the algorithm is
            unknown. The message names the file.
    """
    layout = read_layout(path)
    model = _load_transformer(layout, 0, dtype, on_progress)
    _apply_sparsity(model, sparse_algo if sparse_algo is not None else layout.config.sparse_algo)
    return model


def _load_transformer(
    layout: WanLayout, expert: int, dtype: torch.dtype | None, on_progress: ProgressCallback
) -> Any:
    with layout.transformers[expert].open() as plan:
        return fill(plan, dtype, on_progress)


def load_wan_pipeline(
    path: str | Path,
    task: str | None = None,
    *,
    sparse_algo: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    text_dtype: torch.dtype = torch.bfloat16,
    solver: str = "unipc",
    shift: float = 5.0,
    on_progress: ProgressCallback = ignore_progress,
) -> Any:
    """Load a whole original Wan checkpoint as the diffusers pipeline of its task.

    Args:
        path: The checkpoint directory in the original layout. For a diffusers directory use
            `nabla_attn.generation.pipeline.load_pipeline`.
        task: The task to check the checkpoint against, such as `"t2v-14B"`; None checks nothing.
        sparse_algo: The algorithm, as in `load_wan_transformer`; both experts of Wan 2.2 get it.
        dtype: Dtype of transformer and image encoder. The reference computes in bfloat16.
        text_dtype: Dtype of the text encoder. The VAE stays in float32 as in the reference.
        solver: `"unipc"` or `"dpm++"`.
        shift: Shift of the noise schedule.
        on_progress: Called with stage, done, total.

    Raises:
        ValueError: A part is missing or damaged, or the checkpoint is not for `task`.
    """
    from nabla_attn.wan.reference import build_solver

    layout = read_layout(path)
    if task is not None:
        check_task(task, layout.family, layout.root)
    family = layout.check_complete()
    assert layout.vae is not None and layout.text_encoder is not None
    parts: dict[str, Any] = {
        "scheduler": build_solver(solver, shift),
        "tokenizer": load_tokenizer(layout),
        "vae": load_part(
            vae_kind(layout.vae), layout.vae, dtype=torch.float32, on_progress=on_progress
        ),
        "text_encoder": load_part(
            "text encoder", layout.text_encoder, dtype=text_dtype, on_progress=on_progress
        ),
    }
    for expert, name in enumerate(("transformer", "transformer_2")[: family.num_experts]):
        parts[name] = _load_transformer(layout, expert, dtype, on_progress)
    if family.has_image_tokens:
        assert layout.image_encoder is not None
        tower = load_part(
            "image encoder", layout.image_encoder, dtype=dtype, on_progress=on_progress
        )
        parts |= {"image_encoder": tower, "image_processor": None}
    pipe = _assemble(family, parts)
    _apply_sparsity(pipe, sparse_algo if sparse_algo is not None else layout.config.sparse_algo)
    return pipe


def _assemble(family: WanFamily, parts: dict[str, Any]) -> Any:
    pipe = family.pipeline_class()(**parts, **family.pipeline_options())
    return resize_as_reference(pipe)


def resize_as_reference(pipe: Any) -> Any:
    """Give an image-to-video pipeline the reference's way to resize images; others stay."""
    from nabla_attn.wan.reference import WanImageProcessor, WanVideoProcessor

    if type(pipe).__name__ == "WanImageToVideoPipeline":
        pipe.video_processor = WanVideoProcessor(vae_scale_factor=pipe.vae_scale_factor_spatial)
        if pipe.image_encoder is not None:
            pipe.image_processor = WanImageProcessor(pipe.image_encoder.config.image_size)
    return pipe


def _apply_sparsity(model: Any, sparse_algo: str | None) -> None:
    """Put an algorithm on a model or pipeline; None and `"dense"` leave it dense."""
    if sparse_algo is not None and not parse(sparse_algo).is_dense:
        apply(model, sparse_algo)


def load_tokenizer(layout: WanLayout) -> Any:
    """The tokenizer beside the weights; the network is never asked, and no code of it runs.

    Raises:
        ValueError: It cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            layout.tokenizer, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # Tokenizers meet damaged files with every kind of error.
        raise ValueError(
            f"cannot read the tokenizer in {layout.tokenizer}: {first_line(error)}. Download it "
            "again."
        ) from error
