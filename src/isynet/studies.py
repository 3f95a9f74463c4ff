"""Studies of what is predicted: latencies by tables of blocks, MEM of spaces and their twins."""

import random
from pathlib import Path
from typing import Any

import numpy as np

from isynet.architecture import Architecture
from isynet.latency import FACTOR_NETWORKS, LatencyTable
from isynet.runs import TrialFolder
from isynet.space import SearchSpace
from nabla_attn.cost.rates import Rates
from nabla_attn.progress import ProgressCallback, ignore_progress


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
