"""What a call of Pipeline makes of an image and a mask."""

from typing import Any

import numpy as np

from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.staged import MASK, MASKED_IMAGE, ORIGINAL, staged_inputs
from diffusion_jax.runs.inputs.arrays import as_image, as_mask, as_rows, check_image_use
from diffusion_jax.runs.inputs.fitting import RESIZES, Resize, extend

# image: uint8 [b h w c]. mask: float32 [b h w 1], 1 where the image is kept.
Pictures = dict[str, np.ndarray]


def check_pictures(
    network: Network, image: Any, mask: Any, strength: Any, resize: str | None
) -> None:
    """Raise ValueError where image, mask, strength and resize are not what the model takes.

    A model that reads images may have its own among its conditions.
    """
    if resize is not None and resize not in RESIZES:
        raise ValueError(f"resize = {resize!r} is unknown; choose from {', '.join(RESIZES)}")
    if resize is not None and image is None:
        raise ValueError(f"resize = {resize!r} needs an image to fit")
    check_image_use(image, mask, strength, is_read=bool(staged_inputs(network.embedders)))


def pictures_of_call(
    network: Network,
    image: Any,
    mask: Any,
    count: int,
    shape: tuple[int, int, int],
    resize: Resize | None,
) -> Pictures:
    """Fit what is given of image and mask into a shape (h, w, c) in pixels, for `count` images.

    Their edges are repeated until the network can work on them: see Network.size_multiple.
    Raises ValueError as as_image and as_mask do.
    """
    found: Pictures = {}
    how, multiple = resize or "resize", network.size_multiple()
    if image is not None and network.num_frames is not None:
        raise ValueError(
            "image, strength and mask are for models of images, and this one draws videos"
        )
    if image is not None:
        rows = as_rows("image", image, count, shape)
        found["image"] = extend(as_image("image", rows, count, shape, how), multiple)
        if mask is not None:
            options: Any = {"image_size": rows.shape[1:3], "resize": how}
            found["mask"] = extend(as_mask(mask, count, shape[:2], **options), multiple)
    return found


def image_inputs(network: Network, pictures: Pictures, inputs: dict[str, Any]) -> dict[str, Any]:
    """Make the inputs that the network reads of an image and a mask: float32, by name.

    inputs: those that are there already. A mask is rounded to 0 and 1 for them.
    Raises ValueError when the model reads what was not given.
    """
    wanted = staged_inputs(network.embedders) - set(inputs)
    needed = {"image": wanted & {ORIGINAL, MASKED_IMAGE}, "mask": wanted & {MASK, MASKED_IMAGE}}
    missing = [name for name, of in needed.items() if of and name not in pictures]
    if missing:
        what = "completes" if needed["mask"] else "edits"
        names = " and ".join(name for name, of in needed.items() if of)
        raise ValueError(
            f"{missing[0]} = None should be given: this model {what} images by {names}"
        )
    if not wanted:
        return {}
    pixels = pictures["image"].astype(np.float32) / 127.5 - 1.0
    made = {ORIGINAL: pixels}
    if needed["mask"]:
        kept = (pictures["mask"] > 0.5).astype(np.float32)
        made |= {MASK: kept, MASKED_IMAGE: kept * pixels}
    return {name: made[name] for name in wanted if name in made}


def for_sampler(network: Network, pictures: Pictures, strength: Any) -> Pictures:
    """Leave of an image and a mask what the sampler works with.

    An inpainting model reads its mask; another one has the kept pixels put under noise before each
    step. The sampler begins with an image only where strength, or such a mask, asks for it.
    """
    read = staged_inputs(network.embedders)
    blends = MASK in pictures and MASK not in read
    found = {"image": pictures["image"]} if strength is not None or blends else {}
    return found | ({"mask": pictures["mask"]} if blends else {})


def finished(drawn: np.ndarray, pictures: Pictures, size: tuple[int, int]) -> np.ndarray:
    """Put kept pixels back into what was drawn, uint8, and cut it to the size that was asked for.

    The sampler sees kept pixels through noise, and a decoder changes them.
    """
    if "mask" in pictures:
        mask = pictures["mask"]
        mixed = mask * pictures["image"] + (1.0 - mask) * drawn
        drawn = np.rint(mixed).astype(np.uint8)
    return drawn if drawn.shape[-3:-1] == size else drawn[:, : size[0], : size[1]]
