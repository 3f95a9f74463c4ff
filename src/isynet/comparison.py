"""Networks held against each other: trained alike, paired over test images and seeds."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isynet.architecture import Architecture
from isynet.data.source import ImageSource
from isynet.growth import Scaled, scale_evenly
from isynet.latency import LatencyTable
from isynet.network import ISyNet
from isynet.peers import MobileStage, mobile, regnet, resnet
from isynet.runs import TrialFolder
from isynet.training.loop import predict, train
from isynet.training.recipe import Recipe
from nabla_attn.progress import ProgressCallback, ignore_progress

SMALL_MOBILE = tuple(
    MobileStage(3, *row)
    for row in ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1))
)
"""MobileNetV2 with two strides fewer, for small images."""

ADAPTED: dict[str, Callable[[int, int], nn.Sequential]] = {
    "resnet8": lambda width, classes: resnet(
        (1, 1, 1), width=width, small_stem=True, classes=classes
    ),
    "resnet14": lambda width, classes: resnet(
        (2, 2, 2), width=width, small_stem=True, classes=classes
    ),
    "mobilenet-v2": lambda width, classes: mobile(
        SMALL_MOBILE, width=width / 32, head=10 * width, classes=classes
    ),
    "regnet": lambda width, classes: regnet(
        (width, 2 * width, 4 * width), (1, 2, 2), 8, classes=classes
    ),
}
"""Networks of others for small images: maker by width, in multiples of 8, and classes."""

WIDTHS = tuple(range(8, 129, 8))

Network = ISyNet | nn.Sequential

Maker = Callable[[int], Network]
"""A network with random weights, for a number of classes."""


def study_peers(
    architectures: Sequence[Architecture],
    source: ImageSource,
    test: ImageSource,
    table: LatencyTable,
    *,
    latency: float,
    folder: str | Path,
    recipe: Recipe,
    seeds: int = 3,
    tolerance: float = 0.03,
    on_progress: ProgressCallback = ignore_progress,
) -> list[dict[str, Any]]:
    """Train networks and the adapted networks of others at equal measured latency.

    Of each family of others the widest that stays within the latency takes part. All are trained by
    one recipe from the same seeds and tested on the same images.

    Args:
        architectures: Our networks.
        source: Training images.
        test: Test images.
        table: What measures.
        latency: Most seconds an image.
        folder: Where the records are kept.
        recipe: The training.
        seeds: Number of trainings of each network.
        tolerance: Share by which a network may exceed the latency.
        on_progress: Called after every training.

    Returns:
        For each network its measured seconds, `accuracy` and `accuracies` of the seeds; of ours
        also `ahead`, the difference from the best other, and `ahead_error`, its standard error
        over paired images and seeds. Best first.

    Raises:
        ValueError: The folder holds another study, or a network exceeds the latency.
    """
    settings = {
        "architectures": [str(each) for each in architectures],
        "images": [len(source), len(test), source.size, *source.classes],
        "conditions": vars(table.conditions),
        "latency": latency,
        "recipe": recipe.to_dict(),
        "seeds": seeds,
        "tolerance": tolerance,
    }
    trials = TrialFolder(folder, "isynet-bench-peers", settings)
    limit = latency * (1 + tolerance)
    ours = our_contenders(architectures, trials, table, limit)
    others = fitting_peers(trials, table, limit)
    makers = {name: make for name, (make, _) in (ours | others).items()}
    correct = train_and_test(makers, source, test, trials, recipe, seeds, on_progress)
    rows = [
        {
            "network": name,
            "seconds": seconds,
            "accuracy": float(correct[name].mean()),
            "accuracies": correct[name].mean(1).tolist(),
        }
        for name, (_, seconds) in (ours | others).items()
    ]
    best = max((row for row in rows if row["network"] in others), key=_accuracy, default=None)
    for row in rows:
        if best and row["network"] in ours:
            paired = correct[row["network"]] - correct[best["network"]]
            row["ahead"], row["ahead_error"] = float(paired.mean()), paired_error(paired)
    rows.sort(key=_accuracy, reverse=True)
    trials.save(trials.folder / "bench.json", settings, {"rows": rows})
    return rows


def study_scaling(
    base: Architecture,
    scaled: Sequence[Scaled],
    source: ImageSource,
    test: ImageSource,
    table: LatencyTable,
    *,
    folder: str | Path,
    recipe: Recipe,
    seeds: int = 3,
    on_progress: ProgressCallback = ignore_progress,
) -> list[dict[str, Any]]:
    """Train networks scaled by gain beside the same network deepened evenly, at each latency.

    Args:
        base: The network they were scaled from.
        scaled: What `growth.scale` made of it, one for each latency.
        source: Training images.
        test: Test images.
        table: What predicts and measures.
        folder: Where the records are kept.
        recipe: The training.
        seeds: Number of trainings of each network.
        on_progress: Called after every training.

    Returns:
        For each latency both architectures, their predicted and measured seconds and accuracies,
        `ahead`, the difference, and `ahead_error`, its standard error over paired images and seeds.

    Raises:
        ValueError: The folder holds another study.
    """
    settings = {
        "base": str(base),
        "scaled": [[str(each.architecture), each.budget] for each in scaled],
        "images": [len(source), len(test), source.size, *source.classes],
        "conditions": vars(table.conditions),
        "recipe": recipe.to_dict(),
        "seeds": seeds,
    }
    trials = TrialFolder(folder, "isynet-bench-scaling", settings)
    pairs = [
        (each.budget, each.architecture, scale_evenly(base, table, each.budget)) for each in scaled
    ]
    networks = dict.fromkeys(each for _, *pair in pairs for each in pair)
    makers = {str(each): _maker(each, source.channels) for each in networks}
    correct = train_and_test(makers, source, test, trials, recipe, seeds, on_progress)
    rows = []
    for budget, grown, even in pairs:
        row: dict[str, Any] = {"budget": budget}
        for kind, each in (("scaled", grown), ("even", even)):
            row[kind] = {
                "architecture": str(each),
                "predicted": table.seconds(each),
                "measured": measure_once(trials, table, str(each), makers[str(each)]),
                "accuracy": float(correct[str(each)].mean()),
            }
        paired = correct[str(grown)] - correct[str(even)]
        row["ahead"], row["ahead_error"] = float(paired.mean()), paired_error(paired)
        rows.append(row)
    trials.save(trials.folder / "bench.json", settings, {"rows": rows})
    return rows


def our_contenders(
    architectures: Sequence[Architecture], trials: TrialFolder, table: LatencyTable, limit: float
) -> dict[str, tuple[Maker, float]]:
    """Our networks by name: what makes them, and measured seconds an image.

    Raises:
        ValueError: One takes longer than the limit.
    """
    found = {}
    for architecture in architectures:
        name, make = str(architecture), _maker(architecture, table.conditions.in_chans)
        seconds = measure_once(trials, table, name, make)
        if seconds > limit:
            raise ValueError(
                f"{name} takes {seconds * 1e3:.4g} ms an image, more than {limit * 1e3:.4g} ms. "
                "Raise the latency."
            )
        found[name] = (make, seconds)
    return found


def fitting_peers(
    trials: TrialFolder, table: LatencyTable, limit: float, families: Sequence[str] = ()
) -> dict[str, tuple[Maker, float]]:
    """The widest network of each family of `ADAPTED` within a limit of measured seconds.

    Args:
        trials: Where measurements are kept.
        table: What measures.
        limit: Most seconds an image.
        families: Names of `ADAPTED`; all by default.

    Returns:
        What makes each and its seconds, by names such as `resnet8 32`.

    Raises:
        ValueError: An unknown family.
    """
    found: dict[str, tuple[Maker, float]] = {}
    for family in families or ADAPTED:
        if family not in ADAPTED:
            raise ValueError(f"unknown family {family[:40]!r}. Known: {', '.join(ADAPTED)}.")
        for width in reversed(WIDTHS):
            name, make = f"{family} {width}", partial(ADAPTED[family], width)
            seconds = measure_once(trials, table, name, make)
            if seconds <= limit:
                found[name] = (make, seconds)
                break
    return found


def measure_once(trials: TrialFolder, table: LatencyTable, name: str, make: Maker) -> float:
    """Measured seconds an image of a network, of the record where there is one."""

    def run() -> dict[str, Any]:
        net = make(table.conditions.num_classes).eval()
        return {"seconds": table.measure_module(net.fused() if isinstance(net, ISyNet) else net)}

    config = {"network": name}
    return float(trials.trial(f"latency-{file_name(name)}", config, run)["seconds"])


def train_and_test(
    makers: Mapping[str, Maker],
    source: ImageSource,
    test: ImageSource,
    trials: TrialFolder,
    recipe: Recipe,
    seeds: int,
    on_progress: ProgressCallback,
) -> dict[str, np.ndarray]:
    """Train every network from every seed; which test images it names, float [seeds, images]."""
    total, done = len(makers) * seeds, 0
    correct = {}
    for name, make in makers.items():
        bits = []
        for seed in range(seeds):
            run = partial(_train_one, make, source, test, recipe, seed)
            label = f"train-{file_name(name)}-{seed}"
            numbers = trials.trial(label, {"network": name, "seed": seed}, run)
            bits.append(unpack(numbers["correct"], len(test)))
            done += 1
            on_progress(name, done, total)
        correct[name] = np.stack(bits).astype(float)
    return correct


def _train_one(
    make: Maker, source: ImageSource, test: ImageSource, recipe: Recipe, seed: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = make(len(source.classes))
    losses = train(net, source, recipe, seed=seed).losses
    return {**judge_network(net, test), "losses": losses}


def judge_network(net: nn.Module, test: ImageSource) -> dict[str, Any]:
    """Accuracy on a test set, and which images were named, as `unpack` reads them."""
    logits, labels = predict(net, test)
    is_right = (logits.argmax(1) == labels).numpy()
    return {
        "accuracy": float(is_right.mean()),
        "correct": np.packbits(is_right).tobytes().hex(),
    }


def unpack(text: str, count: int) -> np.ndarray:
    """Bits of so many images, as `judge_network` wrote them."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count)


def paired_error(paired: np.ndarray) -> float:
    """Standard error of a mean over [seeds, images], which vary on their own."""
    seeds, images = paired.shape
    of_images = paired.mean(0).var(ddof=1) / images if images > 1 else 0.0
    of_seeds = paired.mean(1).var(ddof=1) / seeds if seeds > 1 else 0.0
    return float(np.sqrt(of_images + of_seeds))


def file_name(name: str) -> str:
    """A name that a file may have."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _maker(architecture: Architecture, channels: int) -> Maker:
    return lambda classes: ISyNet(architecture, classes, channels)


def _accuracy(row: Mapping[str, Any]) -> float:
    return float(row["accuracy"])
