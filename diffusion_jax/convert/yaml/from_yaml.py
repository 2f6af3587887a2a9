"""A YAML config of latent-diffusion or generative-models -> a config file and what is left."""

import os
import pathlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from diffusion_jax.convert.yaml.first_stage import FIRST_STAGE_MODELS, convert_first_stage_model
from diffusion_jax.convert.yaml.ldm import DDPM_CLASSES, SUBCLASSES, convert_ldm
from diffusion_jax.convert.yaml.lightning_tables import NOT_TFDS, TORCH
from diffusion_jax.convert.yaml.parts import Sections
from diffusion_jax.convert.yaml.reading import UNKNOWN, Node, leftovers, read_yaml
from diffusion_jax.convert.yaml.sgm import convert_engine
from diffusion_jax.convert.yaml.source import config_source

# The sections in the order that the files in configs/ have.
ORDER = (
    "seed data first_stage conditioning model regularizer discriminator perceptual schedule "
    "denoiser discretization loss sigma_sampling weighting sampler guidance optimizer "
    "disc_optimizer lr_schedule train hooks checkpoint"
).split()
CONVERTERS: dict[str, Callable[[Node], Sections]] = {
    "DiffusionEngine": convert_engine,
    **dict.fromkeys([*DDPM_CLASSES, *SUBCLASSES], convert_ldm),
    **dict.fromkeys(FIRST_STAGE_MODELS, convert_first_stage_model),
}
# Why a key that no table has is left over, by where it stands.
REASONS = {
    "data.params.": NOT_TFDS,
    "lightning.find_unused_parameters": TORCH,
    "lightning.callbacks.": "there is no such hook; see hooks in docs/training.md",
}


class ConvertedConfig(NamedTuple):
    """A config file of ours as text, and the keys without a counterpart, as "path: why"."""

    source: str
    unmapped: list[str]


def config_from_yaml(path: str | os.PathLike) -> ConvertedConfig:
    """Convert a YAML config of CompVis' ldm or Stability's sgm to the text of a config file.

    Every key of the YAML is in the text, or says what happens here anyway, or is listed in
    `unmapped` together with everything below it. Nothing is built, and no code that the YAML
    names is imported.

    Raises FileNotFoundError, and ValueError for a file that is no YAML, or has no model or an
    unknown one.
    """
    root = read_yaml(path)
    sections = convert_sections(root)
    ordered = {name: sections[name] for name in ORDER if name in sections}
    source = config_source(_docstring(pathlib.Path(path).name, root.chosen), ordered)
    return ConvertedConfig(source, [f"{key}: {_reason(key, why)}" for key, why in leftovers(root)])


def convert_sections(root: Node) -> dict[str, Any]:
    """Convert a YAML to the sections of a config."""
    if not root.has("model"):
        raise ValueError("the YAML has no section `model`, so there is nothing to convert")
    kind = root.child("model").target()
    if kind not in CONVERTERS:
        known = ", ".join(CONVERTERS)
        raise ValueError(f"model.target names {kind!r}, which is unknown; there are {known}")
    sections = {"seed": 0} | CONVERTERS[kind](root)
    return {name: section for name, section in sections.items() if section is not None}


def _docstring(name: str, chosen: Sequence[str]) -> str:
    lines = textwrap.wrap(f"Converted from {name}.", 90, break_on_hyphens=False)
    lines += ["", "docs/migrating.md says what became of each option."]
    if chosen:
        lines += ["", "The YAML does not say these; they were chosen:"]
        for choice in chosen:
            lines += textwrap.wrap(f"- {choice}", 98, subsequent_indent="  ")
    text = "\n".join(lines)
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _reason(path: str, reason: str) -> str:
    places = [why for start, why in REASONS.items() if path.startswith(start)]
    return places[0] if places and reason == UNKNOWN else reason
