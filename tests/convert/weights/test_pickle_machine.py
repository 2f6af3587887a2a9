"""A machine that carries out a pickle without calling anything."""

import collections
import pickle

import pytest

from diffusion_jax.convert.weights.pickle_machine import INERT, Answers, Inert, run_pickle

NOTHING = Answers(lambda module, name: INERT, lambda what, arguments: INERT, lambda pid: pid)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_what_pickle_makes_of_them(protocol):
    shared = ["a"]
    value = {
        "numbers": [0, -1, 255, 65_536, 2**40, 2**3000, 1.5],
        "words": ["", "ä", b"", b"x" * 300, "y" * 300],
        "others": [None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "shared": [shared, shared],
        7: {},
    }
    expected = value if protocol >= 3 else value | {"words": run(value["words"], protocol)}
    assert run(value, protocol) == expected


def run(value, protocol):
    return run_pickle(pickle.dumps(value, protocol), NOTHING)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_objects_are_nothing_and_keep_their_surroundings(protocol):
    found = run({"a": collections.Counter("aab"), "b": {1, 2}, "c": 3}, protocol)
    assert found["c"] == 3 and isinstance(found["a"], Inert) and isinstance(found["b"], Inert)


def test_calls_and_names_are_asked_for():
    asked = []
    answers = Answers(
        lambda module, name: asked.append((module, name)) or name,
        lambda what, arguments: (what, arguments),
        lambda pid: pid,
    )
    value = run_pickle(pickle.dumps(collections.OrderedDict, 2), answers)
    assert (value, asked) == ("OrderedDict", [("collections", "OrderedDict")])
    assert run_pickle(b"\x80\x02cos\nsystem\n(U\x02lstR.", answers) == ("system", ("ls",))
    assert run_pickle(b"(U\x02lsios\nsystem\n.", answers) == ("system", ("ls",))
    assert run_pickle(b"(cos\nsystem\nU\x02lso.", answers) == ("system", ("ls",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "pickle exhausted before seeing STOP"),
        (b"NN.", "TypeError|too many values"),
        (b"a.", "IndexError"),
        (b"h\x07.", "KeyError: 7"),
        (b"\x82\x01.", "instruction EXT1, which no list of weights needs"),
        (b"Px\n.", "instruction PERSID, which no list"),
        (b"\xfe.", "opcode"),
    ],
)
def test_damage_is_told(content, message):
    with pytest.raises(ValueError, match=message):
        run_pickle(content, NOTHING)
