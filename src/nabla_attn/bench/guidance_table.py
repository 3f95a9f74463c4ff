"""What guidance makes of sparse errors, from the record of benchmarks/guidance_error.py."""

from nabla_attn.bench.markdown import number_table
from nabla_attn.record import RunRecord

COLUMNS = {
    "prompted": "error with the prompt",
    "free": "without",
    "guided": "guided",
    "ratio": "guided / with the prompt",
    "kept": "prompt's effect kept",
}


def guidance_table(record: RunRecord) -> list[str]:
    """A row per algorithm, and what the columns mean."""
    config, results = record.config, record.numbers["results"]
    frames, height, width = config["tokens"]
    algorithms = [f"`{each['algorithm']}`" + ", adapters" * each["adapters"] for each in results]
    return [
        f"The built-in model, {frames}x{height}x{width} tokens; every step of {config['steps']}, "
        f"guidance {config['guidance']:g}, of {len(config['prompts'])} dense videos, repeated with "
        "sparse attention on the same latents. Errors are relative L2 distances to the dense "
        "prediction, means over steps: of the prediction with the prompt, without it, and of what "
        "guidance makes of both. The two errors differ, so guidance multiplies them; a student "
        "distilled with `objective.guidance` is called once a step and has none to multiply. The "
        "prompt's effect is the difference of both predictions, and what is kept of it its sparse "
        "counterpart along the dense one: below 1 a larger guidance makes up for it, which is why "
        "the adapters bring their own.",
        "",
        *number_table("algorithm", algorithms, results, COLUMNS, 3),
    ]
