"""The pages of docs/ that are generated from records alone: `python -m benchmarks.pages`."""
