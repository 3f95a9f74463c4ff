# %% [markdown]
# # A model of your own
#
# There are two ways to use NABLA in a model that the package does not know. Register the model if its attention modules
# are those of diffusers; call the attention function if you wrote the attention yourself.
#
# ## Attention modules of diffusers
#
# This model wraps a transformer of diffusers, so `na.apply` does not know its class.

# %%
import torch
from diffusers import WanTransformer3DModel

import nabla_attn as na


class MyTransformer3DModel(torch.nn.Module):
    """A model that keeps a transformer of diffusers inside."""

    def __init__(self):
        super().__init__()
        self.inner = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
        )
        self.config = self.inner.config

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        """Predict the velocity of a latent video."""
        return self.inner(hidden_states, timestep, encoder_hidden_states).sample


# %% [markdown]
# One call registers the class. `attention` is a regular expression for the names of the self-attention modules of the
# video. The size of the video is read from `hidden_states` `[batch, channels, frames, height, width]` and from
# `config.patch_size`; pass `grid=` if your model takes its input in another form, and `text=` if text tokens take part in
# the self-attention.

# %%
na.register_model("MyTransformer3DModel", attention=r"inner\.blocks\.\d+\.attn1")

model = MyTransformer3DModel().eval()
latents, text = torch.randn(1, 4, 3, 22, 26), torch.randn(1, 7, 16)
with torch.no_grad(), na.apply(model, "nabla-0.5") as handle:
    model(latents, torch.tensor([500.0]), text)
    print(handle.report())

# %% [markdown]
# ## Attention of your own
#
# `na.nabla_attention` takes the place of `torch.nn.functional.scaled_dot_product_attention`. Besides queries, keys and
# values it needs to know where the tokens lie: a `TokenGrid` of frames, rows and columns, with the tokens in this order.


# %%
class SelfAttention(torch.nn.Module):
    """Self-attention over the tokens of a video."""

    def __init__(self, dim, heads, algorithm):
        super().__init__()
        self.heads, self.config = heads, na.parse(algorithm)
        self.qkv = torch.nn.Linear(dim, 3 * dim)
        self.out = torch.nn.Linear(dim, dim)

    def forward(self, x, grid):
        """Attend over x `[batch, tokens, dim]`, whose tokens fill the grid."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = na.nabla_attention(q, k, v, grid, self.config)
        return self.out(y.transpose(1, 2).flatten(2))


grid = na.TokenGrid(frames=5, height=24, width=20)
x = torch.randn(1, grid.num_tokens, 64)
attention = SelfAttention(64, heads=2, algorithm="nabla-0.6_sta-3-3-3")
y = attention(x, grid)

# %% [markdown]
# It is differentiable, so the same code trains. The map itself is data: no gradient flows through the choice of blocks.

# %%
y.square().mean().backward()
print(attention.qkv.weight.grad.norm())

# %% [markdown]
# `na.build_block_map` gives the map alone, if you want to look at it before you rely on it.

# %%
q, k = torch.randn(2, 1, 2, grid.num_tokens, 32)
block_map = na.build_block_map(q, k, grid, na.parse("nabla-0.6"))
print(f"{block_map.density:.2f} of the token pairs are kept")

# %% [markdown]
# ## Where to go from here
#
# - [In diffusers](../diffusers.md#a-model-of-your-own) has the details of `register_model`.
# - [The reference](../reference/python.md) lists every argument.
# - [Why maps are exact](../exact_maps.md) says what the tests hold this function to.
