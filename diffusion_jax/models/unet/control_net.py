"""ControlNet: a copy of a UNet's way down and middle that sees a picture and steers the UNet."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float, Num

from diffusion_jax.models.layers.basic import conv
from diffusion_jax.models.unet.options import check_inputs, check_options
from diffusion_jax.models.unet.skeleton import run_encoder
from diffusion_jax.models.unet.unet import Context, UNet, embed_levels, image_blocks, stem

# Channels of the convolutions over a hint; each but the first halves its sides.
HINT_CHANNELS = (16, 32, 96, 256)


class ControlNet(nn.Module):
    """The way down and the middle of a UNet, with a hint -> what is added to the UNet's own.

    (x [b h w c], t [b], hint [b H W 3] in [0, 1], context, y) -> one array for each activation
    that the way up of the UNet sees, and one for its middle: see skeleton.run_encoder. All are 0
    at the start. The sides of the hint are 2 ** (len(hint_channels) - 1) times as long as the ones
    of the first activation.

    unet: the options of the network that is steered; what both have has the same names here.

    Raises ValueError, with the value and what would be right, when options or inputs do not fit.
    Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models".
    """

    unet: UNet
    hint_channels: Sequence[int] = HINT_CHANNELS

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, "b"],
        hint: Float[Array, "b h2 w2 3"],
        context: Context = None,
        y: Num[Array, "b ..."] | None = None,
        *,
        train: bool = False,
    ) -> list[Array]:
        options = self.unet
        check_options(options)
        check_inputs(options, x, context, y)
        self._check_hint(x, hint)
        blocks = image_blocks(options, embed_levels(options, t, y), context, train=train)
        found = run_encoder(options, stem(options, x) + self._hint(hint), blocks)
        dtypes = options.dtypes
        names = [*(f"zero_convs_{i}_0" for i in range(len(found) - 1)), "middle_block_out_0"]
        return [
            conv(h.shape[-1], h.shape[-1], (1, 1), zero=True, name=name, **dtypes)(h)
            for h, name in zip(found, names, strict=True)
        ]

    @nn.nowrap
    def _check_hint(self, x: Array, hint: Array) -> None:
        factor = 2 ** (len(self.hint_channels) - 1)
        height, width = (factor * side // self.unet.patch_size for side in x.shape[1:3])
        if hint.shape != (len(x), height, width, 3):
            raise ValueError(
                f"hint has shape {hint.shape}; it should be {len(x), height, width, 3}"
            )

    def _hint(self, hint: Array) -> Array:
        """Embed a hint -> [b h w model_channels], 0 at the start."""
        dtypes, h = self.unet.dtypes, hint.astype(self.unet.dtype)
        widths = [(self.hint_channels[0], 1)]
        for before, after in zip(self.hint_channels, self.hint_channels[1:], strict=False):
            widths += [(before, 1), (after, 2)]
        for number, (width, stride) in enumerate(widths):
            name = f"input_hint_block_{2 * number}"
            h = nn.silu(conv(h.shape[-1], width, stride=stride, name=name, **dtypes)(h))
        last, name = self.unet.model_channels, f"input_hint_block_{2 * len(widths)}"
        return conv(h.shape[-1], last, zero=True, name=name, **dtypes)(h)
