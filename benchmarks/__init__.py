"""Measurements behind the documents: studies, baselines, and the pages made of their records."""
