"""YAML files as OmegaConf reads them."""

import pytest

from diffusion_jax.convert.yaml.reading import NUMBER, leftovers, read_yaml, root_node


def test_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {a: 1e-4, b: [1.e-6, 3E5], c: 1e4x}")
    assert read_yaml(path).values["model"] == {"a": 1e-4, "b": [1e-6, 3e5], "c": "1e4x"}


def test_references_are_resolved_wherever_they_point(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: {b: [1, {c: 1e-4}], d: '${a.b.1}'}\nmodel: ['${a.d}', 'x ${a.b.0} y']")
    assert read_yaml(path).values["model"] == [{"c": 1e-4}, "x 1 y"]


def test_what_nothing_took_is_listed_at_the_highest_path():
    root = root_node({"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": [{"g": 4}, {"h": 5}], "i": None})
    root.child("a").child("c").take("d")
    root.children("f")[0].take("g")
    root.child("a").note("b", "because")
    root.child("a").note("absent", "because")
    unknown = "no such option is known here"
    assert dict(leftovers(root)) == {
        "a.b": "because", "a.c.e": unknown, "f.1": unknown, "i": unknown,
    }  # fmt: skip
    assert root.take("i", 3) == 3 and root.peek("a")["b"] == 1 and root.child("i").values == {}
    assert "i" not in dict(leftovers(root))


LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))
REFERENCES = "\n".join(f"a{i}: ['${{a{i - 1}}}', '${{a{i - 1}}}']" for i in range(1, 60))
MERGES = "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 13))
TEXTS = "\n".join(f"a{i}: '${{a{i - 1}}}${{a{i - 1}}}'" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "cannot be read as YAML: the key 'a' stands twice .*line 1"),
        ("model: {x: {c: 1, c: 1}}", "the key 'c' stands twice"),
        ("a: " + "[" * 5000, "x.yaml cannot be read as YAML"),
        ("a0: &a0 [x]\n" + LAUGHS, "unfolds to more than 20,000 values"),
        ("a0: [x]\n" + REFERENCES, "unfolds to more than 20,000 values"),
        ("a0: xxxxxxxx\n" + TEXTS, "unfolds to more than 20,000 values"),
        ("a0: &a0 {x: 1}\n" + MERGES, "`<<` unfolds to more than 20,000 values"),
        ("a: '" + "${b}" * 11 + "'\nb: x", "more than 10 references"),
        ("a: 1" + ":1" * 1000, "a number of .* bits"),
        ("a: " + "9" * 5000, "x.yaml cannot be read as YAML"),
        ("a: 2001-99-99", "x.yaml cannot be read as YAML: month"),
        ("a: !!bool x", "x.yaml cannot be read as YAML"),
        ("".join(f"k{i}: 1\n" for i in range(5000)) + "k7: 1", "the key 'k7' stands twice"),
        ("&a [*a]", "x.yaml should hold a mapping with the key model"),
        ("a: &a [*a]", "x.yaml cannot be read as YAML: it is nested too deeply"),
        ("a: " + "x" * 100_000, "has more than 100,000 bytes"),
    ],
)
def test_a_yaml_that_is_no_config_is_refused_at_once(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(path)


def test_anchors_and_merged_keys_stay_what_they_are(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {b: 1, c: 2}\nmodel: {<<: *a, c: 3, d: *a}")
    assert read_yaml(path).values["model"] == {"b": 1, "c": 3, "d": {"b": 1, "c": 2}}


@pytest.mark.parametrize("value", [".nan", "true", "[1]", "x"])
def test_a_number_is_a_number(value, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(f"model: {{base_learning_rate: {value}}}")
    with pytest.raises(ValueError, match=r"model.base_learning_rate = .* should be (a number|int)"):
        read_yaml(path).child("model").take("base_learning_rate", 1e-5, NUMBER)
