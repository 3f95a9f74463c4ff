"""A few random encoded clips in memory, and configurations small enough for any machine."""

import os
from dataclasses import dataclass

import torch

from nabla_attn.training.recipes import find_recipe, override


@dataclass
class Clips:
    """What `EncodedSet` gives, for the tiny Wan pipeline: 4 channels, 16-wide text."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def grids(self):
        return list(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        # Smooth clips of one value: something that can be learnt.
        value = torch.randn(4, 1, 1, 1, generator=generator)
        text = torch.randn(7, 16, generator=generator)
        return {
            "latents": value.expand(self.shapes[index]).clone(),
            "conditions": {"encoder_hidden_states": text},
            "empty": {"encoder_hidden_states": torch.zeros(7, 16)},
            "caption": str(index),
        }


class Stopped(Exception):
    """Ends a run where a test wants it to."""


def stop_after(step):
    """A callback of training that ends it after a step."""

    def report(entry):
        if entry.step == step:
            raise Stopped

    return report


def equal(a, b):
    """Whether two sets of weights are the same, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_clips(count=8, shape=(4, 3, 16, 16), odd=False):
    shapes = [shape] * count
    if odd:
        shapes[1::2] = [(4, 1, 22, 26)] * len(shapes[1::2])
    return Clips(tuple(shapes))


SMALL = {
    "steps": 4,
    "optim.lr": 1e-3,
    "optim.max_norm": 1.0,
    "data.validation": 2,
    "watch.tensorboard": False,
    "checkpoint.every": 2,
    "sparsity.algorithm": "nabla-0.7",
}


def small_config(recipe="finetune", **values):
    """A recipe for tests; double underscores stand for dots."""
    named = {key.replace("__", "."): value for key, value in values.items()}
    return override(find_recipe(recipe), SMALL | named)


def train_clips(model, folder, values, options):
    """Train odd clips; in a process of its own when started by `start_process`."""
    torch.set_num_threads(1)
    from nabla_attn.training.train import train

    values = dict(values)
    if values.pop("sharded", False):
        shard_by_hand()
    if values.get("context_parallel", 1) > 1:
        # diffusers counts GPUs to name a device; processes of a CPU have none.
        torch.accelerator.device_count = lambda: 1
    if values.pop("sampled", False) and os.environ["RANK"] == "0":
        options = options | {"sample": lambda step, transformer: {"right": 1.0}}
    dataset = make_clips(odd=values.pop("odd", True))
    return train(small_config(**values), model, folder, dataset=dataset, **options)


def shard_by_hand():
    """What accelerate does for FSDP2, which it refuses without GPUs: the rest can be tested."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard

    def prepare(self, module, optimizer):
        for block in module.blocks:
            fully_shard(block)
        fully_shard(module)
        (group,) = optimizer.param_groups
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        trained = [p for p in module.parameters() if p.requires_grad]
        return module, torch.optim.AdamW(trained, **settings)

    Accelerator.prepare = prepare
