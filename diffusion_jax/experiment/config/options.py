"""The options of a config that no network, sampler or other row of a table takes itself.

One record a section; a default lives here or in the signature of the function that the section's
`name` picks, and nowhere else.
"""

from typing import Any, Literal, NamedTuple

# Entries of a codebook, in the training of a first stage and in a frozen one.
NUM_CODES = 8192


class ConditioningOptions(NamedTuple):
    """How the outputs of the embedders enter the network, and which there are.

    key: a row of routing.CONDITIONING_KEYS. embedders: name -> section of an embedder.
    order: the names of all embedders as their outputs are joined and their encoders counted; () is
    the order of the alphabet, because a config has none of its own.
    force_uc_zero: names of embedders whose outputs are zero in the unconditional half of guidance.
    frame_noise: mean and standard deviation of ln(sigma) of the noise that training adds to the
    conditioning frame of a video. frame_fit: how a picture of any size becomes that frame in
    sampling: "cover" cuts the middle out; "object" puts what is opaque on white, and the picture
    takes the place of the last frame drawn, as in SV3D, so it is a clip's last frame in training.
    object_share: how much of the side of a picture or video the object takes; None is as given.
    first_views: where a model of several views begins: "drawn" draws the first window without any
    new view known, as SV4D 2; "orbit" is given an orbit of SV3D around the first frame, as SV4D,
    and polar angles count from the upright axis instead of from the given view.
    """

    key: str = "none"
    embedders: dict[str, Any] = {}
    order: tuple[str, ...] = ()
    force_uc_zero: tuple[str, ...] = ()
    frame_noise: tuple[float, float] = (-3.0, 0.5)
    frame_fit: Literal["cover", "object"] = "cover"
    object_share: float | None = None
    first_views: Literal["drawn", "orbit"] = "drawn"


class DenoiserOptions(NamedTuple):
    """What the network predicts, and at which noise levels.

    scaling: None is what the schedule's parameterization says. discretization: the table of a
    discrete denoiser, None for the schedule's own. quantize_c_noise: tell the network the number
    of a level in the table instead of the level. around: what is denoised is the difference to the
    picture or frame that joins the input as "concat"; None for the image or clip itself.
    """

    scaling: dict[str, Any] | None = None
    discretization: dict[str, Any] | None = None
    quantize_c_noise: bool = True
    around: Literal["concat"] | None = None


class TableOptions(NamedTuple):
    """num_idx: how many noise levels the table of a discrete denoiser has."""

    num_idx: int = 1000


class LevelsOptions(NamedTuple):
    """discretization: the table that training draws its noise levels from."""

    discretization: dict[str, Any] | None = None


class LogvarOptions(NamedTuple):
    """logvar_init: the log-variance that weighs the loss, where it starts if it is learned."""

    logvar_init: float = 0.0


class LearnOptions(NamedTuple):
    """learn_logvar: whether the log-variance of a first stage's loss is learned."""

    learn_logvar: bool = False


class SamplerOptions(NamedTuple):
    """num_steps: of sampling, where a call does not say another number."""

    num_steps: int = 50


class AutoguidanceOptions(NamedTuple):
    """The weaker model that autoguidance leads away from.

    path: the folder of a run or one of its checkpoints, trained on the same data for fewer steps,
    with a smaller network, or both. ema: its averages, False for its raw weights.
    """

    path: str
    ema: bool = True


class WarmupOptions(NamedTuple):
    """warmup_steps: the learning rate rises linearly over so many steps, whatever the schedule."""

    warmup_steps: int = 0


class EmaOptions(NamedTuple):
    """When the average begins, and what is kept for averages of any length (`launch.py ema`).

    start_step: the average of optimizer.ema_decay is a copy of the parameters until this step, and
    begins there. update_every: it takes every so many steps only.
    power: the lengths, as shares of the training so far (sigma_rel), of two or more averages that
    every step updates, such as (0.05, 0.1); () keeps none. snapshots: how many snapshots of the
    longest one are kept in the run folder, two bytes a parameter each. snapshot_every: they are
    taken at multiples of this step, each 1.25 times as late as the one before.
    """

    power: tuple[float, ...] = ()
    snapshots: int = 3
    snapshot_every: int = 1000
    start_step: int = 0
    update_every: int = 1


class PromptOptions(NamedTuple):
    """Pictures of the same prompts from the same noise, drawn while a model trains.

    prompts: texts, or the numbers or names of classes, one for each picture. negative: what
    guidance leads away from. seed: picture i is the one that `sample --seed` draws as number i.
    guidance_scale, num_steps: None for the config's. every: they are drawn at multiples of this
    step.
    """

    prompts: tuple[str | int, ...]
    negative: str | None = None
    seed: int = 0
    guidance_scale: float | None = None
    num_steps: int | None = None
    every: int = 1000


class FirstStageOptions(NamedTuple):
    """Where a frozen first stage comes from, what its latents are multiplied by, and its memory.

    weights: a file or the run of a first stage, "random" for a dry run, None to take them from the
    checkpoint that is loaded. scale_by_std: the factor is 1 / std of the first batch of a run.
    samples_at_a_time: images that a device encodes or decodes at once, None for all; a decoder of
    videos counts clips. tile: side, in latent pixels, of the overlapping tiles that larger latents
    are decoded in, None for one piece; GroupNorm then sees tiles, which changes colours slightly.
    """

    weights: str | None = None
    scale_factor: float = 1.0
    scale_by_std: bool = False
    samples_at_a_time: int | None = None
    tile: int | None = None


class ClipOptions(NamedTuple):
    """How many frames of a clip the decoder of an autoencoder_video sees at once.

    frames_at_a_time: None for all. overlap: how many frames neighbouring chunks share, in which
    they are blended.
    """

    frames_at_a_time: int | None = None
    overlap: int = 3


class Codes(NamedTuple):
    """The codebook of an autoencoder_vq.

    quantize: whether latents become their nearest codes before they are decoded (False is
    latent-diffusion's force_not_quantize).
    """

    num_codes: int = NUM_CODES
    quantize: bool = True


class CodebookOptions(NamedTuple):
    """num_codes: entries of the codebook that a quantizer trains."""

    num_codes: int = NUM_CODES


class TemperatureOptions(NamedTuple):
    """temperature: of the Gumbel quantizer, a section like lr_schedule; None for a constant 1."""

    temperature: dict[str, Any] | None = None


class PerceptualOptions(NamedTuple):
    """The network of the perceptual distance, and a file with its weights.

    weights: None to take them from the installed package, "random" for a dry run.
    """

    net: Literal["vgg16", "alexnet"] = "vgg16"
    weights: str | None = None


class LatentCacheOptions(NamedTuple):
    """Where the training split is kept encoded, and how.

    text: also keep the outputs of frozen text encoders. dtype: of what is kept. shard_size: records
    in a file; a kill costs at most one file's work. batch_size: images that are encoded at a time.
    """

    folder: str
    text: bool = True
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shard_size: int = 512
    batch_size: int = 16


class AdapterOptions(NamedTuple):
    """Which layers get low-rank factors beside their frozen kernels, and how large these are.

    rank: of the factors. alpha: their product is multiplied by alpha / rank; None for rank.
    dropout: of what enters the factors of the network, in training. dora: also train the norm of
    each column of a kernel. layers: name -> layers to adapt, see AdaptedLayers. from_file: a LoRA
    of the same layers and ranks that training begins with; None begins with one that does nothing.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    dora: bool = False
    from_file: str | None = None
    layers: dict[str, Any] = {"attention": {}}


class AdaptedLayers(NamedTuple):
    """Layers in whose path a regular expression is found, and the size of their factors.

    pattern: None for what the name of the section means: attention, feed_forward or convolution of
    the network, or text, the attention of the text encoders. rank, alpha: None for the values of
    config.adapters.
    """

    pattern: str | None = None
    rank: int | None = None
    alpha: float | None = None


class ControlOptions(NamedTuple):
    """One ControlNet: the picture that it sees, and where its weights come from.

    hint: how training makes that picture of an image: "canny" finds its edges; None reads it from
    the data. column: its name in the batches, which several ControlNets may share. weights: a
    released ControlNet (a file, or a folder of diffusers), None for a copy of what it steers.
    """

    hint: Literal["canny"] | None = None
    column: str = "conditioning_image"
    weights: str | None = None


class PriorOptions(NamedTuple):
    """Images that the model draws before training, and how training shows them again.

    prompt: what they are drawn of and shown with, such as "a photo of a dog". folder: where they
    are kept, "prior" in the folder of the run if None; pictures that lie there already are used.
    num_images: how many there are. weight: what they count in the loss, where other samples count
    1. share: of each batch. num_steps, guidance_scale: of drawing, as the config says if None.
    batch_size: images that are drawn at a time.
    """

    prompt: str
    folder: str | None = None
    num_images: int = 200
    weight: float = 1.0
    share: float = 0.5
    num_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 4


class NewTokenOptions(NamedTuple):
    """A new token of prompts.

    init: words; the vectors begin as copies of what their tokens have, one after the other.
    vectors: how many there are; as many tokens of a prompt are used up. token: as it stands in
    captions and prompts, "<NAME>" for None.
    """

    init: str
    vectors: int = 1
    token: str | None = None
