"""Parts of a YAML config one by one: the network, its first stage, noise levels and samplers."""

from diffusion_jax.convert.yaml.parts import (
    NoiseLevels,
    convert_coders,
    convert_denoiser,
    convert_first_stage,
    convert_loss,
    convert_sampler,
    convert_unet,
)
from diffusion_jax.convert.yaml.reading import root_node
from diffusion_jax.convert.yaml.tables import DDCONFIG


def node(target, **params):
    return {"target": f"some.where.{target}", "params": params}


def unet(ldm=True, **params):
    given = {"out_channels": 4, "model_channels": 32, **params}
    return convert_unet(root_node(node("UNetModel", **given)), ldm=ldm)


def test_transformers_are_an_option_in_ldm_and_always_there_in_sgm():
    assert "use_spatial_transformer" not in unet()
    assert unet(use_spatial_transformer=True)["use_spatial_transformer"] is True
    assert unet(ldm=False)["use_spatial_transformer"] is True


def test_deep_transformers_are_scanned_and_checkpoints_are_remat():
    assert "scan" not in unet(transformer_depth=[1, 2, 3])
    assert unet(transformer_depth=[1, 2, 10])["scan"] is True
    assert unet(transformer_depth=4)["scan"] is True
    assert unet(use_checkpoint=True)["remat"] == "full" and "remat" not in unet()


def test_half_precision_is_bfloat16():
    assert unet(use_fp16=True)["dtype"] == unet(use_bf16=True)["dtype"] == "bfloat16"
    assert "dtype" not in unet(use_fp16=False)


def test_equal_context_widths_are_one():
    assert unet(context_dim=[8, 8])["context_dim"] == 8
    assert unet(context_dim=[8, 4])["context_dim"] == (8, 4)


def stage(target, **params):
    found = root_node(node(target, **params))
    return convert_first_stage(found), found.notes


def test_first_stages_by_their_class():
    ddconfig = {"z_channels": 4, "ch": 64, "ch_mult": [1, 2], "num_res_blocks": 1}
    assert stage("IdentityFirstStage") == (None, {})
    kl, _ = stage("AutoencoderKL", embed_dim=4, ddconfig=ddconfig, ckpt_path="x.ckpt")
    assert (kl["name"], kl["ch_mult"], kl["weights"]) == ("autoencoder_kl", (1, 2), "x.ckpt")
    vq, _ = stage("VQModelInterface", embed_dim=3, n_embed=16, ddconfig=ddconfig)
    assert (vq["name"], vq["num_codes"], vq["embed_dim"]) == ("autoencoder_vq", 16, 3)
    _, notes = stage("MyAutoencoder", embed_dim=4, ddconfig=ddconfig)
    assert "MyAutoencoder is no first stage of ours" in notes["target"]


def test_an_engines_encoder_and_decoder_have_the_same_options_here():
    half = lambda target, **more: node(target, z_channels=3, ch=64, **more)
    params = {"encoder_config": half("Encoder"), "decoder_config": half("Decoder")}
    found = convert_coders(root_node(params), DDCONFIG)
    assert (found["embed_dim"], found["use_quant_conv"], found["ch"]) == (3, False, 64)
    odd = root_node({**params, "decoder_config": half("Decoder") | {"params": {"ch": 32}}})
    convert_coders(odd, DDCONFIG)
    assert "same options" in odd.notes["decoder_config.params.ch"]


LEVELS = {"discretization_config": node("LegacyDDPMDiscretization")}


def denoiser(target="DiscreteDenoiser", scaling="EpsScaling", **params):
    return convert_denoiser(root_node(node(target, scaling_config=node(scaling), **params)))


def test_a_linear_schedule_is_the_section_schedule():
    found = denoiser(num_idx=1000, **LEVELS)
    assert set(found.sections) == {"schedule"}
    schedule = found.sections["schedule"]
    assert (schedule["name"], schedule["num_timesteps"]) == ("linear", 1000)
    assert schedule["parameterization"] == "eps"
    assert denoiser(scaling="VScaling", **LEVELS).sections["schedule"]["parameterization"] == "v"
    continuous = denoiser("Denoiser", "EDMScaling", **LEVELS).sections
    assert continuous["denoiser"]["name"] == "continuous"
    fewer = denoiser(num_idx=500, **LEVELS).sections
    assert fewer["denoiser"]["discretization"]["num_idx"] == 500


def test_a_loss_with_its_sampling_and_weighting():
    levels = node("DiscreteSampling", num_idx=1000, **LEVELS)
    weight = node("EpsWeighting")
    given = dict(loss_type="l3", sigma_sampler_config=levels, loss_weighting_config=weight)
    yaml = root_node(node("StandardDiffusionLoss", **given))
    found = convert_loss(yaml, denoiser(num_idx=1000, **LEVELS))
    assert found["loss"]["loss_type"] == "l2" and "choose l2" in yaml.notes["params.loss_type"]
    assert found["sigma_sampling"] == {"name": "discrete"}  # the denoiser's own levels
    assert found["weighting"]["name"] == "eps"
    other = convert_loss(root_node(node("StandardDiffusionLoss", **given)), NoiseLevels({}))
    assert "discretization" in other["sigma_sampling"]


def test_a_sampler_brings_its_guider_and_levels_of_its_own():
    guider = node("VanillaCFG", scale=5.0)
    yaml = node("EulerEDMSampler", num_steps=20, guider_config=guider, **LEVELS)
    found = convert_sampler(root_node(yaml), denoiser(num_idx=1000, **LEVELS))
    assert (found["sampler"]["name"], found["sampler"]["num_steps"]) == ("euler", 20)
    assert (found["guidance"]["name"], found["guidance"]["scale"]) == ("cfg", 5.0)
    assert "discretization" not in found
    assert "discretization" in convert_sampler(root_node(yaml), NoiseLevels({}))
