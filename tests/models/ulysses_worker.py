"""One rank of test_parallel.py: models shared over 2 and 4 processes."""

import warnings
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
from tests.models.tiny_models import TINY, relative_error, run

import nabla_attn as na
from nabla_attn.head_rules import Rule

# Degree -> a grid that it divides; the second is ragged.
GRIDS = {2: (2, 16, 16), 4: (4, 11, 13)}
# Four heads each, so that four ranks have one.
CHANGES = {
    "wan": dict(num_attention_heads=4),
    "wan-vace": dict(num_attention_heads=4),
    "skyreels": dict(num_attention_heads=4),
    "chronoedit": dict(num_attention_heads=4),
    "ltx": dict(num_attention_heads=4, cross_attention_dim=96),
    "hunyuan": dict(num_attention_heads=4),
    "hunyuan15": dict(num_attention_heads=4),
    "kandinsky5": dict(model_dim=96, num_visual_blocks=2),
    "cosmos": dict(num_attention_heads=4),
    "cogvideox": dict(num_attention_heads=4),
    "consisid": dict(num_attention_heads=4),
    "mochi": dict(num_attention_heads=4),
    "easyanimate": dict(num_attention_heads=4),
}

# Heads 1 and 3 of the first layer are on one rank or two, as they are balanced.
MIXED = na.Schedule(
    algorithm=na.parse("nabla-0.5"),
    rules=(
        Rule(algorithm=na.parse("topk-0.2_tail-first"), layers=(0,), heads=(1, 3)),
        Rule(algorithm=na.parse("dense"), layers=(0,), heads=(2,)),
    ),
)


def enable(model, degree):
    """`model.enable_parallelism` with a mesh of CPU processes, which diffusers does not build."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    copies = dist.get_world_size() // degree
    mesh = dist.init_device_mesh(
        "cpu", (copies, 1, degree), mesh_dim_names=("copies", "ring", "ulysses")
    )

    def resolve(self, config):
        whole = ParallelConfig(context_parallel_config=config)
        whole.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
        self._parallel_config = whole
        return whole

    model._resolve_parallel_config = MethodType(resolve, model)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))


def measure(name, degree, grid, algorithm, **rules):
    """Largest relative difference to one process in output and gradients."""
    tiny = TINY[name]
    alone, shared = (tiny.build(**CHANGES[name]) for _ in range(2))
    inputs = tiny.inputs(*grid)
    handle = na.apply(shared, algorithm, **rules)
    for each in (handle, na.apply(alone, algorithm, **rules)):
        torch.manual_seed(0)
        for weight in each.method_parameters():
            torch.nn.init.normal_(weight, std=0.3)
    enable(shared, degree)
    expected = run(alone, inputs)
    errors = []
    # The second call shares heads by what the first measured.
    for _ in range(2):
        out = run(shared, inputs)
        errors.append(relative_error(out, expected))
    expected.square().mean().backward()
    if name != "kandinsky5":
        out.square().mean().backward()
    for mine, whole in zip(shared.parameters(), alone.parameters(), strict=True):
        if whole.grad is None or mine.grad is None or whole.grad.abs().max() < 1e-6:
            continue
        dist.all_reduce(mine.grad)
        mine.grad *= degree / dist.get_world_size()
        errors.append(relative_error(mine.grad, whole.grad) / 10)
    orders = [layer.current.order for layer in handle.layers]
    return max(errors), any(o is not None and o.tolist() != sorted(o.tolist()) for o in orders)


def measure_balance(degree):
    """Work of the busiest rank / mean work, (as heads are, balanced), with heads of unequal reach.

    Returns:
        The two, and the largest relative difference to one process.
    """
    tiny = TINY["wan"]
    alone, shared = (unequal_heads(tiny.build(num_attention_heads=16)) for _ in range(2))
    na.apply(alone, "nabla-0.5")
    handle = na.apply(shared, "nabla-0.5")
    enable(shared, degree)
    errors = []
    with torch.no_grad():
        for time in (900.0, 800.0):
            inputs = tiny.inputs(4, 16, 16) | {"timestep": torch.full((2,), time)}
            errors.append(relative_error(run(shared, inputs), run(alone, inputs)))
    return *handle.report().head_balance(degree), max(errors)


def unequal_heads(model):
    """Sharpen the attention of later heads, as trained models have broad and narrow heads."""
    for block in model.blocks:
        sharpness = torch.linspace(0.5, 12, block.attn1.heads)
        block.attn1.norm_q.weight.data = sharpness.repeat_interleave(24)
    return model


def main(rank: int, folder: str, num_ranks: int, names: tuple[str, ...]) -> None:
    warnings.simplefilter("ignore")
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=num_ranks)
    results = {}
    for name in names:
        for degree, grid in GRIDS.items():
            if degree <= num_ranks:
                is_first = (name, degree) == (names[0], 2)
                others = ("topk-0.2_tail-first", "vsa-0.3", "sla-0.3") if is_first else ()
                for algorithm in ("nabla-0.5", "dense", *others):
                    results[name, degree, algorithm] = measure(name, degree, grid, algorithm)
                results[name, degree, "mixed"] = measure(name, degree, grid, None, schedule=MIXED)
    balance = {degree: measure_balance(degree) for degree in GRIDS if degree <= num_ranks}
    if rank == 0:
        torch.save({"cases": results, "balance": balance}, Path(folder) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
