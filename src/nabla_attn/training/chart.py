"""The chart of a run: training and validation loss over steps."""

from pathlib import Path

from nabla_attn.files import whole_file

Curve = list[tuple[int, float]]


def draw_losses(training: Curve, validation: Curve, path: Path) -> None:
    """Write the chart as PNG, whole or not at all.

    Args:
        training: (step, loss) of the training steps; drawn with its running mean.
        validation: (step, loss) of the held-out clips.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="#b8c4d0", linewidth=0.8, label="training, each step")
        axes.plot(steps, _running_mean(losses), color="#1b1f24", label="training, running mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#0f766e", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if all(loss > 0 for _, loss in [*training, *validation]):
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    if training or validation:
        axes.legend(frameon=False)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """Mean over a twentieth of the run up to each value."""
    width = max(1, len(values) // 20)
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - width) : end]
        means.append(sum(part) / len(part))
    return means
