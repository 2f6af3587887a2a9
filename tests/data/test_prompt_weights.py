"""The notation of weighted prompts, as a table."""

import pytest

from diffusion_jax.data.prompt_weights import STEP, parse_weights

UP, DOWN = STEP, 1 / STEP


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("a red fox", [("a red fox", 1.0)]),
        ("a (red) fox", [("a ", 1.0), ("red", UP), (" fox", 1.0)]),
        ("a [red] fox", [("a ", 1.0), ("red", DOWN), (" fox", 1.0)]),
        ("a (red:1.3) fox", [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]),
        ("(a:.5)(b: 2 )", [("a", 0.5), ("b", 2.0)]),
        ("(a:-1)", [("a", -1.0)]),
        ("((a))", [("a", UP * UP)]),
        ("[[a]]", [("a", DOWN * DOWN)]),
        ("(a (b:2) c:3)", [("a ", 3.0), ("b", 6.0), (" c", 3.0)]),
        ("([a])", [("a", DOWN * UP)]),
        ("(one)(two)", [("onetwo", UP)]),
        (r"a \(red\) fox \[b\] \\", [("a (red) fox [b] \\", 1.0)]),
        (r"(a \(b\):2)", [("a (b)", 2.0)]),
        (r"c:\d", [(r"c:\d", 1.0)]),
        ("(open", [("open", UP)]),
        ("a ((open", [("a ", 1.0), ("open", UP * UP)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a:1.2) b", [("a:1.2) b", 1.0)]),
        ("(a:b)", [("a:b", UP)]),
        ("(a:1.2.3)", [("a:1.2.3", UP)]),
        ("[a:1.2]", [("a:1.2", DOWN)]),
        ("16:9 (wide:1.5)", [("16:9 ", 1.0), ("wide", 1.5)]),
        ("()", []),
    ],
)
def test_weights_of_prompts(prompt, pieces):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])
