"""Studies that hold the package to its claims, each resumable and made of records.

How well block tables predict, what MEM says of a space and its depthwise twin, and whether a
network beats the networks of others that are adapted to the same latency.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isynet.architecture import Architecture
from isynet.data.source import ImageSource
from isynet.latency import FACTOR_NETWORKS, LatencyTable
from isynet.network import ISyNet
from isynet.peers import MobileStage, mobile, regnet, resnet
from isynet.runs import TrialFolder
from isynet.space import SearchSpace
from isynet.training.loop import predict, train
from isynet.training.recipe import Recipe
from nabla_attn.cost.rates import Rates
from nabla_attn.progress import ProgressCallback, ignore_progress

SMALL_MOBILE = tuple(
    MobileStage(3, *row)
    for row in ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1))
)
"""MobileNetV2 with two strides fewer, for small images."""

ADAPTED: dict[str, Callable[[int, int], nn.Module]] = {
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


def study_table(
    space: SearchSpace,
    table: LatencyTable,
    *,
    folder: str | Path,
    count: int = 30,
    seed: int = 0,
    on_progress: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Predict the latency of networks the table has not seen, and measure them.

    Args:
        space: Where the networks are drawn from.
        table: The table; its factor is fitted to other networks first.
        folder: Where the records are kept.
        count: Number of networks.
        seed: Seed of the draws.
        on_progress: Called after every network.

    Returns:
        `rows` with predicted and measured seconds, and `median_error`, `max_error`, `spearman`.
    """
    from scipy.stats import spearmanr

    settings = {
        "space": space.to_dict(),
        "conditions": vars(table.conditions),
        "count": count,
        "seed": seed,
    }
    trials = TrialFolder(folder, "isynet-bench-latency", settings)
    rng = random.Random(seed)
    fitted = [space.sample(rng) for _ in range(FACTOR_NETWORKS)]
    if table.factor is None:
        table.fit_factor(fitted)
    rows = []
    for number in range(count):
        architecture = space.sample(rng)

        def run(architecture: Architecture = architecture) -> dict[str, Any]:
            predicted = table.seconds(architecture)
            return {"predicted": predicted, "measured": table.measure(architecture)}

        config = {"architecture": str(architecture)}
        rows.append(config | trials.trial(f"{number:03d}", config, run))
        on_progress(str(architecture), number + 1, count)
    predicted = np.array([row["predicted"] for row in rows])
    measured = np.array([row["measured"] for row in rows])
    errors = np.abs(predicted / measured - 1)
    result = {
        "rows": rows,
        "median_error": float(np.median(errors)),
        "max_error": float(errors.max()),
        "spearman": float(spearmanr(predicted, measured)[0]),
    }
    return trials.save(trials.folder / "bench.json", settings, result)


def study_spaces(
    space: SearchSpace, *, size: int = 224, samples: int = 60, rates: Rates | None = None
) -> list[dict[str, Any]]:
    """MEM of a space and of its depthwise twin: mean, and the quantiles 0.1, 0.5 and 0.9."""
    rows = []
    for name, each in (("the space", space), ("its depthwise twin", space.twin())):
        mem = each.mem(samples, size=size, rates=rates)
        quantiles = {f"q{share}": mem.quantile(share) for share in (0.1, 0.5, 0.9)}
        rows.append({"space": name, "mean MEM": mem.mean, **quantiles})
    return rows


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
    conditions = table.conditions
    settings = {
        "architectures": [str(each) for each in architectures],
        "images": [len(source), len(test), source.size, *source.classes],
        "conditions": vars(conditions),
        "latency": latency,
        "recipe": recipe.to_dict(),
        "seeds": seeds,
        "tolerance": tolerance,
    }
    trials = TrialFolder(folder, "isynet-bench-peers", settings)
    limit = latency * (1 + tolerance)
    makers: dict[str, Callable[[], nn.Module]] = {}
    seconds: dict[str, float] = {}
    for architecture in architectures:
        name = str(architecture)
        makers[name] = partial(ISyNet, architecture, len(source.classes), source.channels)
        seconds[name] = _measure(trials, table, name, makers[name])
        if seconds[name] > limit:
            raise ValueError(
                f"{name} takes {seconds[name] * 1e3:.4g} ms an image, more than the latency of "
                f"{latency * 1e3:.4g} ms. Raise the latency."
            )
    ours = tuple(makers)
    for family, make in ADAPTED.items():
        for width in reversed(WIDTHS):
            name = f"{family} {width}"
            taken = _measure(trials, table, name, partial(make, width, len(source.classes)))
            if taken <= limit:
                makers[name] = partial(make, width, len(source.classes))
                seconds[name] = taken
                break
    correct: dict[str, np.ndarray] = {}
    total, done = len(makers) * seeds, 0
    for name, maker in makers.items():
        bits = []
        for seed in range(seeds):
            run = partial(_train_and_test, maker, source, test, recipe, seed)
            label = f"train-{_file_name(name)}-{seed}"
            numbers = trials.trial(label, {"network": name, "seed": seed}, run)
            bits.append(_unpack(numbers["correct"], len(test)))
            done += 1
            on_progress(name, done, total)
        correct[name] = np.stack(bits).astype(float)
    rows = [
        {
            "network": name,
            "seconds": seconds[name],
            "accuracy": float(correct[name].mean()),
            "accuracies": correct[name].mean(1).tolist(),
        }
        for name in makers
    ]
    others = [row for row in rows if row["network"] not in ours]
    best = max(others, key=lambda row: row["accuracy"]) if others else None
    for row in rows:
        if best and row["network"] in ours:
            paired = correct[row["network"]] - correct[best["network"]]
            row["ahead"], row["ahead_error"] = float(paired.mean()), _paired_error(paired)
    rows.sort(key=lambda row: -row["accuracy"])
    trials.save(trials.folder / "bench.json", settings, {"rows": rows})
    return rows


def _measure(
    trials: TrialFolder, table: LatencyTable, name: str, make: Callable[[], nn.Module]
) -> float:
    def run() -> dict[str, Any]:
        net = make().eval()
        return {"seconds": table.measure_module(net.fused() if isinstance(net, ISyNet) else net)}

    config = {"network": name}
    return float(trials.trial(f"latency-{_file_name(name)}", config, run)["seconds"])


def _train_and_test(
    make: Callable[[], nn.Module],
    source: ImageSource,
    test: ImageSource,
    recipe: Recipe,
    seed: int,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = make()
    losses = train(net, source, recipe, seed=seed).losses
    logits, labels = predict(net, test)
    is_right = (logits.argmax(1) == labels).numpy()
    accuracy = float(is_right.mean())
    return {
        "accuracy": accuracy,
        "losses": losses,
        "correct": np.packbits(is_right).tobytes().hex(),
    }


def _unpack(text: str, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count)


def _paired_error(paired: np.ndarray) -> float:
    """Standard error of a mean over seeds and images, which vary on their own."""
    seeds, images = paired.shape
    of_images = paired.mean(0).var(ddof=1) / images if images > 1 else 0.0
    of_seeds = paired.mean(1).var(ddof=1) / seeds if seeds > 1 else 0.0
    return float(np.sqrt(of_images + of_seeds))


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
