"""Training: recipes, the loop that runs them, and the stages of the built-in model."""
