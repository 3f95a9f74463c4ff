"""Pictures of networks and searches: MEM by part, accuracy against milliseconds."""

from collections.abc import Sequence
from pathlib import Path

from isynet.counting import count_parts
from isynet.evolution import Candidate
from isynet.network import ISyNet
from nabla_attn.files import whole_file


def draw_mem(net: ISyNet, path: str | Path, *, size: int = 224) -> None:
    """Draw plain MEM and the share of the matrix work of each part of a network as bars, PNG."""
    parts = count_parts(net, size)
    total = sum(part.work.matrix for part in parts)
    figure, axes = _figure()
    places = range(len(parts))
    axes.bar([place - 0.2 for place in places], [part.work.mem for part in parts], 0.4, label="MEM")
    axes.set_ylabel("plain MEM")
    share = axes.twinx()
    shares = [100 * part.work.matrix / total for part in parts]
    share.bar([place + 0.2 for place in places], shares, 0.4, color="C1")
    share.set_ylabel("share of the matrix work, %", color="C1")
    axes.set_xticks(list(places), [part.name for part in parts], rotation=20, ha="right")
    axes.set_title(f"{net.architecture}, {size} pixels", fontsize=9)
    _save(figure, path)


def draw_front(candidates: Sequence[Candidate], path: str | Path) -> None:
    """Draw accuracy against predicted milliseconds of what a search tried, PNG.

    Colours tell the length of training; a line joins those that nothing quicker beats.
    """
    figure, axes = _figure()
    for rung in sorted({each.rung for each in candidates}):
        own = [each for each in candidates if each.rung == rung]
        axes.scatter(
            [each.seconds * 1e3 for each in own],
            [100 * each.accuracy for each in own],
            label=f"training length {rung + 1}",
            s=18,
        )
    front = find_front([each for each in candidates if each.rung == candidates[0].rung])
    milliseconds = [each.seconds * 1e3 for each in front]
    axes.plot(milliseconds, [100 * each.accuracy for each in front], color="0.5", lw=1)
    axes.set_xlabel("predicted ms an image")
    axes.set_ylabel("accuracy on held-out images, %")
    axes.legend()
    _save(figure, path)


def find_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no quicker one equals in accuracy, quickest first."""
    front: list[Candidate] = []
    for each in sorted(candidates, key=lambda each: (each.seconds, -each.accuracy)):
        if not front or each.accuracy > front[-1].accuracy:
            front.append(each)
    return front


def _figure():  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()


def _save(figure, path: str | Path) -> None:  # type: ignore[no-untyped-def]
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
