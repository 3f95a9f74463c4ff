"""Checkpoints of MindSpore, read without MindSpore or protobuf, for the authors' networks."""

import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isynet.architecture import Architecture
from isynet.family import FAMILY, find_architecture
from isynet.network import ISyNet

DTYPES = {
    "Float32": np.float32,
    "Float16": np.float16,
    "Float64": np.float64,
    "Int32": np.int32,
    "Int64": np.int64,
    "Int8": np.int8,
    "Int16": np.int16,
    "UInt8": np.uint8,
    "UInt16": np.uint16,
    "UInt32": np.uint32,
    "UInt64": np.uint64,
    "Bool": np.bool_,
}
MAX_DIMS = 8
CHECKSUM = b"crc_num"
"""Newer files end in this mark and the CRC-32 of what is before it, in ten bytes."""

_BATCH_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_HEAD = {"_conv_head": "neck.0", "_bn1": "neck.1", "_fc": "fc", "_bn2": "bn"}
_EDGE = re.compile(
    r"backbone(\d*)\.all_cells\.\d+\.content_cell\.(\d+)_(\d+)_(\d+)\.layers\.(\d+)\.(\w+)"
)
_LAYER = re.compile(r"head(\d*)\.(_conv_head|_bn1|_fc|_bn2)\.(\w+)")


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Read the tensors of a MindSpore checkpoint, in the order of the file.

    Raises:
        ValueError: The file is corrupt or no such checkpoint; it is named.
        OSError: The file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        data = _strip_checksum(data)
        result = _read_tensors(memoryview(data))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no MindSpore checkpoint, or it is corrupt: {error}."
        ) from error
    if not result:
        raise ValueError(f"{path} is no MindSpore checkpoint: it holds no tensor.")
    return result


def _strip_checksum(data: bytes) -> bytes:
    content, end = data[: -len(CHECKSUM) - 10], data[-len(CHECKSUM) - 10 :]
    if not end.startswith(CHECKSUM):
        return data
    if zlib.crc32(content) != int.from_bytes(end[len(CHECKSUM) :], "big"):
        raise ValueError("its checksum does not fit")
    return content


def _read_tensors(data: memoryview) -> dict[str, np.ndarray]:
    headers: dict[str, tuple[type, tuple[int, ...]]] = {}
    contents: dict[str, list[memoryview]] = {}
    for number, value in _fields(data):
        if number != 1 or isinstance(value, int):
            raise ValueError(f"it has a field {number} where only tensors are expected")
        parts = dict(_fields(value))
        tag, tensor = parts.get(1), parts.get(2)
        if not isinstance(tag, memoryview) or not isinstance(tensor, memoryview):
            raise ValueError("an entry has no name or no tensor")
        name = str(tag, "utf-8")
        header, content = _read_tensor(name, tensor)
        if header is None:
            continue
        # Large tensors are cut into several entries of one name and one header.
        if headers.setdefault(name, header) != header:
            raise ValueError(f"{name} stands twice with different shapes")
        contents.setdefault(name, []).append(content)
    return {name: _join(name, *headers[name], contents[name]) for name in headers}


def _read_tensor(
    name: str, data: memoryview
) -> tuple[tuple[type, tuple[int, ...]] | None, memoryview]:
    dims: list[int] = []
    kind, content = "", memoryview(b"")
    for number, value in _fields(data):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and not isinstance(value, int):
            kind = str(value, "utf-8")
        elif number == 3 and not isinstance(value, int):
            content = value
    if kind not in DTYPES:
        # Such as a text beside the weights; a network whose weights were of such a type fits none.
        return None, content
    if len(dims) > MAX_DIMS:
        raise ValueError(f"{name} has {len(dims)} dimensions")
    return (DTYPES[kind], tuple(dims)), content


def _join(name: str, dtype: type, shape: tuple[int, ...], parts: list[memoryview]) -> np.ndarray:
    content = parts[0] if len(parts) == 1 else b"".join(parts)
    # MindSpore writes the shape of a single number as [0].
    shape = () if shape == (0,) and content else shape
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if len(content) != wanted:
        raise ValueError(f"{name} {list(shape)} needs {wanted} bytes, the file has {len(content)}")
    return np.frombuffer(content, dtype).reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of a protobuf message: number, and an integer or the bytes of it."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"byte {place} begins no field of a checkpoint")
        if place + size > len(data):
            raise ValueError(f"it ends within a field of {size} bytes at byte {place}")
        yield key >> 3, data[place : place + size]
        place += size


def _varints(data: memoryview) -> Iterator[int]:
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(data):
            raise ValueError("it ends within a number")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError(f"the number at byte {place - 10} is too long")


def to_state_dict(
    tensors: dict[str, np.ndarray] | list[str], *, is_peer: bool = False
) -> dict[str, str]:
    """Names of our network for names of the authors' network.

    Args:
        tensors: Names of the checkpoint, in its order. Others, such as an optimizer's, are ignored.
        is_peer: Whether to take the second network of a pair that was trained together.

    Returns:
        Our name to the checkpoint's name.
    """
    wanted = ("2",) if is_peer else ("", "1")
    order: dict[tuple[str, str], list[str]] = {}
    result = {}
    for name in tensors:
        if (found := _EDGE.fullmatch(name)) and found[1] in wanted:
            _, stage, block, edge, layer, leaf = found.groups()
            # Identity edges leave gaps in the numbers, so their order is what counts.
            edges = order.setdefault((stage, block), [])
            if edge not in edges:
                edges.append(edge)
            place = f"stages.{stage}.{block}.edges.{edges.index(edge)}.{layer}"
        elif (found := _LAYER.fullmatch(name)) and found[1] in wanted:
            _, layer, leaf = found.groups()
            place = _HEAD[layer]
        else:
            continue
        result[f"{place}.{_BATCH_NORM.get(leaf, leaf)}"] = name
    return result


def load_mindspore(
    path: str | Path,
    architecture: str | Path | Architecture | None = None,
    *,
    is_peer: bool = False,
) -> ISyNet:
    """Build the network of an authors' checkpoint.

    Args:
        path: The `.ckpt` file.
        architecture: What the checkpoint was trained as. By default the published network whose
            tensors have the same names and shapes; weights alone do not tell skips and ReLUs.
        is_peer: Whether to take the second network of a pair that was trained together.

    Raises:
        ValueError: The file is no such checkpoint, or no known architecture fits it.
        OSError: The file cannot be read.
    """
    tensors = read_checkpoint(path)
    names = to_state_dict(list(tensors), is_peer=is_peer)
    if "fc.weight" not in names:
        which = "second network" if is_peer else "network"
        raise ValueError(
            f"{path} holds no {which} of ISyNet: no classifier among {len(tensors)} tensors."
        )
    state = {ours: _to_tensor(tensors[theirs]) for ours, theirs in names.items()}
    candidates = FAMILY if architecture is None else {str(architecture): architecture}
    for candidate in candidates.values():
        net = _empty_like(find_architecture(candidate), state)
        if _shapes(net.state_dict()) == _shapes(state):
            net = net.to_empty(device="cpu")
            net.load_state_dict(state, strict=False)
            for name, buffer in net.named_buffers():
                if name.endswith("num_batches_tracked"):
                    buffer.zero_()
            return net.eval()
    if architecture is None:
        raise ValueError(
            f"{path} fits none of {', '.join(FAMILY)}. Pass the architecture it was trained as."
        )
    raise ValueError(f"{path} does not fit the architecture {architecture}.")


def _empty_like(architecture: Architecture, state: dict[str, Tensor]) -> ISyNet:
    classes = state["fc.weight"].shape[0]
    first = state.get("stages.0.0.edges.0.0.weight")
    channels = first.shape[1] if first is not None and first.dim() == 4 else 3
    with torch.device("meta"):
        return ISyNet(architecture, classes, channels, has_last_norm="bn.weight" in state)


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))
