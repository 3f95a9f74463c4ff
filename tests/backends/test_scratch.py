import torch

from nabla_attn.backends.scratch import Scratch


def test_memory_is_used_again_and_grows():
    scratch = Scratch(torch.device("cpu"))
    first = scratch.take("keys", (4, 3), torch.float32)
    assert scratch.take("keys", (2, 5), torch.float32).data_ptr() == first.data_ptr()
    larger = scratch.take("keys", (5, 3), torch.float32)
    assert larger.shape == (5, 3) and larger.dtype == torch.float32
    assert scratch.take("keys", (15,), torch.float32).data_ptr() == larger.data_ptr()


def test_names_and_dtypes_are_apart():
    scratch = Scratch(torch.device("cpu"))
    kinds = [("keys", torch.float32), ("values", torch.float32), ("keys", torch.bfloat16)]
    taken = [scratch.take(name, (8,), dtype) for name, dtype in kinds]
    assert len({x.data_ptr() for x in taken}) == 3
