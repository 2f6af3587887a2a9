"""What files say of cameras: degrees, or one sentence that names the file."""

import re

import pytest

from diffusion_jax.data.sources.cameras import (
    Cameras,
    cameras_in,
    check_count,
    find_cameras,
    read_cameras,
)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"caption": "x"}, None),
        ({"elevations": None, "azimuths": ""}, None),
        ({"elevations": 5, "azimuths": [0, 90.5]}, ((5.0, 5.0), (0.0, 90.5))),
        ({"elevations": [1, -90], "azimuths": [-10, 720]}, ((1.0, -90.0), (-10.0, 720.0))),
        ({"elevations": "5", "azimuths": "0, 90 180"}, ((5.0,) * 3, (0.0, 90.0, 180.0))),
        ({"azimuths": 3, "elevations": 4}, ((4.0,), (3.0,))),
    ],
)
def test_angles(fields, found):
    assert cameras_in(fields, "it") == (found and Cameras(*found))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"azimuths": [0, 1]}, "a.jsonl:3 has azimuths and no elevations; give both, in degrees"),
        ({"elevations": 0}, "a.jsonl:3 has elevations and no azimuths"),
        ({"elevations": [0, 1], "azimuths": [0, 1, 2]}, "has 2 elevations and 3 azimuths; it sho"),
        ({"elevations": 100, "azimuths": [0]}, "elevations has 100 and should have degrees betwe"),
        ({"elevations": 0, "azimuths": [0, "x"]}, "a.jsonl:3: azimuths has 'x' and should have f"),
        ({"elevations": 0, "azimuths": [0, None]}, "azimuths has None and should have finite"),
        ({"elevations": 0, "azimuths": [float("inf")]}, "azimuths has inf and should have finite"),
        ({"elevations": True, "azimuths": [0]}, "elevations has True and should have finite"),
        ({"elevations": 0, "azimuths": {"a": 1}}, "azimuths has {'a': 1} and should have finite"),
        ({"elevations": 0, "azimuths": [10**400]}, "azimuths has 1000.* and should have finite"),
    ],
)
def test_what_is_no_angle_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        cameras_in(fields, "a.jsonl:3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"elevations": 0, "azimuths": [NaN]}', "azimuths has nan and should have finite degrees"),
        ("[0, 90]", "should be an object like"),
        ('{"azimuth": 3}', "should be an object like"),
        (b"\xff", "is not JSON"),
    ],
)
def test_files_that_say_nothing_are_named(tmp_path, text, message):
    file = tmp_path / "cameras.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.* {message}|{file}: {message}"):
        read_cameras(file)


def test_the_nearest_file_is_taken(tmp_path):
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    assert find_cameras(folder, tmp_path / "a") is None
    (tmp_path / "cameras.json").touch()
    assert find_cameras(folder, tmp_path / "a") is None
    assert find_cameras(folder, tmp_path) == tmp_path / "cameras.json"
    (folder / "cameras.json").touch()
    assert find_cameras(folder, tmp_path) == folder / "cameras.json"


def test_counts():
    check_count(Cameras((0.0, 0.0), (0.0, 1.0)), 2, "a.mp4")
    with pytest.raises(ValueError, match="a.mp4 has 1 frame and 2 cameras; give one azimuth for e"):
        check_count(Cameras((0.0, 0.0), (0.0, 1.0)), 1, "a.mp4")
