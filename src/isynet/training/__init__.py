"""Training of classifiers by the published recipe."""
