"""Whether a data set has what the embedders of a model read, found out before anything is long."""

from diffusion_jax.data.records import Records
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.network.cameras import degrees_read


def check_inputs(experiment: Experiment, source: Records) -> None:
    """Read one record and compare it with what training reads of a batch.

    Raises ValueError that names the embedders whose inputs are missing, and what there is.
    """
    embedders, data = experiment.task.embedders, experiment.data
    if not embedders:
        return
    read = experiment.abstract_batch()
    there = data.first_row(source, finish=experiment.task.with_inputs)
    missing = {
        name: embedder.input_key
        for name, embedder in embedders.items()
        if embedder.input_key in read and embedder.input_key not in there
    }
    if missing:
        lacking = ", ".join(f"{name} reads {key!r}" for name, key in missing.items())
        degrees = " and ".join(degrees_read(missing.values()))
        lacking += f", which {degrees} of its frames would make" if degrees else ""
        raise ValueError(
            f"the data set {data.name!r} lacks inputs of config.conditioning.embedders: {lacking}; "
            f"its batches have {', '.join(sorted(there))}"
        )
