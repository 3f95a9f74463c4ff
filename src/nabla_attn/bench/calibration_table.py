"""What calibrated schedules gain, from the record of benchmarks/calibrate_builtin.py."""

from nabla_attn.bench.markdown import table
from nabla_attn.record import RunRecord

HEAD = ["density asked for", "algorithm", "density", "error in calibration", "SSIM", "all right"]


def calibration_table(record: RunRecord) -> list[str]:
    """A row for each schedule, and what its layers use."""
    config, results = record.config, record.numbers["results"]
    frames, height, width = config["tokens"]
    rows = [
        [
            f"{result['budget']:g}",
            result["name"],
            f"{result['density']:.3f}",
            f"{result['predicted']['error']:.4f}",
            f"{result['ssim']:.4f}",
            f"{result['right']:.0%}",
        ]
        for result in results
    ]
    used = [
        f"- Calibrated at {result['budget']:g}, layer by layer: {', '.join(result['layers'])}."
        for result in results
        if result["name"] == "calibrated"
    ]
    return [
        f"The built-in model, {frames}x{height}x{width} tokens, {config['steps']} steps; "
        f"calibrated on {config['calibrated']} held-out prompts, compared with dense attention on "
        f"{config['prompts']} others. *Error in calibration*: of attention's output, mean over "
        "sampled tokens, steps and layers of runs that keep everything. *All right*: videos in "
        "which the judge finds nothing wrong. The first row that is one algorithm in all layers is "
        "the one of least error among the candidates.",
        "",
        *table(HEAD, rows),
        *used,
    ]
