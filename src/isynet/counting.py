"""The work of networks that see images."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from isynet.architecture import BASE_CHANNELS, Architecture, Stage
from isynet.checkpoint import architecture_of
from isynet.family import find_architecture
from isynet.network import Edge, Head, ISyNet, make_stage
from isynet.peers import PEERS
from nabla_attn.cost import count as counter
from nabla_attn.cost.work import Operator, Work

TABLE_SIZE = 244
"""Pixels at which the published table counts operations; a slip for 224, which it names."""


def count(
    source: nn.Module | str | Path | Architecture,
    size: int | tuple[int, int] = 224,
    *,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> Work:
    """Count the work of a network on one image, on the meta device.

    Args:
        source: Any module that takes images, or what `isynet.create` takes as an architecture.
        size: Pixels of the image, one number or (height, width).
        in_chans: Channels of the image.
        num_classes: Number of classes where `source` is an architecture.

    Raises:
        ValueError: An unknown name, or a size that is not positive.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"the size must be positive, got {size}.")
    if isinstance(source, nn.Module):
        return counter.count(source, (1, in_chans, height, width))
    return _count_architecture(find_architecture(source), height, width, in_chans, num_classes)


def _count_architecture(
    architecture: Architecture, height: int, width: int, in_chans: int, num_classes: int
) -> Work:
    """The work of a network, from each stage's first block, one more and the head."""
    operators: tuple[Operator, ...] = ()
    inputs = in_chans
    for index, stage in enumerate(architecture.stages):
        pair = replace(stage, num_blocks=2)
        first, more = _count_pair(index, pair, inputs, height, width)
        operators += first + more * (stage.num_blocks - 1)
        inputs = architecture.channels[index]
        height, width = -(-height // 2), -(-width // 2)
    with torch.device("meta"):
        neck = Edge("1", inputs, architecture.head_width) if architecture.head_width else None
        fc = nn.Linear(architecture.head_width or inputs, num_classes)
        head = Head(neck or nn.Identity(), fc, nn.BatchNorm1d(num_classes))
    return Work(operators) + counter.count(head, (1, inputs, height, width))


@lru_cache(maxsize=4096)
def _count_pair(
    index: int, stage: Stage, inputs: int, height: int, width: int
) -> tuple[tuple[Operator, ...], tuple[Operator, ...]]:
    """Operators of a stage's first block and of its second."""
    with torch.device("meta"):
        first, second = make_stage(index, stage, inputs)
    channels, half = BASE_CHANNELS << (index + stage.width_log2), (-(-height // 2), -(-width // 2))
    works = (
        counter.count(first, (1, inputs, height, width)),
        counter.count(second, (1, channels, *half)),
    )
    assert not any(work.unknown for work in works)
    return works[0].operators, works[1].operators


class Part(NamedTuple):
    """A stage of a network, or its head.

    Attributes:
        name: The stage's string, or `head`.
        channels: Channels of its result.
        pixels: Height of its result.
        parameters: Number of parameters.
        work: Its work on one image.
    """

    name: str
    channels: int
    pixels: int
    parameters: int
    work: Work


def count_parts(net: ISyNet, size: int = 224) -> list[Part]:
    """Count the stages and the head of a network on one square image."""
    parts: list[Part] = []
    shape = (1, net.in_chans, size, size)
    for stage, module in zip(net.architecture.stages, net.stages, strict=True):
        work = counter.count(module, shape)
        channels, pixels = net.feature_info[len(parts)]["num_chs"], -(-shape[2] // 2)
        shape = (1, channels, pixels, pixels)
        parts.append(Part(str(stage), channels, pixels, _parameters(module), work))
    rest = Head(net.neck, net.fc, net.bn)
    work = counter.count(rest, shape)
    return [*parts, Part("head", net.num_classes or net.num_features, 1, _parameters(rest), work)]


def count_named(source: str, size: int = 224) -> Work:
    """Count a network of ours, of a file, or of another family by its name.

    Raises:
        ValueError: An unknown name; the known are listed.
    """
    if source not in PEERS:
        return count(architecture_of(source), size)
    with torch.device("meta"):
        net = PEERS[source]()
    return count(net, size)


def _parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def table_macs(module: nn.Module) -> float:
    """Operations as the table published with ISyNet counts them.

    Multiply-accumulates, plus two per element of a batch norm and one per element of a ReLU, at 244
    pixels. All ten published rows come out to both decimals.
    """
    work = count(module, TABLE_SIZE)
    norms = sum(item.elements for item in work.operators if item.name == "batch_norm")
    relus = sum(item.elements for item in work.operators if item.name == "relu")
    depthwise = sum(item.vector for item in work.operators if item.name == "depthwise")
    return work.matrix + depthwise + 2 * norms + relus
