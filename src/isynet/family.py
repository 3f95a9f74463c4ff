"""The published networks, and the figures published with them."""

from dataclasses import dataclass
from pathlib import Path

from isynet.architecture import GRAMMAR, Architecture, parse
from isynet.authors_json import load_json

_N1 = "1x7+ 1x5s,1,3,5+ {}x3,3,3+w1 {}x3,1,3+e2 {}x1,1,1+"
_N3 = "1x5,7w1 {}x3,3+w1 {}x3,3s,3,3+w1 {}x3s,1,3+lw1 {}x1,1,1{}w2"

FAMILY = {
    "isynet-n0": "1x5 2x3,3+ 4x3,3,3,1+ 2x1,3+l 6x3,3,1+",
    "isynet-n1": _N1.format(4, 6, 1),
    "isynet-n1-s1": _N1.format(4, 6, 3),
    "isynet-n1-s2": _N1.format(5, 6, 6),
    "isynet-n1-s3": _N1.format(6, 8, 7),
    "isynet-n2": "1x3,7,7+ 3x5,3,3le2 4x3,3+ 17x3,1+w1 2x1,1,1+w2",
    "isynet-n3": _N3.format(5, 3, 13, 1, ""),
    "isynet-n3-s2": _N3.format(6, 6, 16, 2, "+"),
}
"""The eight architectures whose files the authors released, as strings."""


@dataclass(frozen=True)
class Published:
    """A row of the table published with ISyNet, at 1,000 classes.

    Attributes:
        parameters: Millions of parameters.
        macs: Billions of operations as the table counts them; see `isynet.counting.table_macs`.
        milliseconds: Latency of an image on Ascend 310 in a batch of 16, fp16, 224 pixels.
        top1: ImageNet accuracy of the released checkpoint, percent.
        paper_top1: The same in the paper, percent; None where it names no such network.
    """

    parameters: float
    macs: float
    milliseconds: float
    top1: float
    paper_top1: float | None = None


PUBLISHED = {
    "isynet-n0": Published(9.59, 1.13, 0.43, 75.03, 75.45),
    "resnet18": Published(11.69, 2.28, 0.63, 74.3),
    "isynet-n1": Published(7.42, 2.85, 0.72, 76.41, 76.84),
    "isynet-n1-s1": Published(7.82, 2.88, 0.74, 76.78, 77.30),
    "isynet-n1-s2": Published(8.86, 3.34, 0.83, 77.45, 77.85),
    "isynet-n1-s3": Published(10.81, 4.12, 0.97, 78.25, 78.55),
    "resnet34": Published(21.80, 4.63, 1.05, 77.95),
    "isynet-n2": Published(19.43, 4.93, 1.10, 79.07, 79.41),
    "isynet-n3": Published(20.47, 7.32, 1.55, 80.43, 80.16),
    "resnet50": Published(25.56, 5.19, 1.64, 80.18),
}
"""Source: mindspore-ai/models, research/cv/ISyNet (README, 2022), and arXiv:2109.01932."""


def find_architecture(source: str | Path | Architecture) -> Architecture:
    """The architecture that a name, a string in the grammar or an authors' JSON file stands for.

    Raises:
        ValueError: None of them; what is known is listed.
    """
    if isinstance(source, Architecture):
        return source
    if isinstance(source, Path) or source.endswith(".json"):
        return load_json(source)
    if source.strip()[:1].isdigit():
        return parse(source)
    name = source.strip().lower().replace("_", "-")
    name = name if name.startswith("isynet-") else f"isynet-{name}"
    if name not in FAMILY:
        raise ValueError(
            f"unknown network {source[:80]!r}. Known: {', '.join(FAMILY)}; or a .json file, or "
            f"{GRAMMAR}."
        )
    return parse(FAMILY[name])
