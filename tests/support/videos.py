"""Write small videos, also such that no camera should make."""

from fractions import Fraction

import av
import numpy as np

FORMATS = {"ffv1": "bgr0", "libx264": "yuv444p", "mpeg4": "yuv420p"}


def grey_frames(values, size=(16, 24)):
    """Frames [h w 3] of one grey each."""
    return [np.full((*size, 3), value, np.uint8) for value in values]


def write_video(path, frames, fps=10, *, codec="ffv1", times=None, turn=0, pixel=None, **options):
    """Write frames as a video. times: of each frame, in seconds; turn: degrees to the left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = FORMATS[codec]
        stream.options = options
        stream.codec_context.time_base = Fraction(1, 1000) if times else 1 / rate
        if pixel:
            stream.codec_context.sample_aspect_ratio = pixel
        if turn:
            stream.set_display_rotation(turn)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = round(1000 * times[i]) if times else i
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path):
    """Write a file that holds a second of silence and no video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
