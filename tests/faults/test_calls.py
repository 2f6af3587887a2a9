"""Calls of a Pipeline with values that are not its own: told before anything is compiled."""

import functools
import math

import numpy as np
from faults.frame import BadInput, bad_inputs
from support.experiments import built, trained

from diffusion_jax import Pipeline

TINY = "configs/mnist.py:tiny"
IMAGE = np.zeros((28, 28, 1), np.uint8)
WHOLE, NUMBER = "should be a whole number", "should be a finite number"
CLASSES = {
    "none": (None, "this model is conditional"),
    "10 of 10": ([10], "class 10 is out of range; this model has the classes 0 to 9"),
    "below 0": ([-1], "class -1 is out of range"),
    "a half": ([1.5], WHOLE),
    "None in a list": ([None], WHOLE),
    "True": ([True], WHOLE),
    "NaN": ([math.nan], WHOLE),
    "floats of NumPy": (np.array([1.0]), WHOLE),
    "a table": (np.zeros((2, 2), int), WHOLE),
    "lists in a list": ([[1]], WHOLE),
    "bytes": (b"7", WHOLE),
    "an unknown input": ({"x": [1]}, r"conditions\['x'\] is no input"),
    "an empty dict": ({}, "needs conditions"),
    "an empty list": ([], "should be at least 1 image"),
}
OPTIONS = {
    "n": {
        0: "at least 1", -1: "at least 1", 10**12: "at most 1,000,000 in a call", 1.5: WHOLE,
        "3": WHOLE, True: WHOLE,
    },
    "num_steps": {
        0: "num_steps = 0", -1: "num_steps = -1", 1001: "num_steps", 1.5: WHOLE, "5": WHOLE,
        math.nan: WHOLE, 10**30: "num_steps", (5, 5): WHOLE,
    },
    "guidance_scale": {"x": "guidance_scale", math.nan: "guidance_scale", math.inf: "guidance_sc"},
    "seed": {1.5: WHOLE, "x": WHOLE, True: WHOLE, math.nan: WHOLE},
    "batch_size": {0: "should be at least 1", 1.5: WHOLE},
    "height": {27: "should be multiples of 2", 0: "multiples", -28: "multiples", "28": WHOLE},
    "strength": {0.5: "needs an image to begin with", "x": NUMBER},
    "denoising_start": {0.5: "needs latents", 2.0: "two numbers from 0 to 1", "x": NUMBER},
    "denoising_end": {0.0: "two numbers from 0 to 1", math.nan: NUMBER},
    "negative": {"x": "negative = 'x' should be a dict by input"},
}  # fmt: skip
TOGETHER = {
    "an image alone": ({"image": IMAGE}, "an image needs strength"),
    "a mask alone": ({"mask": IMAGE}, "inpainting needs both image and mask"),
    "noise of another size": ({"noise": np.zeros((1, 2))}, "noise has shape"),
    "noise of texts": ({"noise": np.array("x")}, "noise has dtype"),
    "noise of steps of another size": ({"step_noise": np.zeros(2)}, "step_noise has shape"),
    "strength 0": ({"image": IMAGE, "strength": 0.0}, "strength"),
    "strength 2": ({"image": IMAGE, "strength": 2.0}, "strength"),
    "strength NaN": ({"image": IMAGE, "strength": math.nan}, NUMBER),
    "a start behind the end": (
        {"denoising_start": 0.9, "denoising_end": 0.1}, "two numbers from 0 to 1",
    ),
    "three classes for two images": ({"conditions": [1, 2, 3], "n": 2}, "does not fit 3"),
    "latents of another size": (
        {"latents": np.zeros((1, 3, 3, 1)), "denoising_start": 0.5}, "latents has shape",
    ),
    "latents of NaN": (
        {"latents": np.full((1, 28, 28, 1), np.nan), "denoising_start": 0.5}, "not finite",
    ),
}  # fmt: skip


@functools.cache
def pipeline():
    drawn = trained(TINY)
    return Pipeline(built(TINY), drawn.params, drawn.frozen)


def call(name, options, says):
    return BadInput(f"a call: {name}", lambda _: pipeline()(**{"conditions": 7} | options), says)


test_calls = bad_inputs(
    [
        *(call(f"class {name}", {"conditions": c}, says) for name, (c, says) in CLASSES.items()),
        *(
            call(f"{key} = {value!r}", {key: value}, says)
            for key, values in OPTIONS.items()
            for value, says in values.items()
        ),
        *(call(name, *row) for name, row in TOGETHER.items()),
    ]
)
