"""Networks of other families, to compare with: shapes as published, random weights.

`PEERS` holds them by name. Each is its paper's architecture in plain PyTorch, for counting and
timing.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


class Residual(nn.Module):
    """The sum of two branches, with an activation after it."""

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut, self.after = shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, ...] to the shape of the branches."""
        return self.after(self.body(x) + self.shortcut(x))


class Concatenated(nn.Module):
    """Branches side by side along the channels; with `keeps_input` the input comes first."""

    def __init__(self, *branches: nn.Module, keeps_input: bool = False) -> None:
        super().__init__()
        self.branches, self.keeps_input = nn.ModuleList(branches), keeps_input

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width]."""
        return torch.cat([x] * self.keeps_input + [branch(x) for branch in self.branches], 1)


class SqueezeExcite(nn.Module):
    """Channels scaled by what their means say (arXiv:1709.01507)."""

    def __init__(self, channels: int, hidden: int, gate: Activation = nn.Sigmoid) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            gate(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width]."""
        return x * self.gate(x)


class Transposed(nn.Module):
    """A module that sees two dimensions swapped."""

    def __init__(self, body: nn.Module, first: int, second: int) -> None:
        super().__init__()
        self.body, self.dims = body, (first, second)

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor that has these dimensions."""
        return self.body(x.transpose(*self.dims)).transpose(*self.dims)


class SelfAttention(nn.Module):
    """Multi-head attention over [batch, tokens, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, dim]."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, dim))


class Patches(nn.Module):
    """An image as tokens with learned places."""

    def __init__(self, dim: int, size: int = 16, count: int = 196) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, size, size)
        self.places = nn.Parameter(torch.zeros(1, count, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 3, height, width] to [batch, tokens, dim]."""
        return self.embed(x).flatten(2).transpose(1, 2) + self.places


class MeanTokens(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, dim] to [batch, dim]."""
        return x.mean(1)


def conv(
    inputs: int,
    outputs: int,
    size: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: Activation | None = nn.ReLU,
) -> nn.Sequential:
    """A convolution with batch norm and activation."""
    layers = [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def resnet(
    blocks: Sequence[int],
    *,
    width: int = 64,
    bottleneck: bool = False,
    inner: float = 1.0,
    groups: int = 1,
    small_stem: bool = False,
    classes: int = 1000,
) -> nn.Sequential:
    """ResNet (arXiv:1512.03385), ResNeXt with `groups`, wide ResNet with `inner`.

    Args:
        blocks: Number of blocks of each stage.
        width: Channels of the first stage.
        bottleneck: Whether blocks are 1x1, 3x3, 1x1 with four times as many channels.
        inner: Channels of the 3x3 convolution, as a share of the stage's.
        groups: Groups of the 3x3 convolution.
        small_stem: Whether the stem is 3x3 of stride 2 without a pool, for small images.
        classes: Number of classes.
    """
    if small_stem:
        layers: list[nn.Module] = [conv(3, width, 3, 2)]
    else:
        layers = [conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, count in enumerate(blocks):
        base = width * 2**stage
        outputs, hidden = base * (4 if bottleneck else 1), int(base * inner)
        for number in range(count):
            stride = 2 if stage and number == 0 else 1
            if bottleneck:
                body = nn.Sequential(
                    conv(inputs, hidden, 1),
                    conv(hidden, hidden, 3, stride, groups),
                    conv(hidden, outputs, 1, act=None),
                )
            else:
                body = nn.Sequential(conv(inputs, base, 3, stride), conv(base, base, act=None))
            changes = stride > 1 or inputs != outputs
            shortcut = conv(inputs, outputs, 1, stride, act=None) if changes else None
            layers.append(Residual(body, shortcut, nn.ReLU()))
            inputs = outputs
    return nn.Sequential(*layers, *_head(inputs, classes))


class MobileStage(NamedTuple):
    """A stage of inverted residuals."""

    size: int
    expansion: float
    channels: int
    blocks: int
    stride: int
    squeeze: float = 0
    act: Activation = nn.ReLU6
    is_fused: bool = False


def mobile(
    stages: Sequence[MobileStage],
    *,
    stem: int = 32,
    head: int = 1280,
    width: float = 1.0,
    depth: float = 1.0,
    stem_stride: int = 2,
    classes: int = 1000,
) -> nn.Sequential:
    """MobileNetV2 (arXiv:1801.04381) and its descendants, by their stages.

    Args:
        stages: The stages.
        stem: Channels of the first convolution.
        head: Channels of the last.
        width: Factor of all channels but the head's, rounded to 8.
        depth: Factor of the numbers of blocks, rounded up.
        stem_stride: Stride of the first convolution.
        classes: Number of classes.
    """
    act = stages[-1].act
    inputs = _round(stem * width)
    layers: list[nn.Module] = [conv(3, inputs, 3, stem_stride, act=act)]
    for stage in stages:
        outputs = _round(stage.channels * width)
        for number in range(-(-int(stage.blocks * depth * 1000) // 1000)):
            stride = stage.stride if number == 0 else 1
            body = _inverted(stage, inputs, outputs, stride)
            same = stride == 1 and inputs == outputs
            layers.append(Residual(body) if same else body)
            inputs = outputs
    layers += [conv(inputs, head, 1, act=act), *_head(head, classes)]
    return nn.Sequential(*layers)


def _inverted(stage: MobileStage, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    hidden = _round(inputs * stage.expansion)
    if stage.is_fused:
        if stage.expansion == 1:
            return nn.Sequential(conv(inputs, outputs, stage.size, stride, act=stage.act))
        body = [conv(inputs, hidden, stage.size, stride, act=stage.act)]
        return nn.Sequential(*body, conv(hidden, outputs, 1, act=None))
    layers: list[nn.Module] = [conv(inputs, hidden, 1, act=stage.act)] if hidden != inputs else []
    layers.append(conv(hidden, hidden, stage.size, stride, hidden, act=stage.act))
    if stage.squeeze:
        gate = nn.Sigmoid if stage.act is nn.SiLU else nn.Hardsigmoid
        layers.append(SqueezeExcite(hidden, _round(hidden * stage.squeeze), gate))
    return nn.Sequential(*layers, conv(hidden, outputs, 1, act=None))


def mobilenet_v1(width: float = 1.0, classes: int = 1000) -> nn.Sequential:
    """MobileNet (arXiv:1704.04861)."""
    rows = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
    rows += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
    inputs = _round(32 * width)
    layers: list[nn.Module] = [conv(3, inputs, 3, 2)]
    for channels, stride in rows:
        outputs = _round(channels * width)
        layers += [conv(inputs, inputs, 3, stride, inputs), conv(inputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, *_head(inputs, classes))


def regnet(
    widths: Sequence[int],
    depths: Sequence[int],
    group_width: int,
    *,
    has_squeeze: bool = False,
    classes: int = 1000,
) -> nn.Sequential:
    """RegNetX, and RegNetY with squeeze-and-excite (arXiv:2003.13678)."""
    layers: list[nn.Module] = [conv(3, 32, 3, 2)]
    inputs = 32
    for channels, count in zip(widths, depths, strict=True):
        for number in range(count):
            stride = 2 if number == 0 else 1
            parts: list[nn.Module] = [
                conv(inputs, channels, 1),
                conv(channels, channels, 3, stride, channels // min(group_width, channels)),
            ]
            if has_squeeze:
                parts.append(SqueezeExcite(channels, inputs // 4))
            body = nn.Sequential(*parts, conv(channels, channels, 1, act=None))
            changes = stride > 1 or inputs != channels
            shortcut = conv(inputs, channels, 1, stride, act=None) if changes else None
            layers.append(Residual(body, shortcut, nn.ReLU()))
            inputs = channels
    return nn.Sequential(*layers, *_head(inputs, classes))


def vgg(blocks: Sequence[int]) -> nn.Sequential:
    """VGG with batch norm and its three linear layers (arXiv:1409.1556)."""
    layers: list[nn.Module] = []
    inputs = 3
    for count, channels in zip(blocks, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            layers.append(conv(inputs, channels))
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    sizes = pairwise((512 * 49, 4096, 4096, 1000))
    return nn.Sequential(*layers, nn.Flatten(), *(nn.Linear(*size) for size in sizes))


def densenet(blocks: Sequence[int] = (6, 12, 24, 16), growth: int = 32) -> nn.Sequential:
    """DenseNet (arXiv:1608.06993), norm after the convolution."""
    channels = 2 * growth
    layers: list[nn.Module] = [conv(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for index, count in enumerate(blocks):
        for _ in range(count):
            body = nn.Sequential(conv(channels, 4 * growth, 1), conv(4 * growth, growth))
            layers.append(Concatenated(body, keeps_input=True))
            channels += growth
        if index + 1 < len(blocks):
            layers += [conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, *_head(channels, 1000))


def convnext(depths: Sequence[int], widths: Sequence[int]) -> nn.Sequential:
    """ConvNeXt (arXiv:2201.03545)."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4)]
    inputs = widths[0]
    for stage, (count, channels) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            layers += [nn.GroupNorm(1, inputs), nn.Conv2d(inputs, channels, 2, 2)]
        for _ in range(count):
            pointwise = nn.Sequential(
                nn.LayerNorm(channels),
                nn.Linear(channels, 4 * channels),
                nn.GELU(),
                nn.Linear(4 * channels, channels),
            )
            depthwise = nn.Conv2d(channels, channels, 7, 1, 3, groups=channels)
            # The linear layers want channels last; that height and width swap too does not matter.
            layers.append(Residual(nn.Sequential(depthwise, Transposed(pointwise, 1, 3))))
        inputs = channels
    return nn.Sequential(*layers, *_head(inputs, 1000))


def vit(dim: int, heads: int, depth: int = 12) -> nn.Sequential:
    """Vision transformer of 16-pixel patches (arXiv:2010.11929), mean of tokens as its head."""
    layers: list[nn.Module] = [Patches(dim)]
    for _ in range(depth):
        layers += [
            Residual(nn.Sequential(nn.LayerNorm(dim), SelfAttention(dim, heads))),
            Residual(nn.Sequential(nn.LayerNorm(dim), _mlp(dim, 4 * dim))),
        ]
    return nn.Sequential(*layers, nn.LayerNorm(dim), MeanTokens(), nn.Linear(dim, 1000))


def mixer(dim: int = 512, depth: int = 8) -> nn.Sequential:
    """MLP-Mixer of 16-pixel patches (arXiv:2105.01601)."""
    layers: list[nn.Module] = [Patches(dim)]
    for _ in range(depth):
        tokens = Transposed(_mlp(196, dim // 2), 1, 2)
        layers += [
            Residual(nn.Sequential(nn.LayerNorm(dim), tokens)),
            Residual(nn.Sequential(nn.LayerNorm(dim), _mlp(dim, 4 * dim))),
        ]
    return nn.Sequential(*layers, nn.LayerNorm(dim), MeanTokens(), nn.Linear(dim, 1000))


def repvgg(blocks: Sequence[int], widths: Sequence[int]) -> nn.Sequential:
    """RepVGG as it runs, its branches merged (arXiv:2101.03697)."""
    layers: list[nn.Module] = []
    inputs = 3
    for count, channels in zip(blocks, widths, strict=True):
        for number in range(count):
            layers.append(conv(inputs, channels, 3, 2 if number == 0 else 1))
            inputs = channels
    return nn.Sequential(*layers, *_head(inputs, 1000))


def squeezenet() -> nn.Sequential:
    """SqueezeNet 1.1 (arXiv:1602.07360)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    inputs = 64
    for squeeze, expand, is_pooled in (
        (16, 64, False), (16, 64, True), (32, 128, False), (32, 128, True),
        (48, 192, False), (48, 192, False), (64, 256, False), (64, 256, False),
    ):  # fmt: skip
        branches = [
            nn.Sequential(nn.Conv2d(squeeze, expand, size, 1, size // 2), nn.ReLU())
            for size in (1, 3)
        ]
        layers += [nn.Conv2d(inputs, squeeze, 1), nn.ReLU(), Concatenated(*branches)]
        inputs = 2 * expand
        if is_pooled:
            layers.append(nn.MaxPool2d(3, 2))
    return nn.Sequential(*layers, nn.Conv2d(inputs, 1000, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def darknet(blocks: Sequence[int] = (1, 2, 8, 8, 4)) -> nn.Sequential:
    """Darknet-53 (arXiv:1804.02767)."""
    layers: list[nn.Module] = [conv(3, 32)]
    channels = 32
    for count in blocks:
        layers.append(conv(channels, 2 * channels, 3, 2))
        channels *= 2
        for _ in range(count):
            body = nn.Sequential(conv(channels, channels // 2, 1), conv(channels // 2, channels))
            layers.append(Residual(body))
    return nn.Sequential(*layers, *_head(channels, 1000))


def _mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def _round(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


_M, _H = MobileStage, nn.Hardswish
_R, _S = nn.ReLU, nn.SiLU
MOBILENET_V2 = tuple(
    _M(3, *row)
    for row in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )
)  # fmt: skip
MOBILENET_V3_LARGE = (
    _M(3, 1, 16, 1, 1, 0, _R), _M(3, 4, 24, 1, 2, 0, _R), _M(3, 3, 24, 1, 1, 0, _R),
    _M(5, 3, 40, 3, 2, 0.25, _R), _M(3, 6, 80, 1, 2, 0, _H), _M(3, 2.5, 80, 3, 1, 0, _H),
    _M(3, 6, 112, 2, 1, 0.25, _H), _M(5, 6, 160, 3, 2, 0.25, _H),
)  # fmt: skip
MOBILENET_V3_SMALL = (
    _M(3, 1, 16, 1, 2, 0.5, _R), _M(3, 4.5, 24, 1, 2, 0, _R), _M(3, 3.67, 24, 1, 1, 0, _R),
    _M(5, 4, 40, 3, 2, 0.25, _H), _M(5, 3, 48, 2, 1, 0.25, _H), _M(5, 6, 96, 3, 2, 0.25, _H),
)  # fmt: skip
MNASNET = tuple(
    _M(*row, 0, _R)
    for row in (
        (3, 1, 16, 1, 1), (3, 3, 24, 3, 2), (5, 3, 40, 3, 2), (5, 6, 80, 3, 2),
        (3, 6, 96, 2, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1),
    )
)  # fmt: skip
_EFFICIENTNET = (
    (3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1),
)  # fmt: skip
EFFICIENTNET = tuple(_M(*row, 0.25 / max(row[1], 1), _S) for row in _EFFICIENTNET)
EFFICIENTNET_LITE = tuple(_M(*row) for row in _EFFICIENTNET)
EFFICIENTNET_V2 = (
    _M(3, 1, 24, 2, 1, 0, _S, True), _M(3, 4, 48, 4, 2, 0, _S, True),
    _M(3, 4, 64, 4, 2, 0, _S, True), _M(3, 4, 128, 6, 2, 0.0625, _S),
    _M(3, 6, 160, 9, 1, 0.0417, _S), _M(3, 6, 256, 15, 2, 0.0417, _S),
)  # fmt: skip

PEERS: dict[str, Callable[[], nn.Module]] = {
    "resnet10": lambda: resnet((1, 1, 1, 1)),
    "resnet18": lambda: resnet((2, 2, 2, 2)),
    "resnet34": lambda: resnet((3, 4, 6, 3)),
    "resnet50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "resnet50-wide": lambda: resnet((3, 4, 6, 3), bottleneck=True, inner=2),
    "resnext50": lambda: resnet((3, 4, 6, 3), bottleneck=True, inner=2, groups=32),
    "vgg11": lambda: vgg((1, 1, 2, 2, 2)),
    "vgg16": lambda: vgg((2, 2, 3, 3, 3)),
    "densenet121": densenet,
    "mobilenet-v1": mobilenet_v1,
    "mobilenet-v1-050": lambda: mobilenet_v1(0.5),
    "mobilenet-v2": lambda: mobile(MOBILENET_V2),
    "mobilenet-v2-050": lambda: mobile(MOBILENET_V2, width=0.5),
    "mobilenet-v3-large": lambda: mobile(MOBILENET_V3_LARGE, stem=16, head=960),
    "mobilenet-v3-small": lambda: mobile(MOBILENET_V3_SMALL, stem=16, head=576),
    "mnasnet": lambda: mobile(MNASNET),
    "efficientnet-b0": lambda: mobile(EFFICIENTNET),
    "efficientnet-b2": lambda: mobile(EFFICIENTNET, width=1.1, depth=1.2, head=1408),
    "efficientnet-lite0": lambda: mobile(EFFICIENTNET_LITE),
    "efficientnet-v2-s": lambda: mobile(EFFICIENTNET_V2, stem=24),
    "regnetx-002": lambda: regnet((24, 56, 152, 368), (1, 1, 4, 7), 8),
    "regnetx-008": lambda: regnet((64, 128, 288, 672), (1, 3, 7, 5), 16),
    "regnetx-032": lambda: regnet((96, 192, 432, 1008), (2, 6, 15, 2), 48),
    "regnety-008": lambda: regnet((64, 128, 320, 768), (1, 3, 8, 2), 16, has_squeeze=True),
    "regnety-032": lambda: regnet((72, 216, 576, 1512), (2, 5, 13, 1), 24, has_squeeze=True),
    "convnext-atto": lambda: convnext((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext-nano": lambda: convnext((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnext-tiny": lambda: convnext((3, 3, 9, 3), (96, 192, 384, 768)),
    "vit-tiny": lambda: vit(192, 3),
    "vit-small": lambda: vit(384, 6),
    "mixer-s16": mixer,
    "repvgg-a0": lambda: repvgg((1, 2, 4, 14, 1), (48, 48, 96, 192, 1280)),
    "repvgg-a1": lambda: repvgg((1, 2, 4, 14, 1), (64, 64, 128, 256, 1280)),
    "squeezenet": squeezenet,
    "darknet53": darknet,
}
"""Makers of the networks, by name; the first word of a name is the family."""


def peer(name: str) -> nn.Module:
    """Make a network of another family.

    Raises:
        ValueError: An unknown name; the known are listed.
    """
    if name not in PEERS:
        raise ValueError(f"unknown network {name[:80]!r}. Known: {', '.join(PEERS)}.")
    return PEERS[name]()
