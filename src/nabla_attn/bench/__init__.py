"""Benchmarks: check the output, then time, then record. Decides nothing."""
