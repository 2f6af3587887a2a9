"""What the speed of a run is measured against: its model's FLOPs and the peak of its devices."""

from diffusion_jax.devices.chips import find_chip
from diffusion_jax.devices.flops import count_flops
from diffusion_jax.experiment.config.binding import parameters_of, row
from diffusion_jax.experiment.experiment import MODEL, Experiment, assemble
from diffusion_jax.runs.arguments import arguments_of
from diffusion_jax.train.hooks.scalars import Speed

# What changes how a network is computed, not what: without it nothing is computed twice, and no
# kernel hides what it does. Scanned blocks are traced once.
PLAIN = {"remat": False, "attention_impl": "xla", "scan": True}


def build_speed(experiment: Experiment) -> Speed:
    """Tell what a step of the experiment does; its FLOPs where the peak of the devices is known."""
    images, devices = experiment.training.batch_size, experiment.mesh.size
    chip = find_chip(experiment.mesh.devices.flat[0].device_kind)
    if chip is None:
        return Speed(images, devices)
    return Speed(images, devices, model_flops(experiment), devices * chip.peak_flops)


def model_flops(experiment: Experiment) -> int:
    """Count the FLOPs of one training step, forward and backward, on all devices.

    What remat computes again does not count. Nothing is compiled. Frozen networks in the step count
    too, unless a latent cache stands for them. Images in buckets count as images of config.data's
    size.
    """
    model = experiment.sections["model"]
    fields = parameters_of(row(MODEL.table, model, MODEL.path, own=True))
    plain = {name: value for name, value in PLAIN.items() if name in fields}
    sections = {**experiment.sections, "model": {**model, **plain}}
    twin = assemble(sections, list(experiment.mesh.devices.flat))
    return count_flops(twin.train_step, *arguments_of(twin))
