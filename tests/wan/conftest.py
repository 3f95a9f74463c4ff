"""Fixtures of the parity tests."""

from recorded import i2v_dir, t2v_dir

__all__ = ["i2v_dir", "t2v_dir"]
