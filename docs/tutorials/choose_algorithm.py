# %% [markdown]
# # Choose an algorithm
#
# A threshold is not a sparsity: how much `"nabla-0.7"` keeps depends on the model, the prompt and the size. This tutorial
# compares a few algorithms on one prompt by what they keep, how far they are from dense attention, and how long they take.

# %%
import time
from pathlib import Path

import torch
from diffusers import WanPipeline

import nabla_attn as na

SIZE = {"height": 128, "width": 128, "num_frames": 61, "num_inference_steps": 6}
ALGORITHMS = ("nabla-0.9", "nabla-0.7", "nabla-0.4", "topk-0.2", "nabla-0.2_sta-3-3-3")

folder = Path(na.__file__).parent / "moving_shapes" / "model"
pipe = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
pipe.set_progress_bar_config(disable=True)


def make_video():
    """One video, always from the same noise, and the seconds it took."""
    noise = torch.Generator().manual_seed(0)
    prompt = "a small red square moving right on a black background"
    start = time.perf_counter()
    frames = pipe(prompt, guidance_scale=3.0, generator=noise, output_type="pt", **SIZE).frames
    return frames.float(), time.perf_counter() - start


# %% [markdown]
# Dense attention first. Then each algorithm on the same prompt and noise; `with` takes it out again at the end.

# %%
dense, dense_seconds = make_video()
print(f"{'algorithm':22} density  difference  seconds")
print(f"{'dense':22} {1:7.2f}  {0:10.3f}  {dense_seconds:7.1f}")
for algorithm in ALGORITHMS:
    with na.apply(pipe, algorithm) as handle:
        video, seconds = make_video()
        density = handle.report().density.nanmean()
    difference = (video - dense).square().mean().sqrt()
    print(f"{algorithm:22} {density:7.2f}  {difference:10.3f}  {seconds:7.1f}")

# %% [markdown]
# How to read the table:
#
# - **Density** bounds the gain: attention at density 0.2 does a fifth of the work. The rest of the model costs what it did.
# - **The difference** says how far the video is from that of dense attention. It does not say which of the two is better.
# - **A union with a window** (`nabla-0.2_sta-3-3-3`) keeps the neighbourhood of every block, whatever its score. The
#   [judged videos](../correctness.md#the-built-in-model-judged-on-held-out-prompts-by-the-first-judge) of this model show what that is worth.
#
# One prompt is not enough to decide. The command line does the same with pictures and on many prompts:
#
# ```bash
# nabla compare --prompt "a red square moving right" --sparse-algo nabla-0.7 --sparse-algo topk-0.2 --output out/compare
# nabla evaluate --sparse-algo nabla-0.7 --sparse-algo topk-0.2 --num-prompts 4 --output out/choose
# nabla report out/choose --output out/choose-report
# ```
#
# ## One algorithm for each layer
#
# Layers differ: one spreads its attention over everything, the next over a few blocks. `nabla calibrate` measures what each
# layer loses under each algorithm, and writes the schedule that loses least at a density that you choose:
#
# ```bash
# nabla calibrate --density 0.2 --output out/calibrate
# nabla generate --prompt "a red square moving right" --schedule out/calibrate/schedule.json
# ```
#
# In code, a schedule says which layers and steps stay dense:

# %%
schedule = na.Schedule(algorithm=na.parse("nabla-0.4"), dense_first_steps=1, dense_layers=(0,))
with na.apply(pipe, schedule=schedule) as handle:
    make_video()
    print(handle.report())

# %% [markdown]
# ## Where to go from here
#
# - [Calibration](../calibrate.md) and [evaluation](../evaluate.md) explain what is measured and how.
# - [Quality](../quality.md) has the full study of the built-in model.
