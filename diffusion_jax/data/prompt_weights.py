"""Weights in prompts: "a (red:1.3) fox" -> pieces of text, each with what multiplies its tokens.

The notation is the one that web interfaces of Stable Diffusion have made common.
"""

import re
from itertools import groupby

# What brackets without a number multiply by, or divide by.
STEP = 1.1
_BRACKETS = {"(": ")", "[": "]"}
_OPENING = {close: open for open, close in _BRACKETS.items()}
# A number at the end of round brackets.
_NUMBER = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt where the weight changes -> [(text, weight), ...], without the notation.

    (text) weighs 1.1, [text] weighs 1 / 1.1, (text:1.3) weighs 1.3; brackets within brackets
    multiply. A backslash before a bracket or a backslash makes it an ordinary character. A bracket
    that is not closed reaches to the end, and one that nothing opened is an ordinary character.
    """
    letters: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    at = 0
    while at < len(prompt):
        letter, number = prompt[at], _NUMBER.match(prompt, at)
        if letter == "\\" and prompt[at + 1 : at + 2] in {*"()[]\\"}:
            letter, at = prompt[at + 1], at + 1
        elif letter in _BRACKETS:
            opened[letter].append(len(letters))
            letter = ""
        elif number is not None and opened["("]:
            close("(", float(number[1]))
            letter, at = "", number.end() - 1
        elif letter in _OPENING and opened[_OPENING[letter]]:
            close(_OPENING[letter], STEP if letter == ")" else 1 / STEP)
            letter = ""
        at += 1
        letters += letter
        weights += [1.0] * len(letter)
    for bracket, starts in opened.items():
        for _ in [*starts]:
            close(bracket, STEP if bracket == "(" else 1 / STEP)
    return _runs(letters, weights)


def _runs(letters: list[str], weights: list[float]) -> list[tuple[str, float]]:
    pairs = zip(letters, weights, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [("".join(letter for letter, _ in run), weight) for weight, run in runs]
