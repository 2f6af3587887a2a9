"""YAML files as OmegaConf reads them."""

from diffusion_jax.convert.yaml.reading import leftovers, read_yaml, root_node


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
