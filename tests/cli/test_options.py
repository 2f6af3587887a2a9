"""`options` prints what binding accepts: every section, its keys, types, defaults and choices."""

import pytest

from diffusion_jax.cli import main
from diffusion_jax.experiment.config.catalogue import listing, sections
from diffusion_jax.experiment.config.files import SHIPPED, load_config
from diffusion_jax.experiment.experiment import SECTIONS

CONFIGS = sorted(path.stem for path in SHIPPED[1].glob("*.py"))


def printed(capsys, *arguments):
    assert main(["options", *arguments]) == 0
    return capsys.readouterr().out


def test_every_section_of_a_config_is_listed(capsys):
    text = printed(capsys)
    assert set(SECTIONS) == {path.partition(".")[0] for path in sections()}
    for path in sections():
        assert f"config.{path}: " in text
    assert (
        "accumulate                  int = 1 (at least 1)\n" in text
        and "batch_size                  int, requ" in text
    )
    assert "one of linear, cosine, sqrt_linear, sqrt, squaredcos_cap_v2 = 'linear'" in text


def test_a_section_lists_what_each_name_takes(capsys):
    text = printed(capsys, "sampler")
    assert "config.sampler: How samples are drawn" in text
    assert "  num_steps                   int = 50 (at least 1)\n" in text
    assert "  ddim: Make the DDIM sampler: x_prev = " in text
    assert "    eta                         float = 0.0 (between 0 and 1)\n" in text
    assert "    discretize                  one of 'uniform', 'uniform_ldm', " in text
    assert "parameterization" not in text  # the schedule's, which the sampler is given
    one = printed(capsys, "config.sampler.lms")
    assert "  lms: " in one and "order                       int = 4" in one and "ddim: " not in one
    assert "package.module:YourOwn" in one


def test_sections_below_a_path_are_listed_together(capsys):
    text = printed(capsys, "hooks")
    assert "config.hooks.images: " in text and "config.hooks.nan_stop: " in text
    assert "config.train" not in text
    assert "max_images                  int = 4" in printed(capsys, "hooks.images")
    text = printed(capsys, "conditioning.embedders.class_label")
    assert "num_classes                 int, required" in text and "clip_text: " not in text
    assert (
        "dtype                       one of 'float32', 'bfloat16', 'float16' = 'float32'"
        in printed(capsys, "model.unet")
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "samplr",
            "config.samplr is not a section; did you mean 'sampler'? choose from adapters",
        ),
        ("sampler.dim", "config.sampler.name = 'dim' is unknown; did you mean 'ddim'? choose from"),
        ("hooks.image", "config.hooks.image is not a section; did you mean 'hooks.images'?"),
    ],
)
def test_what_is_not_there_is_told(path, message, capsys):
    assert main(["options", path]) == 2
    assert message in capsys.readouterr().err


def leaves(tree, prefix=""):
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and path not in VALUES:
            yield from leaves(value, path)
        elif key != "name":
            yield path


VALUES = ("loss.regularization_weights",)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_the_shipped_configs_is_listed(name):
    for path in leaves(load_config(name).to_dict()):
        parent, _, key = path.rpartition(".")
        where = "conditioning.embedders" if parent.startswith("conditioning.embedders.") else parent
        lines = list(listing(where or key))
        assert any(line.split()[:1] == [key] for line in lines) or not parent, path
