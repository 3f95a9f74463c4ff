"""The pages that are made of records, and of nothing else: `python -m benchmarks.pages`."""
