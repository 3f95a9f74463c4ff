"""Write the generated pages of docs/ again from the records: `python -m benchmarks.pages`."""

from pathlib import Path

import typer

from benchmarks.pages import correctness, isynet, methods, models, quality, samples, speed, training
from nabla_attn.files import write_text


def main(docs: Path = Path("docs"), records: Path = Path("benchmarks/results")) -> None:
    """Write benchmarks.md with its charts, correctness.md, training_study.md, and tables of others.

    Args:
        docs: The folder of the pages.
        records: The folder of the records.
    """
    write_text(docs / "benchmarks.md", speed.build_page(records, docs))
    write_text(docs / "correctness.md", correctness.build_page(records))
    write_text(docs / "training_study.md", training.build_page(records))
    if (records / "quality").is_dir():
        quality.write_page(docs / "quality.md", records)
    samples.write_page(docs / "samples.md", records)
    if (docs / "models.md").exists():
        models.write_table(docs / "models.md")
    if (docs / "methods.md").exists():
        methods.write_parts(docs / "methods.md", records)
    if (docs / "isynet.md").exists():
        isynet.write_tables(docs / "isynet.md", records)


if __name__ == "__main__":
    typer.run(main)
