"""A stand-in of the ComfyUI interface that the node relies on; no ComfyUI code runs in the tests.

Modelled on comfy/patcher_extension.py, comfy/model_patcher.py, comfy/ldm/modules/attention.py,
comfy/ldm/wan/model.py and comfy/ldm/kandinsky5/model.py: which arguments are passed by position or
by name, and which entries of transformer_options are written when.
"""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F

HEADS, DIM = 2, 16
PATCH = (1, 2, 2)


class WrappersMP:
    DIFFUSION_MODEL = "diffusion_model"


def attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    if not skip_reshape:
        q, k, v = (
            x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2) for x in (q, k, v)
        )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(*args, transformer_options=None, **kwargs):
    """The place where ComfyUI looks for an override."""
    kwargs |= {"transformer_options": transformer_options, "_inside_attn_wrapper": True}
    override = (transformer_options or {}).get("optimized_attention_override")
    return attention(*args, **kwargs) if override is None else override(attention, *args, **kwargs)


class Executor:
    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        first, *rest = self.wrappers
        return first(Executor(self.original, self.class_obj, rest), *args, **kwargs)


class Transformer(torch.nn.Module):
    """Two blocks of self- and cross-attention; `seen` has each self-attention's (q, k, v, out)."""

    def __init__(self, mask=None):
        super().__init__()
        self.patch_size, self.mask, self.seen = PATCH, mask, []
        self.embed = torch.nn.Conv3d(4, HEADS * DIM, PATCH, PATCH)
        self.project = torch.nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def execute(self, options, *args, **kwargs):
        wrappers = options.get("wrappers", {}).get("diffusion_model", {})
        ordered = [wrapper for keyed in wrappers.values() for wrapper in keyed]
        return Executor(self._forward, self, ordered)(*args, **kwargs)

    def pad(self, x):
        return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))


class WanModel(Transformer):
    def forward(self, x, timestep, context, clip_fea=None, transformer_options=None, **kwargs):
        options = transformer_options
        return self.execute(options, x, timestep, context, clip_fea, options, **kwargs)

    def _forward(self, x, timestep, context, clip_fea=None, transformer_options=None, **kwargs):
        x = self.embed(self.pad(x))
        transformer_options["grid_sizes"] = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        if kwargs.get("reference_latent") is not None:
            reference = self.embed(kwargs["reference_latent"][:, :, None])
            x = torch.cat([reference.flatten(2).transpose(1, 2), x], 1)
        for index in range(2):
            transformer_options["block_index"] = index
            q, k, v = self.project(x).chunk(3, -1)
            out = optimized_attention(
                q, k, v, heads=HEADS, mask=self.mask, transformer_options=transformer_options
            )
            self.seen.append((q, k, v, out))
            x = x + out
            x = x + optimized_attention(
                x, context, context, heads=HEADS, transformer_options=transformer_options
            )
        return x


class Kandinsky5(Transformer):
    def forward(self, x, timestep, context, y, transformer_options=None, **kwargs):
        options = transformer_options
        return self.execute(options, x, timestep, context, y, transformer_options=options, **kwargs)

    def attend(self, q, k, v, options):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return optimized_attention(
            q, k, v, heads=HEADS, skip_reshape=True, transformer_options=options
        )

    def _forward(self, x, timestep, context, y, transformer_options=None, **kwargs):
        x = x.unsqueeze(2) if x.dim() == 4 else x
        context = context + self.attend(context, context, context, transformer_options)
        x = self.embed(self.pad(x)).flatten(2).transpose(1, 2)
        for index in range(2):
            transformer_options["block_index"] = index
            q, k, v = self.project(x).chunk(3, -1)
            out = self.attend(q, k, v, transformer_options)
            self.seen.append((q, k, v, out))
            x = x + out
            x = x + self.attend(x, context, context, transformer_options)
        return x


class ModelPatcher:
    """Clones share the diffusion model, and have options and wrappers of their own."""

    def __init__(self, diffusion_model):
        self.objects = {
            "diffusion_model": diffusion_model,
            "model_sampling": SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent),
        }
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def clone(self):
        clone = copy.copy(self)
        clone.model_options = copy.deepcopy(self.model_options)
        clone.wrappers = {
            kind: {key: list(wrappers) for key, wrappers in keyed.items()}
            for kind, keyed in self.wrappers.items()
        }
        return clone

    def get_model_object(self, name):
        return self.objects[name]

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def sample_step(self, x, context, *, step=0, steps=4, **kwargs):
        """One forward as the sampler makes it; returns the output and the self-attention calls."""
        model = self.get_model_object("diffusion_model")
        schedule = torch.linspace(1, 0, steps + 1)
        options = {
            **self.model_options["transformer_options"],
            "wrappers": self.wrappers,
            "sample_sigmas": schedule,
            "sigmas": schedule[step].expand(len(x)),
        }
        model.seen = []
        args = (None,) if isinstance(model, Kandinsky5) else ()
        with torch.no_grad():
            out = model(x, options["sigmas"], context, *args, transformer_options=options, **kwargs)
        return out, model.seen
