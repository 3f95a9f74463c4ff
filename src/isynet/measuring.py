"""This machine measured: networks of many families timed, and `Rates` fitted to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isynet.checkpoint import create
from isynet.counting import count
from isynet.family import FAMILY
from isynet.latency import Timer, make_timer
from isynet.network import ISyNet
from isynet.peers import PEERS
from isynet.runs import TrialFolder
from nabla_attn.cost.rates import Rates, fit_rates
from nabla_attn.cost.work import Work
from nabla_attn.progress import ProgressCallback, ignore_progress

NETWORKS = (*FAMILY, *PEERS)


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network that was timed.

    Attributes:
        name: The network.
        family: What is left out together when rates are judged.
        work: Its work on one image.
        seconds: Seconds an image.
    """

    name: str
    family: str
    work: Work
    seconds: float

    @property
    def macs_per_second(self) -> float:
        """Matrix multiply-accumulates a second: the rate achieved."""
        return self.work.matrix / self.seconds


@dataclass(frozen=True)
class Study:
    """MEM against achieved rates.

    Attributes:
        rates: The machine's rates, fitted to all networks.
        rows: Plain numbers of each network: `name`, `seconds`, `macs_per_second`, `plain_mem`,
            `timed_mem` (by rates fitted without its family) and `predicted_seconds`.
        plain_spearman: Rank correlation of plain MEM with the achieved rate.
        timed_spearman: The same of timed MEM.
    """

    rates: Rates
    rows: list[dict[str, Any]]
    plain_spearman: float
    timed_spearman: float


def measure_networks(
    names: Sequence[str],
    *,
    folder: str | Path,
    size: int = 224,
    batch: int = 16,
    runtime: str = "onnxruntime",
    timer: Timer | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> list[MeasuredNetwork]:
    """Time networks on the CPU; each is recorded when it is done, and not timed again.

    Args:
        names: Published networks, and those of `isynet.peers`.
        folder: Where the records are kept.
        size: Pixels of the images; networks of patches need 224.
        batch: Images of a batch.
        runtime: `onnxruntime` or `torch`.
        timer: What measures, by default CPU seconds of the runtime on one thread.
        on_progress: Called after every network.

    Raises:
        ValueError: An unknown name, or the folder holds measurements under other conditions.
    """
    for name in names:
        if name not in NETWORKS:
            raise ValueError(f"unknown network {name[:80]!r}. Known: {', '.join(NETWORKS)}.")
    timer = timer or make_timer(runtime)
    settings = {"size": size, "batch": batch, "runtime": runtime}
    trials = TrialFolder(folder, "isynet-measure", settings)
    results = []
    for done, name in enumerate(names):
        with torch.device("meta"):
            net = _make(name)
        work = count(net, size)

        def run(name: str = name) -> dict[str, Any]:
            net = _make(name).eval()
            plain = net.fused() if isinstance(net, ISyNet) else net
            return {"seconds": timer({"net": plain}, (batch, 3, size, size))["net"] / batch}

        numbers = trials.trial(name, {"network": name}, run)
        family = "isynet" if name in FAMILY else name.split("-")[0].rstrip("0123456789")
        results.append(MeasuredNetwork(name, family, work, numbers["seconds"]))
        on_progress(name, done + 1, len(names))
    return results


def study(measured: Sequence[MeasuredNetwork], name: str, *, batch: int, source: str) -> Study:
    """Fit rates to measured networks, and compare MEM with what they achieve.

    Raises:
        ValueError: Fewer than two families, or seconds that do not grow with matrix work.
    """
    from scipy.stats import spearmanr

    works = [each.work for each in measured]
    fit = fit_rates(
        name,
        works,
        [each.seconds for each in measured],
        [each.family for each in measured],
        batch=batch,
        source=source,
    )
    achieved = np.array([each.macs_per_second for each in measured])
    plain = np.array([work.mem for work in works])
    useful = fit.rates.matrix * np.array([work.matrix for work in works])
    timed = useful / fit.predicted
    rows = [
        {
            "name": each.name,
            "family": each.family,
            "seconds": each.seconds,
            "predicted_seconds": float(fit.predicted[place]),
            "macs_per_second": each.macs_per_second,
            "plain_mem": float(plain[place]),
            "timed_mem": float(timed[place]),
        }
        for place, each in enumerate(measured)
    ]
    return Study(
        fit.rates,
        rows,
        float(spearmanr(plain, achieved)[0]),
        float(spearmanr(timed, achieved)[0]),
    )


def _make(name: str) -> torch.nn.Module:
    return PEERS[name]() if name in PEERS else create(name)
