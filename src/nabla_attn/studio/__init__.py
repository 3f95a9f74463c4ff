"""The studio: a page on which to try algorithms, dense and sparse side by side."""
