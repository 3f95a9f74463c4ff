"""What ISyNet's tables can say without timing: `python -m benchmarks.isynet_counts FILE`."""

import sys
from typing import Any

import torch

from isynet.checkpoint import create
from isynet.counting import count, count_named, table_macs
from isynet.family import FAMILY, PUBLISHED
from isynet.network import ISyNet
from isynet.peers import PEERS
from isynet.space import SearchSpace
from isynet.studies import study_spaces
from nabla_attn.bench.suite import make_record
from nabla_attn.cost.rates import ASCEND310, fit_rates
from nabla_attn.cost.work import Work

CPU = torch.device("cpu")
TERMS = ("matrix", "moved", "kernels")


def count_networks() -> list[dict[str, Any]]:
    """Count the eight networks: parameters with the last batch norm folded, MACs and MEM."""
    rows = []
    for name in FAMILY:
        with torch.device("meta"):
            net = create(name)
        work = count(net)
        rows.append(
            {
                "name": name,
                "parameters": _parameters(net),
                "macs": work.matrix + _depthwise(work),
                "table_macs": table_macs(net),
                "mem": work.mem,
                "ascend310_mem": ASCEND310.mem(work),
            }
        )
    return rows


def count_peers() -> list[dict[str, Any]]:
    """Count the networks of other families."""
    rows = []
    for name in PEERS:
        work = count_named(name)
        macs = work.matrix + _depthwise(work)
        rows.append(
            {"name": name, "macs": macs, "mem": work.mem, "ascend310_mem": ASCEND310.mem(work)}
        )
    return rows


def predict_published() -> list[dict[str, Any]]:
    """Predict each published latency by rates that were fitted to the others."""
    works = [count_named(name) for name in PUBLISHED]
    seconds = [row.milliseconds / 1e3 for row in PUBLISHED.values()]
    fit = fit_rates("ascend310", works, seconds, list(PUBLISHED), terms=TERMS, tiles=[(16, 16)])
    return [
        {"name": name, "published": published, "predicted": predicted, "error": error}
        for name, published, predicted, error in zip(
            PUBLISHED, seconds, fit.predicted.tolist(), fit.errors.tolist(), strict=True
        )
    ]


def count_spaces(samples: int = 60) -> list[dict[str, Any]]:
    """Judge the search space of five stages and its depthwise twin at 224 pixels."""
    return [
        {"machine": name, **row}
        for name, rates in (("plain", None), ("ascend310", ASCEND310))
        for row in study_spaces(SearchSpace((5,)), samples=samples, rates=rates)
    ]


def main(output: str) -> None:
    """Count everything and save the record."""
    results = [
        {
            "networks": count_networks(),
            "peers": count_peers(),
            "published": predict_published(),
            "spaces": count_spaces(),
        }
    ]
    make_record("isynet-counts", {"size": 224, "samples": 60}, results, CPU).save(output)


def _parameters(net: ISyNet) -> int:
    last_norm = sum(value.numel() for value in net.bn.parameters())
    return sum(value.numel() for value in net.parameters()) - last_norm


def _depthwise(work: Work) -> float:
    return sum(item.vector for item in work.operators if item.name == "depthwise")


if __name__ == "__main__":
    main(*sys.argv[1:])
