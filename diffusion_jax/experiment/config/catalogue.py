"""What every section of a config may hold, as text: keys, types, defaults, choices, descriptions.

The lines come from the same Sections and signatures that bind a config.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.images import ImageOptions
from diffusion_jax.experiment import (
    data,
    experiment,
    guiders,
    hooks,
    noise,
    objective,
    optimizer,
    sampling,
)
from diffusion_jax.experiment.config.binding import (
    DTYPES,
    ConfigError,
    Section,
    Target,
    choices,
    is_dtype,
    kinds_of,
    parameters_of,
    type_name,
)
from diffusion_jax.experiment.config.ranges import range_of
from diffusion_jax.experiment.data import Splits
from diffusion_jax.experiment.first_stage import autoencoding
from diffusion_jax.experiment.first_stage.frozen import FIRST_STAGE
from diffusion_jax.experiment.first_stage.regularizer import REGULARIZER, TEMPERATURE
from diffusion_jax.experiment.latent_options import LATENT_CACHE
from diffusion_jax.experiment.network import building
from diffusion_jax.experiment.network.adapters import ADAPTERS, LAYERS
from diffusion_jax.experiment.network.control import CONTROL
from diffusion_jax.experiment.network.inversion import INVERSION
from diffusion_jax.experiment.pictures import draw_pictures
from diffusion_jax.experiment.prior import PRIOR

NAME = ".NAME"
OWN = "package.module:YourOwn"
WIDTH = 28


def sections() -> dict[str, Section]:
    """Map the path of every section, without "config.", to what it may hold."""
    loss, of_first_stage = objective.LOSS, autoencoding.LOSS
    found = [
        Section("config.seed", "The seed of every random number, an int = 0."),
        data.SOURCE,
        Section("config.data.splits", _first_line(Splits), ((Splits, ()),)),
        Section(
            "config.data.batches",
            _first_line(make_batches),
            ((ImageOptions, data._COLUMNS), (make_batches, (*data._GIVEN, "image_options"))),
        ),
        experiment.TRAIN,
        ADAPTERS,
        LAYERS,
        CONTROL,
        INVERSION,
        optimizer.OPTIMIZER,
        optimizer.LR_SCHEDULE,
        optimizer.EMA,
        experiment.MESH,
        LATENT_CACHE,
        PRIOR,
        experiment.MODEL,
        building.CONDITIONING,
        building.EMBEDDER,
        FIRST_STAGE,
        noise.SCHEDULE,
        noise.DENOISER,
        noise.SCALING,
        noise.TABLE,
        noise.GRID,
        loss._replace(
            table={**loss.table, **of_first_stage.table},
            extras={**loss.extras, "autoencoder": of_first_stage.targets},
        ),
        objective.SIGMA_SAMPLING,
        objective.LEVELS,
        objective.WEIGHTING,
        sampling.SAMPLER,
        guiders.GUIDANCE,
        REGULARIZER,
        TEMPERATURE,
        autoencoding.DISCRIMINATOR,
        autoencoding.PERCEPTUAL,
        autoencoding.DISC_OPTIMIZER,
        *hooks.hook_sections(draw_pictures).values(),
        hooks.CHECKPOINT,
    ]
    return {spec.path.removeprefix("config."): spec for spec in found}


def listing(path: str = "") -> Iterator[str]:
    """Describe one section, all sections below a path, one row of a section, or everything.

    "" lists every section with the names of its rows; "sampler" adds what each row takes; so does
    "sampler.ddim" for that row alone. Raises ConfigError with the choices for another path.
    """
    path = path.removeprefix("config.")
    known = sections()
    parent, _, name = path.rpartition(".")
    chosen = {own: s for own, s in known.items() if not path or f"{own}.".startswith(f"{path}.")}
    if chosen:
        for spec in chosen.values():
            yield from _section(spec, () if not path else spec.table)
            yield ""
        return
    spec = known.get(parent, known.get(parent + NAME))
    if spec is None:
        raise ConfigError(f"config.{path} is not a section; {choices(path, known)}")
    if name not in spec.table:
        raise ConfigError(f"{spec.path}.name = {name!r} is unknown; {choices(name, spec.table)}")
    yield from _section(spec, [name])


def _section(spec: Section, rows: Collection[str]) -> Iterator[str]:
    yield f"{spec.path}: {spec.about}"
    if spec.table:
        names = [*spec.table, *([OWN] if spec.own is not None else [])]
        default = "" if spec.default is None else f" = {spec.default!r}"
        yield f"  {'name':{WIDTH}}one of {', '.join(names)}{default}"
    alike = len(set(spec.table.values())) == 1
    shared = [*spec.targets, *[(f, spec.given) for f in set(spec.table.values()) if alike]]
    yield from _keys(shared, "  ")
    for name in rows:
        extra = spec.extras[name] if name in spec.extras else ()
        lines = list(_keys([*extra, *([] if alike else [(spec.table[name], spec.given)])], "    "))
        if not alike or lines:
            yield f"  {name}: {_first_line(spec.table[name])}"
            yield from lines


def _keys(targets: Collection[Target], indent: str) -> Iterator[str]:
    for function, given in targets:
        for key, parameter in parameters_of(function, given).items():
            annotation = parameter.annotation
            kind = "any" if annotation in (Any, inspect.Parameter.empty) else type_name(annotation)
            default = parameter.default
            if is_dtype(key, annotation):
                kind = f"one of {', '.join(map(repr, DTYPES))}"
                default = getattr(default, "__name__", default)
            required = default is inspect.Parameter.empty
            words = _range(function, key, annotation)
            yield (
                f"{indent}{key:{WIDTH - 1}} {kind}{', required' if required else f' = {default!r}'}"
                f"{f' ({words})' if words else ''}"
            )


def _range(function: Callable, key: str, annotation: Any) -> str:
    wanted = range_of(function, key) if kinds_of(annotation) & {int, float} else None
    return "" if wanted is None else wanted.in_words()


def _first_line(function: Callable) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
