"""A writer for tests of whatever writes metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from diffusion_jax.train.writers import Writer


class Written(NamedTuple):
    """What a memory writer was given, {step: {name: value}} of each kind."""

    scalars: dict[int, dict[str, Any]]
    images: dict[int, dict[str, Any]]
    texts: dict[int, dict[str, Any]]


@pytest.fixture
def memory_writer() -> Callable[[], tuple[Writer, Written]]:
    """Make writers that keep everything in dicts: () -> (writer, what was written)."""

    def make() -> tuple[Writer, Written]:
        written = Written({}, {}, {})
        keep = lambda kind, step, values: kind.setdefault(step, {}).update(values)
        writer = Writer(
            write_scalars=lambda step, scalars: keep(written.scalars, step, scalars),
            write_images=lambda step, images: keep(written.images, step, images),
            write_texts=lambda step, texts: keep(written.texts, step, texts),
        )
        return writer, written

    return make
