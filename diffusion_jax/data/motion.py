"""How fast a clip moves, as a speed and as the motion bucket of Stable Video Diffusion.

SVD conditions on a number from 0 to 255 per clip, motion_bucket_id, for which its authors published
neither code nor scale: their paper (Blattmann et al. 2023, appendix C) says that it is made from
the mean optical flow of small frames. Here it is defined as follows, so that a bucket means the
same for every clip of every data set:

1. The speed of a clip is the mean length of its optical flow, in short sides of the frame per
   second; 0.1 means that what is seen crosses a square picture in ten seconds. A second, and not a
   frame, is the unit, since the frame rate is a condition of its own (fps_id).
2. The bucket is 255 * (1 - 2 ** (-speed / USUAL_SPEED)): 0 stands still, 127, the bucket that SVD's
   users give by default, moves at the usual speed, and nothing reaches 255.
"""

import numpy as np
from PIL import Image

# Frames are compared at this many pixels on the short side, where noise and compression vanish.
_SHORT_SIDE = 32
# The speed of bucket 127, in short sides per second.
USUAL_SPEED = 0.1
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Frames with less texture than this, in grey levels per pixel, show no motion that can be measured.
_LEAST_TEXTURE = 0.25


def motion_speed(frames: np.ndarray, fps: float) -> float:
    """Estimate the mean optical flow of a clip, in short sides of the frame per second.

    For each pair of frames it is pi / 2 * sum |I_t| / sum |grad I|: by the equation of constant
    brightness, I_t = -grad I . flow, and a flow that meets gradients of all directions alike has
    2 / pi of its length along them on average. So a pixel counts as much as it has texture. The
    estimate is about right up to a tenth of the short side per frame, and too small beyond. Steady
    changes of the whole brightness are no motion. It costs about a millisecond per frame.

    Args:
        frames: uint8 [t, h, w, c], c 1 or 3. One frame has no motion.
        fps: frames per second.
    """
    if len(frames) < 2:
        return 0.0
    grey = np.stack([_small(frame) for frame in frames])
    short_side = min(grey.shape[1:])
    for axis in (1, 1, 2, 2):  # a blur of 1 2 1, since differences of the finest detail are wrong
        grey = _means(grey, axis)
    grey -= grey.mean((1, 2), keepdims=True)
    # Derivatives at the middles of cubes of 2 x 2 x 2 pixels (Horn & Schunck 1981, section 7).
    texture = np.hypot(_along(grey, 1), _along(grey, 2)).mean((1, 2))
    change = np.abs(_along(grey, 0)).mean((1, 2))
    pixels = np.pi / 2 * change / np.maximum(texture, _LEAST_TEXTURE)
    return float(pixels.mean() * fps / short_side)


def motion_bucket(speed: float) -> int:
    """Find the motion bucket, 0 to 255, of a speed in short sides per second."""
    return round(255 * (1 - 2 ** (-speed / USUAL_SPEED)))


def _along(grey: np.ndarray, axis: int) -> np.ndarray:
    """Differentiate [t h w] along one axis and average neighbours along the other two."""
    for other in {0, 1, 2} - {axis}:
        grey = _means(grey, other)
    return np.diff(grey, axis=axis)


def _means(grey: np.ndarray, axis: int) -> np.ndarray:
    """Average neighbours along an axis, which gets shorter by one."""
    return (np.delete(grey, 0, axis) + np.delete(grey, -1, axis)) / 2


def _small(frame: np.ndarray) -> np.ndarray:
    """Average a frame [h, w, c] to a grey one of the short side, float32 [h', w']."""
    grey = frame[..., 0] if frame.shape[-1] == 1 else frame @ _LUMA
    height, width = grey.shape
    factor = min(1.0, _SHORT_SIDE / min(height, width))
    size = (max(4, round(width * factor)), max(4, round(height * factor)))
    picture = Image.fromarray(grey.astype(np.float32))
    return np.array(picture.resize(size, Image.Resampling.BOX))
