"""Every part of the reference's pipeline, loaded from its own file, gives its own numbers."""

import numpy as np
import pytest
import torch
from recorded import assert_close, make_pickle, pad_text, read_golden, read_notes

import nabla_attn as na
from nabla_attn.wan import load_wan_transformer
from nabla_attn.wan.parts import load_part
from nabla_attn.wan.reference import WanImageProcessor

FP32 = torch.float32


@pytest.mark.parametrize("algo", read_notes("model_a")["algos"])
def test_text_to_video_transformer(t2v_dir, algo):
    recorded = read_golden("model_a_fp32")
    model = load_wan_transformer(t2v_dir, algo, dtype=FP32)
    if algo.startswith("sta"):
        na.apply(model, schedule=na.Schedule(algorithm=na.parse(algo)))
    with torch.no_grad():
        out = model(
            recorded["in.latent"][None],
            recorded["in.t"],
            pad_text(recorded["in.context"], 16),
            return_dict=False,
        )[0]
    assert_close(out[0], recorded[f"out.{algo}"], 1e-4)


@pytest.mark.parametrize("algo", ["dense", "nabla-0.6_sta-3-3-3"])
def test_image_to_video_transformer(i2v_dir, algo):
    recorded = read_golden("i2v_a")
    model = load_wan_transformer(i2v_dir, algo, dtype=FP32)
    mask = torch.zeros(4, 3, 16, 48)
    mask[:, 0] = 1
    latent = torch.cat([recorded["in.latent"], mask, recorded["in.y_latent"]])[None]
    context = pad_text(recorded["in.context"], 512)
    with torch.no_grad():
        out = model(latent, recorded["in.t"], context, recorded["in.clip_fea"], return_dict=False)[
            0
        ]
        tokens = model.condition_embedder.image_embedder(recorded["in.clip_fea"])
    assert_close(out[0], recorded[f"out.{algo}"], 1e-4)
    rows = read_notes("i2v_a")["img_emb_row_index"]
    assert_close(tokens[0, rows], recorded["img_emb_rows"].reshape(len(rows), -1), 1e-4)


def test_vae(tmp_path):
    vae = load_part("VAE", make_pickle(tmp_path, "vae_a_weights_bf16"), dtype=FP32)
    recorded = read_golden("vae_a")
    mean, std = (recorded[name].view(-1, 1, 1, 1) for name in ("mean", "std"))
    assert_close(torch.tensor(vae.config.latents_mean), recorded["mean"], 1e-6)
    assert_close(torch.tensor(vae.config.latents_std), recorded["std"], 1e-6)
    video = recorded["in.video_int8"] / 128
    with torch.no_grad():
        mu = vae.encode(video[None]).latent_dist.mode()[0]
        image = vae.encode(video[None, :, :1]).latent_dist.mode()[0]
        decoded = vae.decode((recorded["out.latent"] * std + mean)[None])[0][0]
        frame = vae.decode((recorded["image.latent"] * std + mean)[None])[0][0]
    assert_close(mu, recorded["out.mu"], 5e-5)
    assert_close((mu - mean) / std, recorded["out.latent"], 5e-5)
    assert_close((image - mean) / std, recorded["image.latent"], 5e-5)
    assert_close(decoded, recorded["out.decoded_raw"].clamp(-1, 1), 5e-5)
    assert_close(frame, recorded["image.decoded"], 5e-5)


def test_text_encoder(tmp_path):
    path = make_pickle(tmp_path, "t5_a_weights_bf16")
    recorded = read_golden("t5_a")
    ids, mask = recorded["in.ids"].long(), recorded["in.mask"].long()
    with torch.no_grad():
        exact = load_part("text encoder", path, dtype=FP32)(ids, mask).last_hidden_state
        half = load_part("text encoder", path, dtype=torch.bfloat16)(ids, mask).last_hidden_state
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = recorded[f"out.{row}"]
        assert_close(exact[row, :length], expected, 1e-4)
        error = (half[row, :length].float() - expected).norm() / expected.norm()
        assert error < 0.1


def test_image_tower(tmp_path):
    path = make_pickle(tmp_path, "clip_a_weights_bf16")
    tower = load_part("image encoder", path, 4, dtype=FP32)
    recorded = read_golden("clip_a")
    image = recorded["in.image"][:, 0][None]
    process = WanImageProcessor(tower.config.image_size)
    pixels = process(image)["pixel_values"]
    both = process([image, image.flip(-1)])["pixel_values"]
    assert_close(pixels, recorded["pixels"], 5e-5)
    with torch.no_grad():
        one = tower(pixels, output_hidden_states=True).hidden_states[-2]
        two = tower(both, output_hidden_states=True).hidden_states[-2]
    assert_close(one, recorded["out.features"], 5e-5)
    assert_close(two, recorded["out.features_two"], 5e-5)


def test_pixels_of_a_pil_image():
    from PIL import Image

    rows = np.arange(40 * 72 * 3, dtype=np.uint8).reshape(40, 72, 3)
    tensor = torch.from_numpy(rows).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    process = WanImageProcessor(56)
    from_pil = process(Image.fromarray(rows))["pixel_values"]
    assert_close(from_pil, process(tensor)["pixel_values"], 1e-6)
