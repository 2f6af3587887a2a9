"""A config as data comes back as it was, references included, and runs nothing."""

import json
import math

import ml_collections
import pytest
from ml_collections.config_dict import placeholder

from diffusion_jax.experiment.config.as_json import from_data, read_json, to_data, write_json
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config


def through_json(config):
    return from_data(json.loads(json.dumps(to_data(config), allow_nan=False)), "here")


def literals():
    values = dict(whole=1, real=1.0, text="a", none=None, yes=True, huge=math.inf, empty={})
    values |= dict(pair=(1, (2.0, None)), items=[1, (2,)], rows=({"a": (1,)}, {"b": 2}))
    return ml_collections.ConfigDict(dict(values, section=dict(values, deep=dict(values))))


def test_literals_keep_their_types():
    found = through_json(literals())
    assert repr(found.to_dict()) == repr(literals().to_dict())
    assert isinstance(found.section.deep, ml_collections.ConfigDict)
    assert isinstance(found.pair, tuple) and isinstance(found["items"], list)


def referring():
    config = ml_collections.ConfigDict(dict(train=dict(steps=10), b=dict(x=1)))
    steps = config.train.get_ref("steps")
    config.a = dict(same=steps, double=steps * 2, later=config.train.get_oneway_ref("steps"))
    config.a.more = 1 + steps - 3
    config.a.half = steps.to_float() / 4
    config.a.sum = config.a.get_ref("double") + steps
    config.also = config.b
    config.count = placeholder(int)
    return config


def test_references_follow_after_a_round_trip_as_before():
    for make in (
        referring,
        lambda: through_json(referring()),
        lambda: through_json(through_json(referring())),
    ):
        config = make()
        config.train.steps = 20
        config.b.x = 5
        assert (config.a.same, config.a.double, config.a.later) == (20, 40, 20)
        assert (config.a.more, config.a.half, config.a.sum, config.also.x) == (18, 5.0, 60, 5)
        config.a.later = 7
        assert config.train.steps == 20  # one way only
        config.a.same = 6
        assert config.train.steps == 6
        assert config.count is None
        with pytest.raises(TypeError):
            config.count = "many"


def test_a_function_of_a_reference_is_kept_as_its_value(caplog):
    config = ml_collections.ConfigDict(dict(a=3))
    config.square = config.get_ref("a") ** 2
    found = through_json(config)
    found.a = 5
    assert found.square == 9 and "config.square is computed by a function" in caplog.text


def test_a_shipped_config_comes_back():
    config = load_config("configs/mnist.py:tiny")
    found = through_json(config)
    assert found.to_dict() == config.to_dict()
    found.train.num_steps = 40
    assert found.lr_schedule.decay_steps == 40


@pytest.mark.parametrize("value", [object(), print, {1, 2}, b"x", (object(),)])
def test_what_is_no_literal_is_refused(value):
    config = ml_collections.ConfigDict()
    config.own = dict(thing=value)
    with pytest.raises(ConfigError, match=r"config\.own\.thing.* should be a number, a text"):
        to_data(config)


@pytest.mark.parametrize("key", ["$of", 3])
def test_a_key_that_data_cannot_have_is_refused(key):
    with pytest.raises(ConfigError, match="should be a text without"):
        to_data(ml_collections.ConfigDict({"s": {key: 1}}))


@pytest.mark.parametrize(
    "data",
    [
        {"a": {"$same": "nowhere"}},
        {"a": {"$same": "a"}},
        {"a": {"$same": "b"}, "b": {"$same": "a"}},
        {"a": {"$what": 1}},
        {"a": {"$of": 2, "$ops": [["pow", 10**9]]}},
        {"a": {"$of": 2, "$ops": [["__import__", 1]]}},
        {"a": {"$of": "x", "$ops": [["mul", 10**9]]}},
        {"a": {"$of": "%99999999d", "$ops": [["mod", 1]]}},
        {"a": {"$of": 2, "$ops": [["mul", 1e299]] * 9}},
        {"a": {"$tuple": 3}},
        [],
        None,
    ],
)
def test_data_of_another_kind_are_one_sentence(data):
    with pytest.raises(ConfigError, match=r"^some file holds no config: .{5,200}$"):
        from_data(data, "some file")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"[" * 10**6, b'{"a": 1}}'])
def test_a_cut_or_strange_file_is_one_sentence(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="config.json (is empty, cut or no JSON|holds list)"):
        read_json(path)


def test_a_file_is_replaced_whole_and_after_its_bytes_are_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "new" / "config.json"
    write_json(path, {"a": 1})
    synced = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(path.read_text()))
    write_json(path, {"a": 2})
    assert [json.loads(text)["a"] for text in synced] == [1, 2]  # the file, then its folder
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 2}
