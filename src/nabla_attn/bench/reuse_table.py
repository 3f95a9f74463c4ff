"""What map reuse costs, from the record of benchmarks/map_reuse.py."""

from nabla_attn.bench.markdown import number_table
from nabla_attn.record import RunRecord

COLUMNS = {
    "density": "density",
    "recall": "recall",
    "layer_error": "error of a layer",
    "true_mass": "true mass",
    "error_to_dense": "error to dense",
    "latents_to_fresh": "final latents, to fresh",
    "latents_to_dense": "to dense",
}


def reuse_table(record: RunRecord) -> list[str]:
    """A row per schedule, and what the columns mean."""
    config, results = record.config, record.numbers["results"]
    frames, height, width = config["tokens"]
    return [
        f"The built-in model, {frames}x{height}x{width} tokens, {config['steps']} steps, guidance "
        f"{config['guidance']:g}, {len(config['prompts'])} prompts; means over all calls, layers "
        "and heads. *Recall*: share of the blocks of a fresh map that the reused one keeps. *Error "
        "of a layer*: relative L2 distance of a layer's output to that with a fresh map of the "
        "same tokens. *True mass*: probability of exact attention inside the kept blocks. *Error "
        "to dense*: that of the output to exact attention, per token. *Final latents*: relative L2 "
        "distance to those of the run with fresh maps, and of the dense run.",
        "",
        *number_table("schedule", [result["rule"] for result in results], results, COLUMNS, 4),
    ]
