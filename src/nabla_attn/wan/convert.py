"""Original Wan checkpoint -> standard diffusers directory: streamed, resumable, verified."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from nabla_attn.files import whole_file, write_text
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.wan.layout import WanLayout, read_layout
from nabla_attn.wan.parts import PartPlan, open_part, vae_kind
from nabla_attn.wan.pipeline import load_tokenizer
from nabla_attn.wan.tasks import WAN_FAMILIES, find_task, width_and_height
from nabla_attn.wan.tensor_files import TensorInfo, open_tensor_file, read_config

RECORD = "conversion.json"
LOCK = ".conversion.lock"
MAX_SHARD_BYTES = 2 * 2**30


def convert_wan(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Path:
    """Write the pipeline of an original Wan checkpoint as a diffusers directory.

    The directory samples as the checkpoint does: the scheduler has the shift of the task, and
    `defaults.json` its size, frames, steps, guidance, fps and algorithm.

    Memory in use stays below the largest part: twice `max_shard_bytes` and one tensor. A run that
    was stopped continues where it was, also after a damaged source was replaced; every weight file
    is compared with its source, tensor by tensor.

    Args:
        source: The directory in the original layout.
        target: The directory to make; empty, or left by an earlier run.
        dtype: Dtype of the weights but the VAE's; None is the stored one.
        max_shard_bytes: Size of the largest weight file; None is 2 GiB, or a third of the largest
            source file.
        on_progress: Called with stage, done, total.

    Returns:
        `target`.

    Raises:
        ValueError: The source is incomplete or unsafe, the target holds something else or another
            process writes to it, or the disk has no room.
    """
    layout = read_layout(source)
    layout.check_complete()
    target = Path(target)
    _check_target(target)
    target.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(target / LOCK, timeout=0):
            _claim(layout, target, dtype)
            _check_space(layout, target, dtype)
            largest = max(path.stat().st_size for path in _source_files(layout))
            limit = max_shard_bytes or min(MAX_SHARD_BYTES, largest // 3)
            parts: dict[str, Any] = {}
            for component, opened, kept in _parts(layout, dtype):
                with opened as plan:
                    _write_part(plan, target / component, kept, limit, on_progress)
                    parts[component] = plan.model
            _finish(layout, target, parts)
    except Timeout as error:
        raise ValueError(f"another process converts to {target}. Wait until it ends.") from error
    (target / LOCK).unlink(missing_ok=True)
    return target


def _check_target(target: Path) -> None:
    """Refuse a directory that is neither empty nor a conversion."""
    is_taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if is_taken and not any((target / name).is_file() for name in (RECORD, LOCK)):
        raise ValueError(f"{target} is not empty and no conversion. Choose another directory.")


def _claim(layout: WanLayout, target: Path, dtype: torch.dtype | None) -> None:
    """Mark `target` as the conversion of this source, and remove what a killed run left half done.

    A finished conversion belongs to its source. An unfinished one may go on from files that were
    replaced, as everything that lies there is compared with them.
    """
    folder = layout.root if layout.root.is_dir() else layout.root.parent
    record = {
        "files": {
            str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in _source_files(layout)
        },
        "dtype": str(dtype),
    }
    before = read_config(target / RECORD) if (target / RECORD).is_file() else record
    is_finished = (target / "model_index.json").is_file()
    if before.get("dtype") != record["dtype"] or (is_finished and before != record):
        raise ValueError(
            f"{target} was made from other files or with another dtype. Remove it, or choose "
            "another directory."
        )
    for path in target.rglob(".*.tmp"):
        path.unlink()
    write_text(target / RECORD, json.dumps(record, indent=1) + "\n")


def _source_files(layout: WanLayout) -> list[Path]:
    files = [path for part in layout.transformers for path in part.paths]
    others = (layout.vae, layout.text_encoder, layout.image_encoder)
    return files + [path for path in others if path is not None]


Part = tuple[str, AbstractContextManager[PartPlan], torch.dtype | None]


def _parts(layout: WanLayout, dtype: torch.dtype | None) -> Iterator[Part]:
    """Component, opened plan and dtype of every part."""
    assert layout.vae is not None and layout.text_encoder is not None
    yield "vae", open_part(vae_kind(layout.vae), layout.vae), None
    yield "text_encoder", open_part("text encoder", layout.text_encoder), dtype
    family = WAN_FAMILIES[layout.family]
    if family.has_image_tokens and layout.image_encoder is not None:
        yield "image_encoder", open_part("image encoder", layout.image_encoder), dtype
    for name, files in zip(("transformer", "transformer_2"), layout.transformers, strict=False):
        yield name, files.open(), dtype


def _check_space(layout: WanLayout, target: Path, dtype: torch.dtype | None) -> None:
    """Check that the disk has room for what is not written yet."""
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
    on_progress: ProgressCallback,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards = shards_of(plan, dtype, max_shard_bytes)
    for done, shard in enumerate(shards, start=1):
        shard.write(plan, folder)
        on_progress(f"converting {folder.name}", done, len(shards))
    _write_index(shards, plan.kind.weights_stem, folder)
    kept = {shard.name for shard in shards}
    for path in folder.glob("*.safetensors"):
        # Of an earlier run, whose source or size of files was another.
        if path.name not in kept:
            path.unlink()
    model: Any = plan.model
    if plan.kind.config_class:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    else:
        model.save_config(folder)


def _finish(layout: WanLayout, target: Path, parts: dict[str, Any]) -> None:
    """Write what is small; model_index.json comes last and marks the directory as whole."""
    from diffusers import UniPCMultistepScheduler

    family, task = WAN_FAMILIES[layout.family], find_task(layout.task)
    width, height = width_and_height(task.usual_size)
    defaults: dict[str, Any] = {"height": height, "width": width, "frames": task.frames}
    defaults |= {"steps": task.steps, "guidance": task.guidance, "fps": task.fps}
    if task.guidance_low_noise is not None:
        defaults["guidance_2"] = task.guidance_low_noise
    if layout.config.sparse_algo is not None:
        defaults["sparse_algo"] = layout.config.sparse_algo
    write_text(target / "defaults.json", json.dumps(defaults, indent=1) + "\n")
    parts["tokenizer"] = load_tokenizer(layout)
    parts["tokenizer"].save_pretrained(target / "tokenizer")
    # Stock diffusers: this directory is to load without nabla-attn.
    parts["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=task.shift
    )
    parts["scheduler"].save_pretrained(target / "scheduler")
    if "image_encoder" in parts:
        from transformers import CLIPImageProcessor

        size = parts["image_encoder"].config.image_size
        parts["image_processor"] = CLIPImageProcessor(
            size={"height": size, "width": size}, do_center_crop=False
        )
        parts["image_processor"].save_pretrained(target / "image_processor")
    pipe = family.pipeline_class()(**parts, **family.pipeline_options())
    write_text(target / "model_index.json", pipe.to_json_string())


@dataclass(frozen=True)
class Shard:
    """One weight file of a converted part: its name, and its tensors in the new dtype."""

    name: str
    infos: dict[str, TensorInfo]

    def write(self, plan: PartPlan, folder: Path) -> None:
        """Write the file unless one with the same tensors lies there, and compare it.

        Raises:
            ValueError: A tensor differs after writing.
            OSError: The disk is full.
        """
        from safetensors.torch import save_file

        path = folder / self.name
        if self.is_in(plan, path):
            return
        # Copies: pieces of one tensor share memory, which the format refuses.
        tensors = {name: self._source(plan, name).clone() for name in self.infos}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        del tensors
        if not self.is_in(plan, path):
            path.unlink()
            raise ValueError(
                f"{path} differs from its source after writing; the file was removed. Run the "
                "conversion again; if it happens again, check the disk."
            )

    def is_in(self, plan: PartPlan, path: Path) -> bool:
        """Whether a file holds these tensors, bit for bit as their source."""
        try:
            with open_tensor_file(path) as written:
                return written.infos == self.infos and all(
                    _same_bits(written.read(name), self._source(plan, name)) for name in self.infos
                )
        except ValueError:
            return False

    def _source(self, plan: PartPlan, name: str) -> torch.Tensor:
        return plan.sources[name].read(self.infos[name].shape, self.infos[name].dtype)


def shards_of(plan: PartPlan, dtype: torch.dtype | None, max_bytes: int) -> list[Shard]:
    """Split a part into files of at most `max_bytes` (one tensor at least)."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, parameter in plan.model.state_dict().items():
        if name not in plan.sources:
            continue
        info = TensorInfo(tuple(parameter.shape), plan.dtype_of(name, dtype))
        if size + info.num_bytes > max_bytes and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.num_bytes
    stem = plan.kind.weights_stem
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", groups[0])]
    return [
        Shard(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def _write_index(shards: list[Shard], stem: str, folder: Path) -> None:
    """Write the index of a part that has several files."""
    path = folder / f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        path.unlink(missing_ok=True)
        return
    total = sum(info.num_bytes for shard in shards for info in shard.infos.values())
    weight_map = {name: shard.name for shard in shards for name in shard.infos}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(path, json.dumps(index, indent=2) + "\n")


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    first, second = (x.contiguous().flatten().view(torch.uint8) for x in (first, second))
    return torch.equal(first, second)
