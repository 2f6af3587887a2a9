"""Every option that the catalogue lists, with values that it does not take."""

import math
import re
import types
import typing
from collections.abc import Mapping, Sequence

import pytest
from faults.frame import BadInput, bad_inputs

from diffusion_jax.experiment.config.binding import (
    ConfigError,
    bind_shared,
    is_dtype,
    kinds_of,
    parameters_of,
    plain_type,
)
from diffusion_jax.experiment.config.catalogue import sections
from diffusion_jax.experiment.config.ranges import range_of


def targets(spec):
    yield from spec.targets
    yield from ((function, spec.given) for function in spec.table.values())
    for extras in spec.extras.values():
        yield from extras


def shaped(annotation, number):
    """A value of the form that an option has, made of one number."""
    alone = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if alone else (annotation,)
    if {int, float} & set(parts):
        return number
    for part in parts:
        origin, arguments = typing.get_origin(part), typing.get_args(part)
        if origin is tuple:
            return (number,) * (1 if arguments[-1] is ... else len(arguments))
        if origin is Sequence:
            return (number,)
        if origin is Mapping:
            return {"kl": number}
    raise TypeError(annotation)


def outside(function, key):
    """Numbers just outside of the range of an option."""
    wanted = range_of(function, key)
    if math.isfinite(wanted.low):
        yield wanted.low if wanted.above else wanted.low - 1
    if math.isfinite(wanted.high):
        yield wanted.high if wanted.below else wanted.high + 1


def wrong_values(function, key, annotation):
    """Values that an option of this type and range should refuse."""
    if is_dtype(key, annotation):
        return ["x", 3, {}]
    plain = plain_type(annotation)
    kinds = kinds_of(plain)
    if typing.Literal in kinds and not kinds & {int, float}:
        return ["x", (9,)]
    if typing.Any in kinds:
        return [3, "x"] if dict in map(typing.get_origin, [plain, *typing.get_args(plain)]) else []
    values = [] if str in kinds else ["x"]
    if kinds & {int, float}:
        low = next(outside(function, key), math.inf)
        return values + [shaped(plain, number) for number in (math.nan, low)]
    return [*values, 3] if kinds != {bool, str} else [(3,)]


def cases():
    seen = set()
    for spec in sections().values():
        for function, given in targets(spec):
            for key, parameter in parameters_of(function, given).items():
                if (spec.path, key) in seen:
                    continue
                seen.add((spec.path, key))
                for value in wrong_values(function, key, parameter.annotation):
                    yield case(spec.path, function, given, key, value)


def case(path, function, given, key, value):
    def act(_):
        bind_shared({key: value}, path, (function, given))

    says = rf"^{re.escape(f'{path}.{key} = ')}.* (should be|is unknown; choose from)"
    return BadInput(f"{path}.{key} = {value!r}", act, says)


CASES = list(cases())
test_options = bad_inputs(CASES)


def test_the_catalogue_gives_cases_of_every_section():
    tried = {case.name.partition(" ")[0].rpartition(".")[0] for case in CASES}
    bare = {spec.path for spec in sections().values() if any(True for _ in targets(spec))}
    assert len(CASES) > 500
    assert tried >= {p for p in bare if any(keys(p))}


def test_every_option_refuses_every_value_that_is_not_its_own():
    """The same for many more values, and for each row of each table; one loop for speed."""
    tried = 0
    for spec in sections().values():
        for function, given in targets(spec):
            for key, parameter in parameters_of(function, given).items():
                for value in more_wrong_values(function, key, parameter.annotation):
                    says = rf"^{re.escape(f'{spec.path}.{key} = ')}[^\n]* should be [^\n]+$"
                    with pytest.raises(ConfigError, match=says):
                        bind_shared({key: value}, spec.path, (function, given))
                    tried += 1
    assert tried > 5000


def more_wrong_values(function, key, annotation):
    plain = plain_type(annotation)
    kinds = kinds_of(plain)
    if is_dtype(key, annotation) or not kinds & {int, float}:
        return []
    numbers = [math.nan, -math.inf, 10**40, *outside(function, key)]
    numbers += [] if range_of(function, key).holds(math.inf) else [math.inf, 1e300]
    numbers += [1.5] if float not in kinds else []
    values = [shaped(plain, number) for number in numbers]
    values += [True] if bool not in kinds else []
    values += [""] if str not in kinds else []
    values += [None] if types.NoneType not in kinds else []
    return [*values, object(), {"x": "y"}]


def keys(path):
    spec = next(spec for spec in sections().values() if spec.path == path)
    for function, given in targets(spec):
        yield from parameters_of(function, given)
