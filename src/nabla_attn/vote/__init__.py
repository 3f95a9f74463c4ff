"""Blind side-by-side studies: who votes does not know which video is which."""
