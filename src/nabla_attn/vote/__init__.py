"""Blind side-by-side studies: raters do not know which video comes from which algorithm."""
