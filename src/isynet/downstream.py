"""What a network's features are worth elsewhere: few pictures of another kind, and boxes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isynet.architecture import Architecture
from isynet.comparison import (
    Maker,
    Network,
    file_name,
    fitting_peers,
    judge_network,
    our_contenders,
    paired_error,
    unpack,
)
from isynet.data.source import ImageSource, ObjectSource
from isynet.detection.network import Detector
from isynet.detection.precision import average_precision
from isynet.detection.train import find_objects, train_detector
from isynet.latency import LatencyTable
from isynet.network import ISyNet, Staged
from isynet.runs import TrialFolder
from isynet.training.loop import train
from isynet.training.recipe import Recipe
from isynet.training.trial import Subset
from nabla_attn.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True)
class DownstreamData:
    """Sets of images: one to learn features from, and two that the features serve.

    Attributes:
        train: Images that features are learnt from.
        test: Test images of the same kind.
        few: Training images of another kind, with as many channels; `shots` of a class are used.
        few_test: Their test images.
        objects: Training images with boxes.
        objects_test: Test images with boxes.
    """

    train: ImageSource
    test: ImageSource
    few: ImageSource
    few_test: ImageSource
    objects: ObjectSource
    objects_test: ObjectSource


@dataclass(frozen=True)
class DownstreamPlan:
    """How long the trainings are.

    Attributes:
        train: The training of features.
        transfer: The fine-tuning on few images.
        detect: The training of a detector.
        shots: Images of each class to fine-tune on.
        test_images: Images with boxes that the test takes.
        seeds: Number of trainings of each network.
    """

    train: Recipe
    transfer: Recipe
    detect: Recipe
    shots: int = 10
    test_images: int = 1000
    seeds: int = 3

    def __post_init__(self) -> None:
        if min(self.shots, self.test_images, self.seeds) < 1:
            raise ValueError("shots, test_images and seeds must be 1 or more.")


def study_downstream(
    architectures: Sequence[Architecture],
    data: DownstreamData,
    table: LatencyTable,
    *,
    latency: float,
    families: Sequence[str],
    folder: str | Path,
    plan: DownstreamPlan,
    tolerance: float = 0.03,
    on_progress: ProgressCallback = ignore_progress,
) -> list[dict[str, Any]]:
    """Compare networks of equal measured latency on all that they are for.

    Each learns from the training images; its features then name few images of another kind, and
    find boxes. All recipes, seeds and images are the same.

    Args:
        architectures: Our networks, of three stages or more.
        data: The sets of images.
        table: What measures.
        latency: Most seconds an image, as a classifier.
        families: Families of others that take part, each as wide as the latency allows.
        folder: Where the records are kept.
        plan: How long the trainings are.
        tolerance: Share by which a network may exceed the latency.
        on_progress: Called after every training of a network.

    Returns:
        For each network its `seconds` and the means over seeds of `accuracy`, `transfer` and
        `ap50`, with the values of the seeds under `seeds`; of ours also `ahead`, for each of the
        three the difference from the best other and its standard error.

    Raises:
        ValueError: The folder holds another study, a network exceeds the latency, or the few
            images have another number of channels.
        ImportError: Pycocotools is missing.
    """
    if data.few.channels != data.train.channels:
        raise ValueError(
            f"the few images must have {data.train.channels} channels as the training images: got "
            f"{data.few.channels}."
        )
    settings = {
        "architectures": [str(each) for each in architectures],
        "images": [len(data.train), len(data.few), len(data.objects), data.train.size],
        "conditions": vars(table.conditions),
        "latency": latency,
        "families": list(families),
        "plan": asdict(plan),
        "tolerance": tolerance,
    }
    trials = TrialFolder(folder, "isynet-bench-downstream", settings)
    limit = latency * (1 + tolerance)
    ours = our_contenders(architectures, trials, table, limit)
    contenders = ours | fitting_peers(trials, table, limit, families)
    found: dict[str, list[dict[str, Any]]] = {}
    total, done = len(contenders) * plan.seeds, 0
    for name, (make, _) in contenders.items():
        found[name] = []
        for seed in range(plan.seeds):
            run = partial(_learn_and_use, make, data, plan, seed)
            config = {"network": name, "seed": seed}
            found[name].append(trials.trial(f"{file_name(name)}-{seed}", config, run))
            done += 1
            on_progress(name, done, total)
    rows = [
        {"network": name, "seconds": contenders[name][1], **_means(values)}
        for name, values in found.items()
    ]
    _compare(rows, set(ours), found, {"accuracy": len(data.test), "transfer": len(data.few_test)})
    trials.save(trials.folder / "bench.json", settings, {"rows": rows})
    return rows


def _learn_and_use(
    make: Maker, data: DownstreamData, plan: DownstreamPlan, seed: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = make(len(data.train.classes))
    train(net, data.train, plan.train, seed=seed)
    first = judge_network(net, data.test)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    second = _transfer(net, data, plan, seed)
    net = make(len(data.train.classes))
    net.load_state_dict(weights)
    precision = _detect(net, data, plan, seed)
    return {
        "accuracy": first["accuracy"],
        "accuracy_correct": first["correct"],
        "transfer": second["accuracy"],
        "transfer_correct": second["correct"],
        **precision,
    }


def _transfer(
    net: Network, data: DownstreamData, plan: DownstreamPlan, seed: int
) -> dict[str, Any]:
    few = Subset(data.few, _first_of_each(data.few, plan.shots))
    torch.manual_seed(seed)
    _replace_classifier(net, len(data.few.classes))
    train(net, few, plan.transfer, seed=seed)
    return judge_network(net, data.few_test)


def _detect(
    net: Network, data: DownstreamData, plan: DownstreamPlan, seed: int
) -> dict[str, float]:
    torch.manual_seed(seed)
    backbone = net if isinstance(net, ISyNet) else Staged(net, data.objects.channels)
    detector = Detector(backbone, data.objects.classes)
    train_detector(detector, data.objects, plan.detect, seed=seed)
    found, wanted, _ = find_objects(detector, data.objects_test, limit=plan.test_images)
    return average_precision(found, wanted, len(data.objects.classes))


def _first_of_each(source: ImageSource, shots: int) -> Tensor:
    """Indices of the first images of each class."""
    generator = torch.Generator().manual_seed(0)
    _, labels = source.draw(torch.arange(len(source)), generator, is_training=False)
    return torch.cat([torch.where(labels == label)[0][:shots] for label in labels.unique()])


def _replace_classifier(net: Network, classes: int) -> None:
    if isinstance(net, ISyNet):
        net.reset_classifier(classes)
        return
    assert isinstance(net[-1], nn.Linear)
    net[-1] = nn.Linear(net[-1].in_features, classes)


def _means(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("accuracy", "transfer", "ap50")
    seeds = {name: [value[name] for value in values] for name in names}
    return {name: float(np.mean(each)) for name, each in seeds.items()} | {"seeds": seeds}


def _compare(
    rows: list[dict[str, Any]],
    ours: set[str],
    found: dict[str, list[dict[str, Any]]],
    images: dict[str, int],
) -> None:
    """Add to our rows the difference from the best other in each measure, and its error."""
    others = [row for row in rows if row["network"] not in ours]
    for row in rows:
        if row["network"] not in ours or not others:
            continue
        row["ahead"] = {}
        for measure in ("accuracy", "transfer", "ap50"):
            best = max(others, key=lambda other: other[measure])["network"]
            pair = [found[name] for name in (row["network"], best)]
            if measure in images:
                own, other = (
                    np.stack([unpack(v[f"{measure}_correct"], images[measure]) for v in values])
                    for values in pair
                )
                paired = own.astype(float) - other
            else:
                # Average precision belongs to a set of images and not to one.
                own, other = (np.array([[v[measure]] for v in values]) for values in pair)
                paired = own - other
            row["ahead"][measure] = {
                "over": best, "mean": float(paired.mean()), "error": paired_error(paired)
            }  # fmt: skip
