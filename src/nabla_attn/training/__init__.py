"""Training: one trainer for any supported pipeline, and the making of the built-in model."""
