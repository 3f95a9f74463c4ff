"""The network of an architecture, by the conventions of timm and torchvision."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from isynet.architecture import BASE_CHANNELS, Architecture, Stage

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a unit normal cut off at two, which the initial weights make up for."""

STAGED_SIZE = 64
"""Pixels of the image that finds where another network changes its resolution."""


class Edge(nn.Sequential):
    """One or two convolutions, a batch norm and a ReLU unless it is linear."""

    def __init__(
        self, edge: str, inputs: int, outputs: int, stride: int = 1, is_linear: bool = False
    ) -> None:
        size = int(edge[0])
        half = size // 2
        convs: list[nn.Module]
        if edge.endswith("s"):
            convs = [
                _conv(inputs, outputs, (size, 1), (stride, 1), (half, 0)),
                _conv(outputs, outputs, (1, size), (1, stride), (0, half)),
            ]
        elif edge.endswith("d"):
            convs = [
                _conv(inputs, inputs, size, stride, half, groups=inputs),
                _conv(inputs, outputs, 1),
            ]
        else:
            convs = [_conv(inputs, outputs, size, stride, half)]
        activation = [] if is_linear else [nn.ReLU(inplace=True)]
        super().__init__(*convs, nn.BatchNorm2d(outputs), *activation)

    def fuse(self) -> None:
        """Fold the batch norm into the convolution before it, in place."""
        layers: list[Any] = list(self)
        place = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d))
        layers[place - 1 : place + 1] = [_fuse(layers[place - 1], layers[place])]
        _replace(self, layers)


class Block(nn.Module):
    """Edges in a chain; with a skip the input is added to their result, and nothing follows."""

    def __init__(
        self, stage: Stage, inputs: int, hidden: int, outputs: int, is_first: bool
    ) -> None:
        super().__init__()
        last = len(stage.edges) - 1
        edges = []
        for index, edge in enumerate(stage.edges):
            width = outputs if index == last else hidden
            stride = 2 if is_first and index == 0 else 1
            edges.append(Edge(edge, inputs, width, stride, stage.is_linear and index == last))
            inputs = width
        self.edges = nn.Sequential(*edges)
        self.has_skip = stage.has_skip and not is_first

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width]; the first block of a stage halves the sides."""
        y = self.edges(x)
        return x + y if self.has_skip else y


def make_stage(index: int, stage: Stage, inputs: int) -> nn.Sequential:
    """The blocks of the stage at an index; the first takes `inputs` channels."""
    width = BASE_CHANNELS << (index + stage.width_log2)
    hidden = width * stage.expansion
    first = Block(stage, inputs, hidden, width, True)
    more = (Block(stage, width, hidden, width, False) for _ in range(stage.num_blocks - 1))
    return nn.Sequential(first, *more)


def fuse_edges(module: nn.Module) -> None:
    """Fold the batch norms of all edges into their convolutions, in place; for evaluation only."""
    for edge in module.modules():
        if isinstance(edge, Edge) and any(isinstance(x, nn.BatchNorm2d) for x in edge):
            edge.fuse()


class ISyNet(nn.Module):
    """A network of the ISyNet search space (arXiv:2109.01932).

    Outputs, parameters and initial weights are those of the authors' MindSpore code. Attributes and
    methods follow timm's conventions, so that code written for its models works with these.

    Attributes:
        architecture: What the network was made from.
        num_classes: Number of classes; 0 returns pooled features.
        num_features: Channels of `forward_features`.
        feature_info: A dictionary for each stage: `num_chs`, `reduction`, `module`.
        default_cfg: Input size and the mean and deviation of pixels, as timm names them.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        has_last_norm: bool = True,
    ) -> None:
        """Build the network with random weights.

        Args:
            architecture: The stages and the head's width.
            num_classes: Number of classes; 0 for pooled features.
            in_chans: Channels of the input.
            has_last_norm: Whether a batch norm follows the classifier, as in the authors' networks.

        Raises:
            ValueError: A negative number of classes, or no channels.
        """
        super().__init__()
        if num_classes < 0 or in_chans < 1:
            raise ValueError(
                f"a network needs 0 classes or more and a channel or more: got {num_classes} "
                f"classes and {in_chans} channels."
            )
        self.architecture = architecture
        self.in_chans, self.has_last_norm = in_chans, has_last_norm
        channels = architecture.channels
        widths = (in_chans, *channels)
        self.stages = nn.Sequential(
            *(make_stage(*item) for item in zip(count(), architecture.stages, widths, strict=False))
        )
        head = architecture.head_width
        self.neck = Edge("1", channels[-1], head) if head else nn.Identity()
        self.num_features = head or channels[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (index + 1), "module": f"stages.{index}"}
            for index, width in enumerate(channels)
        ]
        self.default_cfg: dict[str, Any] = {
            "input_size": (in_chans, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "first_conv": "stages.0.0.edges.0.0",
            "classifier": "fc",
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _init_conv(module)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one with random weights; 0 classes for features."""
        self.num_classes = num_classes
        place = next(self.stages.parameters())
        has_norm = self.has_last_norm and num_classes > 0
        fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        norm = nn.BatchNorm1d(num_classes) if has_norm else nn.Identity()
        self.fc: nn.Module
        self.bn: nn.Module
        self.fc, self.bn = fc.to(place.device, place.dtype), norm.to(place.device, place.dtype)

    def get_classifier(self) -> nn.Module:
        """The linear layer that gives the classes."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Map [batch, in_chans, height, width] to [batch, num_features, height', width'].

        Raises:
            ValueError: The input is no batch of images with `in_chans` channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"the input must be [batch, {self.in_chans}, height, width], got "
                f"{list(x.shape)}. Pass in_chans to isynet.create for other channels."
            )
        return self.neck(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to [batch, num_classes], or to their mean [batch, num_features]."""
        x = x.mean((2, 3))
        return x if pre_logits else self.bn(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, in_chans, height, width] to logits [batch, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def fused(self) -> "ISyNet":
        """A copy for inference whose batch norms are folded into the layers before them."""
        result = copy.deepcopy(self).eval()
        fuse_edges(result)
        if isinstance(result.bn, nn.BatchNorm1d):
            result.fc, result.bn = _fuse(result.fc, result.bn), nn.Identity()
        return result


class Head(nn.Module):
    """What follows the stages, on its own.

    Attributes:
        neck: From maps to maps.
        fc: From their mean to classes.
        bn: From classes to classes.
    """

    def __init__(self, neck: nn.Module, fc: nn.Module, bn: nn.Module | None = None) -> None:
        super().__init__()
        self.neck, self.fc, self.bn = neck, fc, bn or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to [batch, classes]."""
        return self.bn(self.fc(self.neck(x).mean((2, 3))))


class Staged(nn.Module):
    """Another network's layers, in one stage for each resolution.

    Attributes:
        stages: The stages.
        feature_info: A dictionary for each stage: `num_chs`, `reduction`.
    """

    def __init__(self, net: nn.Sequential, in_chans: int = 3) -> None:
        """Cut a sequence where the resolution changes; the weights are shared with it.

        Args:
            net: Layers of images, with a global pool after the last of them.
            in_chans: Channels of the images.
        """
        super().__init__()
        stages: list[list[nn.Module]] = []
        self.feature_info: list[dict[str, int]] = []
        x = torch.zeros(1, in_chans, STAGED_SIZE, STAGED_SIZE)
        net.eval()
        for layer in net:
            with torch.no_grad():
                x = layer(x)
            if x.dim() != 4 or x.shape[-1] == 1:
                break
            info = {"num_chs": x.shape[1], "reduction": STAGED_SIZE // x.shape[-1]}
            if self.feature_info and self.feature_info[-1]["reduction"] == info["reduction"]:
                stages[-1].append(layer)
                self.feature_info[-1] = info
            else:
                stages.append([layer])
                self.feature_info.append(info)
        self.stages = nn.Sequential(*(nn.Sequential(*layers) for layers in stages))


class FeatureMaps(nn.Module):
    """The stages of a network as a backbone.

    The forward returns an ordered dictionary of maps, which torchvision's detectors take, or a
    list, as timm's `features_only` models do.

    Attributes:
        channels: Channels of each map.
        reductions: Pixels of the input per pixel of each map.
    """

    def __init__(
        self,
        net: ISyNet | Staged,
        out_indices: Sequence[int] | None = None,
        *,
        as_list: bool = False,
    ) -> None:
        """Take the stages of a network; the weights are shared with it.

        Args:
            net: The network.
            out_indices: Stages whose maps are returned; all by default.
            as_list: Whether the forward returns a list.

        Raises:
            ValueError: No such stage.
        """
        super().__init__()
        number = len(net.stages)
        indices = tuple(range(number)) if out_indices is None else tuple(out_indices)
        if not indices or not all(-number <= index < number for index in indices):
            raise ValueError(f"out_indices must name stages 0 to {number - 1}, got {indices}.")
        self.out_indices = tuple(sorted(index % number for index in indices))
        # What follows the last map that is wanted is never run.
        self.stages = nn.Sequential(*list(net.stages)[: self.out_indices[-1] + 1])
        self.feature_info = [net.feature_info[index] for index in self.out_indices]
        self.channels = tuple(info["num_chs"] for info in self.feature_info)
        self.reductions = tuple(info["reduction"] for info in self.feature_info)
        self.as_list = as_list

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor] | list[Tensor]":
        """Map [batch, channels, height, width] to maps by the number of their stage."""
        maps = OrderedDict()
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                maps[str(index)] = x
        return list(maps.values()) if self.as_list else maps


def _conv(inputs: int, outputs: int, size: Any, stride: Any = 1, padding: Any = 0, **more: Any):
    return nn.Conv2d(inputs, outputs, size, stride, padding, bias=False, **more)


def _fuse(layer: Any, norm: Any) -> nn.Module:
    fuse = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
    return fuse(layer, norm)


def _init_conv(conv: nn.Conv2d) -> None:
    std = conv.weight[0].numel() ** -0.5 / TRUNCATED_STD
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def _replace(sequence: nn.Sequential, layers: Sequence[nn.Module]) -> None:
    for name in list(sequence._modules):
        del sequence._modules[name]
    sequence.extend(layers)
