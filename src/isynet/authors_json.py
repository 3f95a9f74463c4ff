"""Architectures in the JSON format of ISyNet's authors."""

import json
import re
from pathlib import Path
from typing import Any

from isynet.architecture import DEFAULT_HEAD, Architecture, Stage
from nabla_attn.files import read_json, write_text

KERNELS = (1, 3, 5, 7)
_MAX_BYTES = 2**20


def load_json(path: str | Path) -> Architecture:
    """Read an architecture from a file in the authors' format.

    Raises:
        ValueError: Not such a file, or it asks for what the networks have not; the file is named.
    """
    data = read_json(path, max_bytes=_MAX_BYTES)
    try:
        return from_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_json(architecture: Architecture, path: str | Path) -> None:
    """Write an architecture in the authors' format, whole or not at all."""
    write_text(path, json.dumps(to_json(architecture), indent=2) + "\n")


def from_json(data: Any) -> Architecture:
    """Read an architecture from the authors' JSON object.

    Identity edges are left out. As in the authors' networks, `lastActivation` counts only where the
    last edge is a convolution.

    Raises:
        ValueError: A field is missing or asks for what the networks have not.
    """
    if not isinstance(data, dict) or not isinstance(data.get("Blocks"), dict):
        raise ValueError("not an ISyNet architecture: it has no object 'Blocks'.")
    num_stages, num_edges = data.get("nStages"), data.get("nEdgesInBlock")
    blocks = data["Blocks"]
    if len(blocks) != num_stages or set(blocks) != {str(s) for s in range(len(blocks))}:
        raise ValueError(
            f"nStages is {num_stages!r}, but the blocks are {', '.join(sorted(blocks))[:80]}."
        )
    stages = tuple(_stage_from_json(str(s), blocks[str(s)], num_edges) for s in range(len(blocks)))
    return Architecture(stages, data.get("headWidth", DEFAULT_HEAD))


def _stage_from_json(name: str, data: Any, num_edges: Any) -> Stage:
    operations = data.get("operations") if isinstance(data, dict) else None
    if not isinstance(operations, list) or len(operations) != num_edges:
        raise ValueError(f"block {name} has no list of {num_edges} operations.")
    edges = [_edge_from_json(name, operation) for operation in operations]
    if edges[0] is None:
        raise ValueError(f"block {name} begins with an identity, but it must halve the resolution.")
    skip = _one_of(data, name, "skipType", ("noSkip", "add"))
    last = _one_of(data, name, "lastActivation", ("Relu", "Linear"))
    try:
        return Stage(
            tuple(edge for edge in edges if edge),
            data.get("nBlocks"),
            has_skip=skip == "add",
            width_log2=data.get("cIncrease"),
            expansion=data.get("expantionFactor"),
            is_linear=last == "Linear" and edges[-1] is not None,
        )
    except ValueError as error:
        raise ValueError(f"block {name}: {error}") from error


def _edge_from_json(name: str, operation: Any) -> str | None:
    op = operation.get("op") if isinstance(operation, dict) else None
    if op == "identity":
        return None
    found = re.fullmatch(r"conv_(\d)x(\d)(?:_(\d)x(\d))?", op) if isinstance(op, str) else None
    if found and operation.get("group", 1) == 1:
        a, b, c, d = found.groups()
        if c is None and a == b and int(a) in KERNELS:
            return a
        if c is not None and (a, b) == (d, c) and a == "1" and int(b) in KERNELS[1:]:
            return f"{b}s"
    raise ValueError(
        f"block {name}: unknown operation {operation!r:.80}. Known: identity, conv_1x1, conv_3x3, "
        "conv_5x5, conv_7x7, conv_1x3_3x1, conv_1x5_5x1, conv_1x7_7x1, all with group 1."
    )


def to_json(architecture: Architecture) -> dict[str, Any]:
    """Write an architecture as the authors' JSON object.

    Raises:
        ValueError: Depthwise edges, or a linear block of one edge, which the format cannot express.
    """
    num_edges = max(4, *(len(stage.edges) for stage in architecture.stages))
    blocks = {}
    for index, stage in enumerate(architecture.stages):
        if any(edge.endswith("d") for edge in stage.edges):
            raise ValueError(f"the authors' format has no depthwise edges, got {stage}.")
        if stage.is_linear and len(stage.edges) == 1:
            raise ValueError(f"the authors' format has no linear block of one edge, got {stage}.")
        gaps = [None] * (num_edges - len(stage.edges))
        # Linear counts only on the last place, ReLU anywhere.
        edges = (
            [*stage.edges[:-1], *gaps, stage.edges[-1]]
            if stage.is_linear
            else [*stage.edges, *gaps]
        )
        blocks[str(index)] = {
            "expantionFactor": stage.expansion,
            "operations": [{"op": _edge_to_json(edge), "group": 1} for edge in edges],
            "lastActivation": "Linear" if stage.is_linear else "Relu",
            "skipType": "add" if stage.has_skip else "noSkip",
            "nBlocks": stage.num_blocks,
            "cIncrease": stage.width_log2,
        }
    result = {"nStages": len(blocks), "nEdgesInBlock": num_edges, "Blocks": blocks}
    if architecture.head_width != DEFAULT_HEAD:
        # Not in the authors' files, whose heads are all 1280 wide.
        result["headWidth"] = architecture.head_width
    return result


def _edge_to_json(edge: str | None) -> str:
    if edge is None:
        return "identity"
    size = edge[0]
    return f"conv_1x{size}_{size}x1" if edge.endswith("s") else f"conv_{size}x{size}"


def _one_of(data: dict[str, Any], name: str, key: str, known: tuple[str, ...]) -> str:
    value = data.get(key)
    if value not in known:
        raise ValueError(
            f"block {name}: {key} must be one of {', '.join(known)}, got {value!r:.80}."
        )
    return str(value)
