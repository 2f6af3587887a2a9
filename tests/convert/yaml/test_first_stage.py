"""Configs that train a first stage."""

import math

import jax

from diffusion_jax.convert.yaml.from_yaml import config_from_yaml
from diffusion_jax.convert.yaml.reading import read_yaml
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import load_config

AUTOENCODING = """
model:
  base_learning_rate: 4.5e-6
  target: sgm.models.autoencoder.AutoencodingEngine
  params:
    input_key: jpg
    disc_start_iter: 3
    lr_g_factor: 2.0
    loss_config:
      target: sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator
      params:
        {disc_start: 20001, disc_weight: 0.5, learn_logvar: True,
         regularization_weights: {kl_loss: 2.0}}
    regularizer_config:
      target: sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer
    encoder_config:
      target: sgm.modules.diffusionmodules.model.Encoder
      params:
        {attn_type: none, double_z: True, z_channels: 4, resolution: 256, in_channels: 3,
         out_ch: 3, ch: 128, ch_mult: [1, 2, 4], num_res_blocks: 4, attn_resolutions: []}
    decoder_config:
      target: sgm.modules.diffusionmodules.model.Decoder
      params: ${model.params.encoder_config.params}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 8, train: {target: "${model.target}.x", params: {size: 128}}}
"""


def test_the_training_of_a_first_stage_converts_whole(tmp_path):
    path = tmp_path / "vae.yaml"
    path.write_text(AUTOENCODING)
    assert read_yaml(path).values["data"]["params"]["train"]["target"].endswith("Engine.x")
    converted = config_from_yaml(path)
    config = load_config(str(_written(converted.source, tmp_path)), [])
    assert (config.model.attn_type, config.model.use_quant_conv) == ("none", False)
    assert config.data.batches.image_size == 128 and config.train.batch_size == 8
    assert config.loss.to_dict() == {
        "name": "autoencoder", "disc_start": 20001, "disc_weight": 0.5, "learn_logvar": True,
        "regularization_weights": {"kl_loss": 2.0}, "schedule": "alternate",
    }  # fmt: skip
    assert config.optimizer.to_dict() == {
        "name": "adam", "learning_rate": 9e-6, "ema_decay": None,
    }  # fmt: skip
    assert config.disc_optimizer.learning_rate == 4.5e-6
    listed = [line.partition(": ")[0] for line in converted.unmapped]
    assert listed == ["model.params.disc_start_iter", "data.target", "data.params.train.target"]
    shapes = (
        make_experiment(config, devices=jax.devices()[:1]).abstract_state().params["autoencoder"]
    )
    counts = {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[part]))
        for part in ("encoder", "decoder")
    }
    assert counts == {"encoder": 33_705_864, "decoder": 44_310_787}  # upstream.md, section 8.1


def test_latent_diffusions_first_stages_convert(tmp_path, yamls):
    kl, shipped = yamls.load(yamls.kl_f8(), tmp_path), load_config("configs/vae_kl_f8.py", [])
    assert (kl.train.batch_size, kl.checkpoint.monitor) == (12 * 2, "val/loss/rec")
    assert "accumulate" not in kl.train  # the adversary's weight is computed on a whole batch
    yamls.build(kl)
    with shipped.unlocked():
        del shipped.loss["perceptual_weight"], shipped.discriminator["ndf"]  # our defaults
        del shipped.discriminator["n_layers"]
    for section in ("loss", "regularizer", "discriminator", "perceptual"):
        assert kl[section].to_dict() == shipped[section].to_dict(), section
    vq = yamls.load(yamls.vq_f8(), tmp_path)
    yamls.build(vq)
    assert vq.regularizer.to_dict() == {
        "name": "vq", "num_codes": 16384, "beta": 0.25, "legacy": True,
    }  # fmt: skip
    assert vq.loss.regularization_weights.to_dict() == {"loss/vq": 1.0}
    assert vq.loss.reduction == "mean" and vq.discriminator.n_layers == 2


def _written(source: str, tmp_path):
    path = tmp_path / "source.py"
    path.write_text(source)
    return path
