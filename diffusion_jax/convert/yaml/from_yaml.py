"""A YAML config of latent-diffusion, Stable Diffusion or generative-models -> a config file of
ours, and all that it could not say."""

import os
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusion_jax.convert.yaml.first_stage import FIRST_STAGE_MODELS, convert_first_stage_model
from diffusion_jax.convert.yaml.ldm import DDPM_CLASSES, SUBCLASSES, convert_ldm
from diffusion_jax.convert.yaml.lightning_tables import NOT_TFDS
from diffusion_jax.convert.yaml.parts import refuse_video
from diffusion_jax.convert.yaml.reading import UNKNOWN, Node, leftovers, read_yaml
from diffusion_jax.convert.yaml.sgm import convert_engine
from diffusion_jax.convert.yaml.source import config_source

# In the order of the files in configs/.
ORDER = (
    "seed data first_stage conditioning model regularizer discriminator perceptual schedule "
    "denoiser discretization loss sigma_sampling weighting sampler guidance optimizer "
    "disc_optimizer lr_schedule train hooks checkpoint"
).split()
# Why a key is left over that no table has, by where it stands.
_REASONS = {
    "data.params.": NOT_TFDS,
    "lightning.logger": "not needed: every run writes metrics.jsonl and TensorBoard events",
    "lightning.strategy": "not needed: mesh.data and mesh.fsdp say how devices share the work",
    "lightning.find_unused_parameters": "not needed: a switch of PyTorch",
    "lightning.callbacks.": "there is no such hook; see hooks in docs/training.md",
}


class ConvertedConfig(NamedTuple):
    """A config file of ours as text, and the keys of the YAML without a counterpart, "path: why"
    each."""

    source: str
    unmapped: list[str]


def config_from_yaml(path: str | os.PathLike) -> ConvertedConfig:
    """Convert a YAML config of CompVis' ldm or Stability's sgm to the text of a config file.

    Every key of the YAML is either in the text, or says what happens here anyway, or is listed in
    `unmapped` (with it all that stands below it). Nothing is built, and no code of the YAML's is
    imported.

    Raises FileNotFoundError, and ValueError for a file that is no YAML, has no model or an unknown
    one, or describes a video model.
    """
    root = read_yaml(path)
    sections, chosen = convert_sections(root)
    ordered = {name: sections[name] for name in ORDER if name in sections}
    source = config_source(_docstring(pathlib.Path(path).name, chosen), ordered)
    return ConvertedConfig(source, [f"{key}: {_reason(key, why)}" for key, why in leftovers(root)])


def convert_sections(root: Node) -> tuple[dict[str, Any], Sequence[str]]:
    """Convert a YAML to the sections of a config; returns what the YAML did not say, too."""
    if not root.has("model"):
        raise ValueError("the YAML has no section `model`, so there is nothing to convert")
    refuse_video(root)
    kind = root.child("model").target()
    if kind == "DiffusionEngine":
        return convert_engine(root)
    if kind in DDPM_CLASSES or kind in SUBCLASSES:
        return convert_ldm(root)
    if kind in FIRST_STAGE_MODELS:
        return convert_first_stage_model(root)
    known = ", ".join(["DiffusionEngine", *DDPM_CLASSES, *SUBCLASSES, *FIRST_STAGE_MODELS])
    raise ValueError(f"model.target names {kind!r}, which is unknown; there are {known}")


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
    if reason != UNKNOWN:
        return reason
    for start, why in _REASONS.items():
        if path.startswith(start):
            return why
    return reason
