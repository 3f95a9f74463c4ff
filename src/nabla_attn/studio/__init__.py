"""A page on which to try algorithms, with dense and sparse videos side by side (Gradio)."""
