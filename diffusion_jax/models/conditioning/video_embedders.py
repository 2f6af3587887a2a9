"""What networks of videos see of a conditioning frame: its latent, beside what is denoised."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.layers.basic import timestep_embedding


class EncodedFrames(nn.Module):
    """The latents of frames in [-1, 1]: [b h w 3] -> [b h/f w/f z], [b n h w 3] -> [b n h/f w/f z].

    Latents are the mean of the posterior, and not scaled. The parameters have the names of
    `autoencoder`'s encoder and quant_conv, without a level in between.

    copies: each of n frames stands so many times in a row, as SV4D has a frame for each view.
    level_dim: also give sinusoids of level [b level_dim], the noise that the frames are said to
      have; None for the latents alone. No noise is added: SV4D's 1e-5 is below what latents show.
    Source: generative-models, VideoPredictionEmbedderWithEncoder with AutoencoderKLModeOnly.
    """

    autoencoder: Autoencoder
    copies: int = 1
    level_dim: int | None = None
    level: float = 1e-5

    def setup(self) -> None:
        nn.share_scope(self, self.autoencoder)

    def __call__(
        self, frames: Float[Array, "b *n h w c"]
    ) -> Float[Array, "b *n h2 w2 z"] | tuple[Array, Float[Array, "b e"]]:
        moments = self.autoencoder.encode(frames.reshape(-1, *frames.shape[-3:]))
        latents = moments[..., : self.autoencoder.embed_dim]
        latents = latents.reshape(*frames.shape[:-3], *latents.shape[1:])
        if self.copies > 1:
            latents = jnp.repeat(latents, self.copies, axis=1)
        if self.level_dim is None:
            return latents
        return latents, timestep_embedding(jnp.full(len(frames), self.level), self.level_dim)
