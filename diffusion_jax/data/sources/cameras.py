"""What a user's files say of the cameras of videos: angles in degrees, checked."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.wording import counted

# The names of the angles, in files, in records, and of the options of `sample`.
ELEVATIONS, AZIMUTHS = "elevations", "azimuths"
_FILE = "cameras.json"
_SHAPE = '{"elevations": 10, "azimuths": [0, 90, 180, 270]}'


class Cameras(NamedTuple):
    """Where cameras are, in degrees: of each frame of a video, or of each view of an object.

    elevations: above the horizon. azimuths: around the upright axis; a camera whose azimuth grows
    moves to its right.
    """

    elevations: tuple[float, ...]
    azimuths: tuple[float, ...]


def cameras_in(fields: Mapping[str, Any], where: str) -> Cameras | None:
    """Read the angles among the fields of a line or file; None where it says neither.

    They are numbers, lists of numbers, or texts with numbers and commas in a table. One number
    stands for every frame. where: for messages.

    Raises:
        ValueError: what is no finite number, an elevation that is not between -90 and 90, one of
            the two alone, or another number of one than of the other.
    """
    given = {name: fields[name] for name in (ELEVATIONS, AZIMUTHS) if name in fields}
    given = {name: value for name, value in given.items() if value not in (None, "", [])}
    if not given:
        return None
    if len(given) < 2:
        (name,) = given
        other = ELEVATIONS if name == AZIMUTHS else AZIMUTHS
        raise ValueError(f"{where} has {name} and no {other}; give both, in degrees")
    above, around = (_numbers(name, value, where) for name, value in given.items())
    for elevation in above:
        if abs(elevation) > 90.0:
            raise ValueError(
                f"{where}: {ELEVATIONS} has {elevation:g} and should have degrees between -90 and "
                "90"
            )
    count = max(len(above), len(around))
    if 1 < min(len(above), len(around)) < count:
        raise ValueError(
            f"{where} has {len(above)} {ELEVATIONS} and {len(around)} {AZIMUTHS}; it should have "
            "as many of one as of the other, or one elevation for all"
        )
    return Cameras(*(own * count if len(own) == 1 else own for own in (above, around)))


def read_cameras(file: Path) -> Cameras:
    """Read a file of JSON with the angles of the cameras of an object's views.

    Raises ValueError for what it cannot mean, see cameras_in.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); it should be like {_SHAPE}") from error
    except OSError as error:
        raise OSError(f"{file} cannot be read ({error.strerror})") from error
    cameras = cameras_in(fields, str(file)) if isinstance(fields, dict) else None
    if cameras is None:
        raise ValueError(f"{file} should be an object like {_SHAPE}")
    return cameras


def find_cameras(folder: Path, root: Path) -> Path | None:
    """Find the file with the cameras of an object: in its folder, or above it up to the root."""
    for place in (folder, *folder.parents):
        if (place / _FILE).is_file():
            return place / _FILE
        if place == root:
            break
    return None


def check_count(cameras: Cameras, count: int, where: str, what: str = "frame") -> None:
    """Raise ValueError unless there are as many angles as frames, or views. where: for messages."""
    if len(cameras.azimuths) != count:
        raise ValueError(
            f"{where} has {counted(count, what, f'{what}s')} and "
            f"{counted(len(cameras.azimuths), 'camera', 'cameras')}; give one azimuth for each "
            f"{what}"
        )


def _numbers(name: str, value: Any, where: str) -> tuple[float, ...]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    values = list(value) if isinstance(value, Sequence) else [value]
    found = []
    for number in values:
        try:
            found.append(math.nan if isinstance(number, bool) else float(number))
        except (OverflowError, TypeError, ValueError):
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise ValueError(f"{where}: {name} has {number!r:.80} and should have finite degrees")
    return tuple(found)
