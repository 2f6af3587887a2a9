"""Sections and hooks that are None or no sections, names that are empty, parts that do not fit."""

import re

import pytest
from faults.frame import BadInput, Fault, bad_inputs, build, faults

from diffusion_jax import load_config
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.experiment import SECTIONS

NEEDED = ("model", "data", "train")
OF_FIRST_STAGES = ("disc_optimizer", "discriminator", "perceptual", "regularizer")
NAMES = (
    "model data.source conditioning.embedders.label schedule loss sampler guidance optimizer "
    "lr_schedule"
).split()
OPTIONAL = [name for name in SECTIONS if name not in (*NEEDED, "seed")]


# Options of other names, which do not go with the names below.
EULER = "sampler.clip_denoised=delete sampler.discretize=delete"
OTHER = "optimizer.b2=delete optimizer.weight_decay=delete"


def with_value(path, value, config="mnist"):
    """The experiment of a config file that has a value at a path."""
    config = load_config(f"{config}:tiny")
    *sections, last = path.split(".")
    with config.unlocked():
        place = config
        for name in sections:
            place = place[name]
        if last in place:
            del place[last]
        place[last] = value
    return make_experiment(config)


def value(path, value, says=None, config="mnist"):
    says = rf"^config\.{re.escape(path)}.* (should be|is missing|is unknown)" if not says else says
    name = f"{path} = {value!r}" + ("" if config == "mnist" else f" in {config}")
    return BadInput(name, lambda _: with_value(path, value, config), says)


def override(text, says, config="mnist"):
    act = lambda _: build(config, *text.split()).check()
    return BadInput(f"{config}: {text}", act, says)


test_sections = bad_inputs(
    [
        *(value(name, None) for name in (*NEEDED, "seed")),
        *(value(f"data.{name}", None) for name in ("source", "splits", "batches")),
        *(value(f"conditioning.{name}", None) for name in ("key", "embedders", "embedders.label")),
        *(value(f"hooks.{name}", None) for name in ("hang", "signals")),
        value("loss", None, config="vae_kl_f8"),
        *(value(name, wrong) for name in SECTIONS for wrong in (3, "x", [1]) if name != "seed"),
        *(value(f"{name}.name", wrong) for name in NAMES for wrong in (None, "", 3)),
        *(value(f"{name}.name", "no such") for name in NAMES if name != "data.source"),
        *(value("seed", wrong) for wrong in (-1, 2**32, 1.5, "x", True)),
        *(value(f"hooks.{name}", 3) for name in ("images", "progress", "validation", "nan_stop")),
        value("hooks.imagse", {}, "did you mean 'images'"),
        value("hook", {}, "did you mean 'hooks'"),
    ]
)
test_parts_that_do_not_fit = bad_inputs(
    [
        override("model.num_groups=3", "num_groups = 3 does not divide the 32 channels"),
        override("model.num_heads=5", "num_heads = 5 does not divide the 32 channels"),
        override("model.channel_mult=()", "channel_mult is empty"),
        override("model.attention_resolutions=(3,)", "names no level"),
        override("model.num_res_blocks=(1,2)", r"num_res_blocks = \(1, 2\) should be int"),
        override("model.out_channels=3", r"model\.out_channels = 3 should be 1, the channels of"),
        override("model.num_classes=7", r"model\.num_classes = 7 should be 11"),
        override("model.attention_impl=x", "'x' is unknown; choose"),
        override("model.remat=x", "remat = 'x' is unknown"),
        override("data.batches.image_size=(28,)", r"image_size = \(28,\) should be int"),
        override("data.batches.image_size=27", "27 x 27 pixels"),
        override("mesh.data=3", "should multiply to 1"),
        override("mesh.tensor=2 mesh.data=1", "should multiply to 1"),
        override("train.accumulate=3", "batch_size = 8 should be a multiple of 3"),
        override("checkpoint.keep_best=1 hooks.validation=None", "needs config.hooks.validation"),
        override("data.splits.validation=None", "needs a split: set config.data.splits.validation"),
        override("hooks.early_stopping.patience=1", "monitor is missing"),
        override("guidance.dynamic_percentile=0.9", "works on predicted images"),
        override(f"sampler.name=euler {EULER} sampler.eta=1.0", "eta = 1.0 is not an option"),
        override("sampler.num_steps=2000", "num_steps = 2000"),
        override(f"optimizer.name=polyak_sgd {OTHER}", "constant learning rate only"),
        override(f"optimizer.name=muon {OTHER} optimizer.ns_coeffs=x", "muon.*ns_coeff"),
        override(f"optimizer.name=muon {OTHER} optimizer.ns_steps=1.5", "'muon' makes no step"),
        override("optimizer.weight_decay_mask=x", "'x' is unknown; choose from all, kernels"),
        override("lr_schedule.interpolate_type=x", "is not an option"),
        override("schedule.linear_start=2.0", "linear_start = 2.0 should be above 0 and below 1"),
        override("schedule.parameterization=x", "'x' is unknown; choose from eps"),
        override("conditioning.key=crossattn", "crossattn"),
        override("conditioning.force_uc_zero=(1,)", "force_uc_zero"),
        override("denoiser.name=continuous", "denoiser"),
        override("first_stage.name=x", "first_stage.name = 'x' is unknown"),
        override("latent_cache.folder=x", "needs config.first_stage"),
        override("regularizer.name=kl", "is for the training of first stages"),
        override("data.batches.crop=middle", "crop = 'middle' should be one of 'center'"),
        override("data.batches.resize=cubic", "resize = 'cubic' should be one of 'bicubic'"),
        override("data.batches.channels=2", "channels = 2 should be one of 1, 3"),
        override("checkpoint.mode=best", "mode = 'best' should be one of 'min', 'max'"),
        override("checkpoint.on_damage=x", "on_damage = 'x' should be one of 'stop'"),
        override("model.give_pre_end=True", "give_pre_end = True should be False", "vae_kl_f8"),
        override("guidance.name=cfg", "is for diffusion models", "vae_kl_f8"),
        override("data.batches.image_size=33", "should be a multiple of", "vae_kl_f8"),
        override("data.source.size=0", r"source\.size = 0 should be at least 1", "emoji"),
        override("data.source.folder=/x", r"source\.folder = '/x' is not an option", "emoji"),
        override("data.source.name=image_folder", "source.folder is missing"),
        override("data.source.name=no.module:Nope", "cannot import the module 'no.module'"),
        override("data.source.name=os:nope", "should be an object of your own"),
        override("model.name=jax:jit", "should be an object of your own"),
        override("model.name=os-x:y", "should be written package.module:Object"),
    ]
)


def switched_off(name):
    return Fault(f"the hook {name} is None", lambda _: without_hook(name))


def without_hook(name):
    others = {"validation": ("checkpoint.keep_best=0",)}
    built = build("mnist", f"hooks.{name}=None", *(others[name] if name in others else ()))
    assert name not in built.hooks.hooks and len(built.hooks.hooks) > 4


def without(name):
    with_none, left_out = with_value(name, None), load_config("mnist:tiny")
    if name in left_out:
        with left_out.unlocked():
            del left_out[name]
    assert repr(with_none.hooks) == repr(make_experiment(left_out).hooks)


test_none_is_as_left_out = faults(
    [
        *(switched_off(name) for name in ("images", "scalars", "validation", "progress")),
        *(
            Fault(f"{name} is None", lambda _, name=name: without(name))
            for name in ("checkpoint", "optimizer", "schedule", *OF_FIRST_STAGES)
        ),
    ]
)


@pytest.mark.parametrize(
    "name", [n for n in OPTIONAL if n not in ("guidance", "conditioning", "hooks")]
)
def test_every_section_that_may_be_left_out_may_be_none(name):
    assert with_value(name, None).training.num_steps == 8
