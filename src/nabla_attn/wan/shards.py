"""The weight files of a converted part: planned, written whole, compared with their source."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nabla_attn.files import whole_file, write_text
from nabla_attn.wan.load import stored_or
from nabla_attn.wan.plan import PartPlan
from nabla_attn.wan.tensor_files import TensorInfo, open_tensor_file


@dataclass(frozen=True)
class Shard:
    """One weight file to write: its name and what goes into it."""

    name: str
    infos: dict[str, TensorInfo]


def shards_of(plan: PartPlan, dtype: torch.dtype | None, max_bytes: int) -> list[Shard]:
    """Split a part into files of at most ``max_bytes`` (one tensor at least)."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, parameter in plan.model.state_dict().items():
        if name not in plan.sources:
            continue
        info = TensorInfo(tuple(parameter.shape), stored_or(plan, name, dtype))
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


def write_shard(plan: PartPlan, shard: Shard, folder: Path) -> None:
    """Write one shard, unless a whole file with the same tensors lies there from before."""
    from safetensors.torch import save_file

    if _is_written(shard, folder):
        return
    # Copies: pieces of one tensor share memory, which the format refuses.
    tensors = {name: _source_value(plan, name, info).clone() for name, info in shard.infos.items()}
    with whole_file(folder / shard.name) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def verify_shard(plan: PartPlan, shard: Shard, folder: Path) -> None:
    """Compare a written shard with its source, bit for bit.

    Raises:
        ValueError: a tensor differs; the bad file is removed so that the next run writes it anew.
    """
    path = folder / shard.name
    with open_tensor_file(path) as written:
        for name, info in shard.infos.items():
            got, expected = written.read(name), _source_value(plan, name, info)
            if got.dtype != expected.dtype or not _same_bits(got, expected):
                path.unlink()
                raise ValueError(
                    f"{path}: {name} differs from its source after writing; the file was removed. "
                    "Run the conversion again; if it happens again, check the disk."
                )


def write_index(shards: list[Shard], stem: str, folder: Path) -> None:
    """Write the index of a part that has several files."""
    if len(shards) == 1:
        return
    total = sum(info.num_bytes for shard in shards for info in shard.infos.values())
    weight_map = {name: shard.name for shard in shards for name in shard.infos}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _is_written(shard: Shard, folder: Path) -> bool:
    path = folder / shard.name
    if not path.is_file():
        return False
    try:
        with open_tensor_file(path) as file:
            return file.infos == shard.infos
    except ValueError:
        return False


def _source_value(plan: PartPlan, name: str, info: TensorInfo) -> torch.Tensor:
    return plan.sources[name].read(torch.Size(info.shape), info.dtype)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    first, second = (x.contiguous().flatten().view(torch.uint8) for x in (first, second))
    return torch.equal(first, second)
