"""Whole sampling loops of the reference, step by step, through our pipeline."""

import pytest
import torch
from recorded import assert_close, make_pickle, pad_text, read_golden, read_notes

import nabla_attn as na
from nabla_attn.wan import load_wan_transformer
from nabla_attn.wan.parts import load_part
from nabla_attn.wan.reference import build_solver

NOTES = read_notes("sampling_a")
CHANNELS = NOTES["channels"]


def sample(t2v_dir, run, vae=None, counts=None, **options):
    """Run one recorded setting; gives the latents after every step and the pipeline's output.

    `counts` takes the kept blocks [1, heads, rows] of every sparse attention call.
    """
    from diffusers import WanPipeline

    notes, recorded = NOTES["runs"][run], read_golden("sampling_a")
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=build_solver(notes["solver"], notes["shift"]),
        transformer=load_wan_transformer(t2v_dir, "dense", dtype=torch.float32),
    )
    pipe.set_progress_bar_config(disable=True)
    handle = None if notes["algo"] == "dense" else na.apply(pipe, notes["algo"])
    if handle is not None and counts is not None:
        handle.observe(lambda call: counts.append(call.block_map.mask[0].sum(-1).int()))
    latents = []

    def keep(pipeline, step, timestep, tensors):
        latents.append(tensors["latents"][0].clone())
        return tensors

    result = pipe(
        prompt_embeds=pad_text(recorded["in.context"], 16),
        negative_prompt_embeds=pad_text(recorded["in.context_null"], 16),
        height=128,
        width=384,
        num_frames=9,
        num_inference_steps=notes["steps"],
        guidance_scale=notes["guide_scale"],
        generator=torch.Generator("cpu").manual_seed(NOTES["seed"]),
        callback_on_step_end=keep,
        **({"output_type": "latent"} | options),
    )
    return recorded, torch.stack(latents), result.frames, pipe, handle


@pytest.mark.parametrize("run", NOTES["runs"])
def test_levels_are_the_reference_s(run):
    notes, recorded = NOTES["runs"][run], read_golden("sampling_a")
    scheduler = build_solver(notes["solver"], notes["shift"])
    scheduler.set_timesteps(notes["steps"])
    assert torch.equal(scheduler.timesteps, recorded[f"{run}.timesteps"])
    assert_close(scheduler.sigmas, recorded[f"{run}.sigmas"], 1e-7)


def test_noise_is_one_draw():
    recorded = read_golden("sampling_a")
    generator = torch.Generator("cpu").manual_seed(NOTES["seed"])
    assert torch.equal(torch.randn(16, 3, 16, 48, generator=generator), recorded["in.noise"])


@pytest.mark.parametrize("run", NOTES["runs"])
def test_sampling_loop(t2v_dir, run):
    counts = []
    recorded, latents, final, _, handle = sample(t2v_dir, run, counts=counts)
    assert_close(latents[:, CHANNELS], recorded[f"{run}.latents"], 1e-3)
    last = recorded[f"{run}.final"]
    assert_close(final[0], last, 1e-3)
    assert (final[0] - last).norm() / last.norm() < 1e-4
    sparse = recorded[f"{run}.sparse"].bool().tolist()
    assert len(counts) == sum(sparse) * 2 * 2
    if f"{run}.kv_num_blocks" in recorded:
        expected = recorded[f"{run}.kv_num_blocks"]
        assert torch.equal(torch.stack(counts).view(expected.shape), expected)
    if handle is not None:
        is_dense = (handle.report().density == 1).all(dim=(1, 2))
        assert is_dense.tolist() == [not step for step in sparse]


def test_decoded_video(t2v_dir, tmp_path):
    run = "unipc6_shift5_dense"
    vae = load_part("VAE", make_pickle(tmp_path, "vae_a_weights_bf16"), dtype=torch.float32)
    recorded, _, frames, _, _ = sample(t2v_dir, run, vae=vae, output_type="np")
    video = torch.from_numpy(frames[0]).permute(3, 0, 1, 2) * 2 - 1
    assert_close(video[:, :, 4::8, 4::8], recorded[f"{run}.video_sample"], 1e-3)
