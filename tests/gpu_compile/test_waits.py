"""Nothing between q, k, v and the output makes the host wait for the GPU."""

import re

import pytest

# Calls inside a compiled module that the host waits for, or that sort.
SLOW_CALLS = re.compile(r"aten\.(sort|nonzero|item|_local_scalar_dense|unique)\S*\(|\.item\(\)")
CASES = {
    "mass": {},
    "share-and-window": {"algorithm": "topk-0.2_sta-3-3-3"},
    "window": {"algorithm": "sta-3-3-3"},
    "first-frame": {"algorithm": "nabla-0.7_keep-first-frame"},
    "padded-text": {"num_text": 9, "batch": 2},
    "pairs": {"algorithm": "nabla-0.7_pair-union", "options": {"tile_rows": 2}},
    "training": {"needs_backward": True},
    "tail": {"algorithm": "nabla-0.7_tail-mean"},
    "tail-training": {"algorithm": "nabla-0.7_tail-first", "needs_backward": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_host_never_waits_once_a_layout_is_known(lab, case):
    answer = lab.attention("sm_80", grids=[(3, 20, 24)], compiles=False, repeat=2, **case)
    assert answer["operations"], "nothing was watched"
    waits = [(o["waits"], o["where"]) for o in answer["operations"] if o["waits"]]
    assert not waits
    assert not [name for code in answer["codes"] for name in SLOW_CALLS.findall(code)]
    assert not [o for o in answer["operations"] if "sort" in o["name"]]
