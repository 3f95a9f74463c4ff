"""Original Wan checkpoint -> standard diffusers directory: streamed, resumable, verified."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from nabla_attn.files import whole_file, write_text
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.wan.families import pipeline_class, pipeline_options
from nabla_attn.wan.layout import WanLayout, read_layout
from nabla_attn.wan.load import (
    open_part,
    open_transformer,
    vae_kind,
)
from nabla_attn.wan.pipeline import check_parts, load_tokenizer
from nabla_attn.wan.plan import PartPlan
from nabla_attn.wan.shards import shards_of, verify_shard, write_index, write_shard
from nabla_attn.wan.sparsity import DEFAULTS
from nabla_attn.wan.tensor_files import read_config

RECORD = "conversion.json"
MAX_SHARD_BYTES = 2 * 2**30


def convert_wan(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Path:
    """Write the pipeline of an original Wan checkpoint as a diffusers directory.

    Memory in use stays below the largest part: twice ``max_shard_bytes`` and one tensor. A run
    that was stopped goes on where it was; every shard is compared with its source, tensor by
    tensor, after writing.

    Args:
        source: directory in the original layout.
        target: directory to make; empty, or left by an earlier run from the same source.
        dtype: of the weights but the VAE's; None as stored.
        max_shard_bytes: largest weight file; None is 2 GiB, or a third of the largest source file.
        progress: called with stage, done, total.

    Returns:
        ``target``.

    Raises:
        ValueError: the source is incomplete or unsafe, the target holds something else, or the
            disk has no room.
    """
    layout = read_layout(source)
    check_parts(layout)
    target = Path(target)
    _claim(layout, target, dtype)
    _check_space(layout, target, dtype)
    max_shard_bytes = max_shard_bytes or min(MAX_SHARD_BYTES, _largest_source(target) // 3)
    parts: dict[str, Any] = {}
    for component, opened, kept in _parts(layout, dtype):
        with opened as plan:
            _write_part(plan, target / component, kept, max_shard_bytes, progress)
            parts[component] = plan.model
    _finish(layout, target, parts)
    return target


def _parts(layout: WanLayout, dtype: torch.dtype | None) -> list[tuple[str, Any, Any]]:
    assert layout.vae is not None and layout.text_encoder is not None
    parts: list[tuple[str, Any, Any]] = [
        ("vae", open_part(vae_kind(layout.vae), layout.vae), None),
        ("text_encoder", open_part("text encoder", layout.text_encoder), dtype),
    ]
    if layout.image_encoder is not None:
        parts.append(("image_encoder", open_part("image encoder", layout.image_encoder), dtype))
    for name, files in zip(("transformer", "transformer_2"), layout.transformers, strict=False):
        parts.append((name, open_transformer(files), dtype))
    return parts


def _claim(layout: WanLayout, target: Path, dtype: torch.dtype | None) -> None:
    """Mark ``target`` as the conversion of this source, or refuse."""
    files = [path for part in layout.transformers for path in part.paths]
    files += [p for p in (layout.vae, layout.text_encoder, layout.image_encoder) if p is not None]
    folder = layout.root if layout.root.is_dir() else layout.root.parent
    record = {
        "files": {
            str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
        },
        "dtype": str(dtype),
    }
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not (target / RECORD).is_file():
            raise ValueError(f"{target} is not empty and no conversion. Choose another directory.")
        if read_config(target / RECORD) != record:
            raise ValueError(
                f"{target} was begun from other files or with another dtype. Remove it, or choose "
                "another directory."
            )
    write_text(target / RECORD, json.dumps(record, indent=1) + "\n")


def _largest_source(target: Path) -> int:
    """Bytes of the largest source file."""
    return max(size for size, _ in read_config(target / RECORD)["files"].values())


def _check_space(layout: WanLayout, target: Path, dtype: torch.dtype | None) -> None:
    """See that the disk has room for what is not written yet."""
    needed = 0
    for _, opened, kept in _parts(layout, dtype):
        with opened as plan:
            (shard,) = shards_of(plan, kept, sys.maxsize)
            needed += sum(info.num_bytes for info in shard.infos.values())
    present = sum(path.stat().st_size for path in target.rglob("*.safetensors"))
    free = shutil.disk_usage(target).free
    if needed - present > free:
        raise ValueError(
            f"{target}: needs about {(needed - present) / 2**30:.1f} GiB more, the disk has "
            f"{free / 2**30:.1f} GiB free."
        )


def _write_part(
    plan: PartPlan,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: ProgressCallback,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards = shards_of(plan, dtype, max_shard_bytes)
    for done, shard in enumerate(shards, start=1):
        write_shard(plan, shard, folder)
        verify_shard(plan, shard, folder)
        progress(f"converting {folder.name}", done, len(shards))
    write_index(shards, plan.kind.weights_stem, folder)
    model: Any = plan.model
    if plan.kind.config_class:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    else:
        model.save_config(folder)


def _finish(layout: WanLayout, target: Path, parts: dict[str, Any]) -> None:
    """Write what is small; model_index.json comes last and marks the directory as whole."""
    from diffusers import UniPCMultistepScheduler

    parts["tokenizer"] = load_tokenizer(layout)
    parts["tokenizer"].save_pretrained(target / "tokenizer")
    # Stock diffusers: this directory is to load without nabla-attn.
    parts["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    parts["scheduler"].save_pretrained(target / "scheduler")
    if "image_encoder" in parts:
        from transformers import CLIPImageProcessor

        size = parts["image_encoder"].config.image_size
        parts["image_processor"] = CLIPImageProcessor(
            size={"height": size, "width": size}, do_center_crop=False
        )
        parts["image_processor"].save_pretrained(target / "image_processor")
    if layout.sparse_algo is not None:
        write_text(target / DEFAULTS, json.dumps({"sparse_algo": layout.sparse_algo}) + "\n")
    pipe = pipeline_class(layout.family)(**parts, **pipeline_options(layout.family))
    with whole_file(target / "model_index.json") as temporary:
        temporary.write_text(pipe.to_json_string(), encoding="utf-8")
