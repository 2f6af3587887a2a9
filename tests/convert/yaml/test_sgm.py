"""Configs of generative-models: embedders, noise levels, samplers, guidance."""

import pytest


def test_clip_stays_frozen_in_spite_of_is_trainable(yamls):
    where = "model.params.conditioner_config.params.emb_models.0"
    tree = yamls.changed(yamls.sd_xl_base(), f"{where}.is_trainable", True)
    (sections, _), notes = yamls.parts(tree)
    assert "trainable" not in sections["conditioning"]["embedders"]["clip"]
    assert "frozen there all the same" in notes[f"{where}.is_trainable"]
    tree = yamls.changed(tree, f"{where}.params.freeze", False)
    assert yamls.parts(tree)[0][0]["conditioning"]["embedders"]["clip"]["trainable"] is True


@pytest.mark.parametrize(
    ("sampler", "options", "ours"),
    [
        ("EulerEDMSampler", {"s_churn": 1.0}, "euler"),
        ("HeunEDMSampler", {"s_noise": 1.1, "s_tmin": 0.1, "s_tmax": 9.0}, "heun"),
        ("EulerAncestralSampler", {"eta": 0.5}, "euler_ancestral"),
        ("DPMPP2SAncestralSampler", {"eta": 0.5, "s_noise": 1.1}, "dpmpp_2s_ancestral"),
        ("DPMPP2MSampler", {}, "dpmpp_2m"),
        ("LinearMultistepSampler", {"order": 3}, "lms"),
    ],
)
def test_samplers_bind_with_their_options(sampler, options, ours, tmp_path, yamls):
    config = yamls.load(yamls.without_sampling(sampler, **options), tmp_path)
    assert config.sampler.to_dict() == {"name": ours, "num_steps": 7, **options}
    assert config.discretization.to_dict() == {
        "name": "edm", "sigma_min": 0.002, "sigma_max": 14.6, "rho": 7.0,
    }  # fmt: skip
    assert config.guidance.name == "none"
    assert yamls.build(config).drawing.num_steps == 7


@pytest.mark.parametrize(
    ("scaling", "parameterization", "denoiser"),
    [("EpsScaling", "eps", None), ("VScaling", "v", None), ("EDMScaling", "eps", "edm")],
)
def test_a_scaling_is_a_parameterization_where_there_is_one(
    scaling, parameterization, denoiser, yamls
):
    where = "model.params.denoiser_config.params.scaling_config.target"
    tree = yamls.changed(
        yamls.sd_2_1(), where, f"{yamls.SGM}.diffusionmodules.denoiser_scaling.{scaling}"
    )
    sections = yamls.parts(tree)[0][0]
    schedule = sections["schedule"]
    found = schedule["parameterization"] if "parameterization" in schedule else "eps"
    assert found == parameterization and ("denoiser" in sections) == (denoiser is not None)
    if denoiser is not None:
        assert sections["denoiser"] == {"name": "discrete", "scaling": {"name": denoiser}}


def test_guidance_needs_a_condition_that_training_drops(yamls):
    (sections, _), notes = yamls.parts(yamls.mnist())
    assert sections["guidance"] == {"name": "none"}
    assert "no embedder has a ucg_rate" in notes["model.params.sampler_config.params.guider_config"]
    assert yamls.parts(yamls.mnist_cond())[0][0]["guidance"] == {"name": "cfg", "scale": 3.0}


def test_unknown_classes_are_named_with_what_there_is(yamls):
    notes = yamls.listed(yamls.without_sampling("RestartSampler"))
    assert notes["model.params.sampler_config.target"].startswith(
        "RestartSampler is no sampler of ours; there are EulerEDMSampler, "
    )
    where = "model.params.conditioner_config.params.emb_models.0.target"
    tree = yamls.changed(yamls.sd_2_1(), where, f"{yamls.SGM}.encoders.modules.FrozenT5Embedder")
    assert yamls.listed(tree)[where].startswith("FrozenT5Embedder is no embedder of ours")


@pytest.mark.parametrize("scaling", ["VScaling", "EpsScaling"])
def test_a_table_of_zero_terminal_snr_is_a_schedule_where_the_network_predicts_v(
    scaling, tmp_path, yamls
):
    where = "model.params.denoiser_config.params"
    tree = yamls.changed(
        yamls.sd_2_1(),
        f"{where}.discretization_config.target",
        f"{yamls.SGM}.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization",
    )
    tree = yamls.changed(
        tree,
        f"{where}.scaling_config.target",
        f"{yamls.SGM}.diffusionmodules.denoiser_scaling.{scaling}",
    )
    built = yamls.build(yamls.load(tree, tmp_path))
    noise = built.drawing.noise
    assert float(noise.sigmas[-1]) == pytest.approx(4096, rel=1e-3)
    assert noise.on_timesteps == (scaling == "VScaling")
