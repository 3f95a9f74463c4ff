"""What a layer of Wan 14B at 720p moves and holds beside attention itself, counted and not timed.

A kernel counts as reading and writing each of its tensors once, an operation likewise.
"""

import pytest

# 75,600 tokens, 40 heads, bf16.
LAYER = {"grids": [[21, 45, 80]], "heads": 40, "compiles": False, "repeat": 2}
MOST_MOVED, MOST_TABLES, MOST_HELD = 9.0e9, 0.3e9, 4.0e9


def is_attention(operation):
    return operation["name"].startswith("triton_tem_fused_flex_attention")


@pytest.mark.parametrize("batch", [1, 2])
def test_a_layer_keeps_its_budget(lab, batch):
    operations = lab.attention("sm_90", batch=batch, **LAYER)["operations"]
    assert sum(map(is_attention, operations)) == batch
    beside = [o["read"] + o["written"] for o in operations if not is_attention(o)]
    assert sum(beside) <= batch * MOST_MOVED
    assert max(o["held"] for o in operations) <= batch * MOST_HELD
    # Tables that are held at once: those between two calls of attention.
    tables = [0]
    for operation in operations:
        if is_attention(operation):
            tables.append(0)
        elif "flex_tables" in operation["where"]:
            tables[-1] += operation.get("allocated", 0)
    assert 0 < max(tables) <= MOST_TABLES


def test_a_forward_reads_each_token_once_into_blocks(lab):
    operations = lab.attention("sm_90", batch=1, **LAYER)["operations"]
    tokens = 40 * 128 * 2 * 75_600
    heavy = [o["name"] for o in operations if o["written"] >= tokens]
    # Queries and keys with their means, values, attention, and the output: nothing is copied.
    assert len(heavy) == 5 and sum("sum" in name for name in heavy) == 2, heavy


def test_tables_of_a_training_step_are_two_indices(lab):
    operations = lab.attention("sm_90", needs_backward=True, **LAYER)["operations"]
    tables = [o for o in operations if "flex_tables" in o["where"]]
    pairs = 40 * 1260**2
    assert sum(o.get("allocated", 0) >= 4 * pairs for o in tables) == 2
