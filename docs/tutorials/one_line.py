# %% [markdown]
# # NABLA in one line
#
# This tutorial makes the same video twice, with dense and with sparse attention, in a pipeline of diffusers. It uses the
# small text-to-video model that comes with the package; with a pipeline of your own, only the first cell changes.

# %%
from pathlib import Path

import torch
from diffusers import WanPipeline

import nabla_attn as na

SIZE = {"height": 128, "width": 128, "num_frames": 61, "num_inference_steps": 6}

folder = Path(na.__file__).parent / "moving_shapes" / "model"
pipe = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)


def make_video():
    """One video, always from the same noise."""
    noise = torch.Generator().manual_seed(0)
    prompt = "a small red square moving right on a black background"
    return pipe(prompt, guidance_scale=3.0, generator=noise, output_type="pt", **SIZE).frames


# %% [markdown]
# First the video with the model's own attention. It is what we compare with.

# %%
dense = make_video()

# %% [markdown]
# Now the one line. `"nabla-0.7"` keeps, for every block of queries, the fewest blocks of keys that hold 70 % of the
# probability mass. The pipeline is called as before.

# %%
handle = na.apply(pipe, "nabla-0.7")
sparse = make_video()

# %% [markdown]
# The report says how much was computed. The *density* is the share of token pairs that were kept, and the *kept mass* is
# the share of the probability mass that the block map expects in them.

# %%
report = handle.report()
print(report)
print("density of each layer:", report.density.nanmean(dim=(0, 2)))

# %% [markdown]
# How far apart are the two videos? Look at them, and at this number. If the difference is too large for you, raise the
# threshold: `"nabla-1"` leaves nothing out.

# %%
error = (sparse.float() - dense.float()).square().mean().sqrt()
print(f"root mean square difference: {error:.3f} of the range from 0 to 1")

# %% [markdown]
# Taking NABLA out again leaves the model as it was, bit for bit: the dense video comes out once more.

# %%
handle.remove()
assert torch.equal(make_video(), dense)

# %% [markdown]
# ## Where to go from here
#
# - [Choose an algorithm](choose_algorithm.md) compares several on your own prompts.
# - [In diffusers](../diffusers.md) says what works together with NABLA: LoRA, offloading, compilation, several GPUs.
# - [See what attention did](../view.md) shows the kept blocks of every step, layer and head.
