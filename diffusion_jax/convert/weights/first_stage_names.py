"""Names in the training checkpoint of a first stage that depend on which networks it holds."""

import re
from collections.abc import Iterable

from diffusion_jax.convert.weights.tables import Renames
from diffusion_jax.models.first_stage.lpips import BACKBONES

DISCRIMINATOR = "loss.discriminator."
LOGVAR = "loss.logvar"
LPIPS = "loss.perceptual_loss."
# Constants, counters and flags of such a checkpoint, which are no parameters here.
BUFFERS = (
    r"(loss\.perceptual_loss\.)?scaling_layer\.(shift|scale)$",
    r"loss\.discriminator\.main\.\d+\.(num_batches_tracked|initialized)$",
)


def codebook_names(names: Iterable[str]) -> Renames:
    """Rename a codebook; it is `embed` in a Gumbel quantizer, known by its projection."""
    gumbel = any(name.startswith("quantize.proj.") for name in names)
    own = ((r"^quantize\.embedding\.weight$", "quantize.embed.weight"),) if gumbel else ()
    return (*own, (r"^quantize\.(cluster_size|embed_avg)$", r"quantize.embedding.\1"))


def training_names(names: Iterable[str]) -> Renames:
    """Rename what differs in a training checkpoint: codebook, ActNorm, LPIPS."""
    names = list(names)
    act_norms = [name.removesuffix(".loc") for name in names if name.endswith(".loc")]
    scales = [
        (rf"^{norm}\.weight$".replace("main.", r"main\."), f"{norm}.scale") for norm in act_norms
    ]
    return (*codebook_names(names), *scales, *lpips_names(names))


def lpips_names(names: Iterable[str]) -> Renames:
    """Rename the convolutions of LPIPS to their places in torchvision's `features`.

    The backbone is the one with as many convolutions as there are.
    """
    matches = [re.search(r"(?:^|\.)conv\.(\d+)\.", name) for name in names]
    convs = {match[1] for match in matches if match}
    renames = [(r"(^|\.)lin\.(\d+)\.", r"\1lin\2.model.1.")]
    for backbone in BACKBONES.values():
        if len(convs) != sum(map(len, backbone.stages)):
            continue
        place = number = 0
        for stage, stack in enumerate(backbone.stages):
            place += stage in backbone.pooled
            for _ in stack:
                here = rf"(^|\.)conv\.{number}\."
                renames.append((here, rf"\1net.slice{stage + 1}.{place}."))
                place, number = place + 2, number + 1  # a ReLU follows
    return tuple(renames)
