"""NABLA in diffusers models: one mechanism, one row per model class.

`apply` hooks the forward of a model to plan it (grid, step, algorithm per layer) and stands in for
the processors of its video self-attention; everything else of the model stays diffusers' own.
"""

from nabla_attn.models.handle import Handle, apply, load_method_parts, remove, replaced
from nabla_attn.models.method_parts import (
    METHOD_PARTS,
    add_method_parts,
    algorithm_of,
    is_method_part,
    method_parts_fingerprint,
    named_method_parts,
    save_method_parts,
)
from nabla_attn.models.plan import AttentionCall
from nabla_attn.models.report import Report
from nabla_attn.models.row import ModelRow
from nabla_attn.models.table import find_row, model_rows, register_model

__all__ = [
    "METHOD_PARTS",
    "AttentionCall",
    "Handle",
    "ModelRow",
    "Report",
    "add_method_parts",
    "algorithm_of",
    "apply",
    "find_row",
    "is_method_part",
    "load_method_parts",
    "method_parts_fingerprint",
    "model_rows",
    "named_method_parts",
    "register_model",
    "remove",
    "replaced",
    "save_method_parts",
]
