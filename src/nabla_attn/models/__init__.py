"""NABLA in diffusers models: one mechanism, one row per model class.

`apply` hooks the forward of a model to plan it (grid, step, algorithm per layer) and stands in for
the processors of its video self-attention; everything else of the model stays diffusers' own.
"""

from nabla_attn.models.handle import Handle, apply, remove, replaced
from nabla_attn.models.plan import AttentionCall
from nabla_attn.models.report import Report
from nabla_attn.models.row import ModelRow
from nabla_attn.models.table import find_row, model_rows, register_model

__all__ = [
    "AttentionCall",
    "Handle",
    "ModelRow",
    "Report",
    "apply",
    "find_row",
    "model_rows",
    "register_model",
    "remove",
    "replaced",
]
