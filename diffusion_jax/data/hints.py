"""Pictures that a ControlNet sees, made of the images that it learns to draw."""

import numpy as np


def canny(images: np.ndarray) -> np.ndarray:
    """Find the edges of images, white on black: float32 [b h w c] in [-1, 1] -> [b h w 3].

    Source: Canny 1986, as scikit-image has it, with its thresholds and a Gaussian of 1 pixel.
    Raises ImportError without scikit-image.
    """
    try:
        from skimage.feature import canny as edges_of
    except ImportError as error:
        raise ImportError("hint = 'canny' needs scikit-image: pip install scikit-image") from error
    grey = (np.asarray(images, np.float32).mean(-1) + 1.0) / 2.0
    found = np.stack([edges_of(image) for image in grey])
    return np.repeat(np.where(found, 1.0, -1.0).astype(np.float32)[..., None], 3, axis=-1)


HINTS = {"canny": canny}
