"""A network that is traced and compiled in a moment, so that a killed run starts again soon."""

import flax.linen as nn
import jax
from jaxtyping import Array


class Net(nn.Module):
    """Two convolutions with the timestep and the label between them; it serves to be killed."""

    out_channels: int
    num_classes: int = 11
    width: int = 8

    @nn.compact
    def __call__(
        self, x: Array, t: Array, context: None = None, y: Array | None = None, *, train=False
    ) -> Array:
        """Map x [b h w c], t [b] and y [b] to [b h w c]."""
        hidden = nn.Conv(self.width, (3, 3), name="first")(x) + t[:, None, None, None] / 1000
        if y is not None:
            hidden += nn.Embed(self.num_classes, self.width, name="label")(y)[:, None, None, :]
        hidden = nn.Dropout(0.1, deterministic=not train)(jax.nn.silu(hidden))
        return nn.Conv(self.out_channels, (3, 3), name="last")(hidden)
