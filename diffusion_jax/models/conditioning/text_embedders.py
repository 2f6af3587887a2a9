"""What the released models read from text and images: tokens or pixels -> one array or two.

ClipText, OpenClipText and OpenClipImage choose among the states of a CLIP tower, whose parameters
they hold without a level in between: ClipText has exactly the parameters of its ClipTextTower.
"""

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.models.conditioning.clip import (
    ClipTextTower,
    ClipVisionTower,
    Mlp,
    TextEmbeddings,
    layer_norm,
)
from diffusion_jax.models.conditioning.spatial_rescaler import interpolation_matrix, resample
from diffusion_jax.models.layers.basic import rematerialised
from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.models.layers.transformer import CrossAttention

CLIP_LAYERS = ("last", "pooled", "hidden")
OPEN_CLIP_LAYERS = ("last", "penultimate")
# Mean and deviation of the RGB values in [0, 1] that CLIP was trained with (Radford et al. 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# As many states as tokens, or the pooled one.
States = Float[Array, "b m d"]
Pooled = Float[Array, "b p"]


class ClipText(nn.Module):
    """OpenAI's CLIP text encoder (SD 1, SDXL's first): tokens int32 [b l] -> [b l d].

    layer: "last" with the final norm, "pooled" ([b 1 d], the normed state at the end of the text)
    or "hidden", the state after layer_idx layers without a norm (negative counts from the end:
    -1 is the last). always_return_pooled gives (that, pooled [b d]). Pad tokens with EOS.
    Raises ValueError for another layer or an impossible layer_idx.
    Source: generative-models, FrozenCLIPEmbedder; SDXL has layer = "hidden", layer_idx = 11.
    """

    tower: ClipTextTower
    layer: str = "last"
    layer_idx: int | None = None
    always_return_pooled: bool = False

    def setup(self) -> None:
        nn.share_scope(self, self.tower)

    def __call__(self, tokens: Int[Array, "b l"]) -> States | tuple[States, Pooled]:
        total = self.tower.num_layers
        _check_layer(self.layer, CLIP_LAYERS)
        index = self._hidden_index(total) if self.layer == "hidden" else total
        states = self.tower(tokens, total if self.always_return_pooled else index)
        chosen = states.hidden[index] if self.layer == "hidden" else states.normed
        if self.layer == "pooled":
            assert states.pooled is not None
            chosen = states.pooled[:, None, :]
        if not self.always_return_pooled:
            return chosen
        assert states.pooled is not None
        return chosen, states.pooled

    def _hidden_index(self, total: int) -> int:
        index = self.layer_idx
        if index is None or not -total - 1 <= index <= total:
            raise ValueError(
                f'layer = "hidden" needs a layer_idx from {-total - 1} to {total}, not {index}'
            )
        return index % (total + 1)


class OpenClipText(nn.Module):
    """OpenCLIP's text encoder (SD 2, SDXL's second): tokens int32 [b l] -> [b l d].

    layer is "last" or "penultimate". legacy (SD 2) applies the final norm to it, also to the
    penultimate one; without legacy (SDXL) it is the bare state of that layer, and
    always_return_pooled gives (that, pooled [b p]), where pooled is the projection of the normed
    last layer at the end of the text. Pad tokens with zeros.
    Raises ValueError for another layer, for always_return_pooled together with legacy, and when the
    tower has no projection.
    Source: generative-models, FrozenOpenCLIPEmbedder and FrozenOpenCLIPEmbedder2.
    """

    tower: ClipTextTower
    layer: str = "last"
    legacy: bool = True
    always_return_pooled: bool = False

    def setup(self) -> None:
        nn.share_scope(self, self.tower)

    def __call__(self, tokens: Int[Array, "b l"]) -> States | tuple[States, Pooled]:
        _check_layer(self.layer, OPEN_CLIP_LAYERS)
        if self.always_return_pooled and (self.legacy or self.tower.projection_dim is None):
            raise ValueError(
                "always_return_pooled needs legacy = False and a projection_dim, not "
                f"legacy = {self.legacy} and projection_dim = {self.tower.projection_dim}"
            )
        total = self.tower.num_layers
        index = total - 1 if self.layer == "penultimate" else total
        states = self.tower(tokens, total if self.always_return_pooled else index)
        chosen = states.normed if self.legacy else states.hidden[index]
        if not self.always_return_pooled:
            return chosen
        assert states.projected is not None
        return chosen, states.projected


class OpenClipImage(nn.Module):
    """CLIP's image encoder (SVD): image [b h w 3] in [-1, 1] -> embedding [b p].

    Frames [b n h w 3] give [b n p], a token for each. Images of any size are resized
    (`clip_pixels`). unsqueeze_dim gives [b 1 p], to serve as context. output_tokens gives (tokens
    [b n width], embedding): the states of the patches without the final norm, as in open_clip 2.20,
    which generative-models asks for (open_clip 3 norms them).
    Source: generative-models, FrozenOpenCLIPImageEmbedder.
    """

    tower: ClipVisionTower
    antialias: bool = True
    unsqueeze_dim: bool = False
    output_tokens: bool = False

    def setup(self) -> None:
        nn.share_scope(self, self.tower)

    def __call__(
        self, image: Float[Array, "b *n h w c"]
    ) -> Float[Array, "b *rest"] | tuple[States, Float[Array, "b *rest"]]:
        flat = image.reshape(-1, *image.shape[-3:])
        states = self.tower(clip_pixels(flat, self.tower.image_size, antialias=self.antialias))
        z = states.projected.reshape(*image.shape[:-3], -1)
        z = z[:, None] if self.unsqueeze_dim else z
        return (states.patches, z) if self.output_tokens else z


def clip_pixels(
    image: Float[Array, "b h w c"], size: int = 224, *, antialias: bool = True
) -> Float[Array, "b s s c"]:
    """Resize images in [-1, 1] to size x size and normalise them: ((x + 1) / 2 - mean) / std.

    The resizing is a matrix for each axis: the bicubic one with align_corners, times a Gaussian
    blur of deviation (h / size - 1) / 2 when antialias is set and an axis shrinks. float32.
    Source: generative-models, FrozenOpenCLIPImageEmbedder.preprocess with kornia.geometry.resize.
    """
    rows, columns = (_resize_matrix(n, size, antialias) for n in image.shape[1:3])
    x = (resample(image, rows, columns) + 1.0) / 2.0
    mean, std = (np.asarray(v, np.float32)[None, None, None, :] for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def _resize_matrix(size_in: int, size_out: int, antialias: bool) -> np.ndarray:
    if size_in == size_out:
        return np.eye(size_in, dtype=np.float32)
    bicubic = interpolation_matrix(size_in, size_out, "bicubic", align_corners=True)
    if not antialias or size_in < size_out:
        return bicubic
    return bicubic @ _blur_matrix(size_in, sigma=(size_in / size_out - 1.0) / 2.0)


def _blur_matrix(size: int, sigma: float) -> np.ndarray:
    """Build the Gaussian blur [size size] of kornia: about 4 sigma wide, reflected at the border.

    The width is the next odd number from int(4 sigma), at least 3.
    """
    radius = int(max(4.0 * sigma, 3.0)) // 2
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets**2) / (2.0 * sigma**2))
    weights /= weights.sum()
    columns = np.abs(np.arange(size)[:, None] + offsets)
    columns = np.where(columns >= size, 2 * (size - 1) - columns, columns)
    matrix = np.zeros((size, size))
    rows = np.broadcast_to(np.arange(size)[:, None], columns.shape)
    np.add.at(matrix, (rows, columns), np.broadcast_to(weights, columns.shape))
    return matrix.astype(np.float32)


class TextBlock(Dtypes, nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), every token seeing all: [b l d] -> [b l d]."""

    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        attend = CrossAttention(self.num_heads, self.head_dim, name="attention", **self.dtypes)
        x = x + attend(layer_norm("norm1", **self.dtypes)(x))
        mlp = Mlp(4 * x.shape[-1], "gelu", name="mlp", **self.dtypes)
        return x + mlp(layer_norm("norm2", **self.dtypes)(x))


class TransformerText(Dtypes, nn.Module):
    """A text encoder to be trained with the denoiser: tokens int32 [b l] -> [b l width].

    Token and learned position embeddings, num_layers pre-norm blocks, a final norm. The defaults
    come from latent-diffusion's text-to-image model, which has vocab_size = 30522 (BERT's).
    Raises ValueError for more than max_length tokens.
    Source: latent-diffusion, BERTEmbedder (x-transformers' TransformerWrapper); Rombach et al.
    2021, section 4.3.1.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 1280
    num_layers: int = 32
    num_heads: int = 8
    head_dim: int = 64
    remat: bool | str = False

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> States:
        x = TextEmbeddings(
            self.width, self.vocab_size, self.max_length, name="embeddings", **self.dtypes
        )(tokens)
        block = rematerialised(TextBlock, self.remat)
        for i in range(self.num_layers):
            x = block(self.num_heads, self.head_dim, name=f"layers_{i}", **self.dtypes)(x)
        return layer_norm("final_layer_norm", **self.dtypes)(x)


def _check_layer(layer: str, choices: tuple[str, ...]) -> None:
    if layer not in choices:
        raise ValueError(f"layer = {layer!r} is unknown; choose one of {', '.join(choices)}")
