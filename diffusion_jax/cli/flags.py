"""The commands and their flags, as tables."""

from diffusion_jax.cli.flags_of_weights import CONVERT, DESCRIBE, SAMPLE, SERVE, STEP
from diffusion_jax.runs.command_line import SWITCH, Command, flag

CONFIG = flag("--config", "configs/x.py[:variant]; --config.a.b=v overrides a value")
RUN = flag("--workdir", "folder of a run", required=True)
PROCESSES = (
    flag("--coordinator_address", "HOST:PORT of process 0, where nothing says it: docs/pods.md"),
    flag("--num_processes", "how many there are; 1: this one alone", type=int),
    flag("--process_id", "number of this process, from 0", type=int),
    flag("--local_device_ids", "GPUs of this host to use: 0,1 (default: all)"),
)
_TRAIN = (
    CONFIG,
    flag("--workdir", "folder of this run; continues the run that is in it"),
    flag("--logdir", "where new run folders are made", default="logs"),
    flag("--name", "name of the run folder instead of the config's", default=""),
    flag("--postfix", "appended to the name of the run folder", default=""),
    flag("--resume", "continue from a run folder or from one of its checkpoints"),
    flag("--change", "with --resume: PATH=VALUE computed otherwise from now on", action="append"),
    flag("--fork", "with --resume: folder of a new run from all of the checkpoint"),
    flag("--accept_data_change", "go on although the data have changed", **SWITCH),
    flag("--seed", "instead of the config's seed", type=int),
    flag("--no_test", "skip the test split at the end", **SWITCH),
)
_CACHE = (CONFIG, flag("--workdir", "of a run: with the frozen networks that it saved"))
_PLAN = (
    CONFIG,
    flag("--topology", "v5p:2x2x1 (TPU slices), h100:8 (GPUs) or cpu:8"),
    flag("--per_device_batch", "samples per device and step (default: the config's)", type=int),
    flag("--search", "find the largest batch that fits, by remat policy", **SWITCH),
    flag("--json", "file to write all figures to"),
)
_OPTIONS = (flag("section", "for example sampler or sampler.ddim", nargs="?", default=""),)
_SCORING = (
    flag("--features", "network that --metrics look through"),
    flag("--weights", "file of --features, if no package ships them"),
    flag("--num_samples", "samples that --metrics draw", type=int),
    flag("--num_steps", "sampling steps (default: the config's)", type=int),
    flag("--reference", ".npz file of EDM, ADM or this package instead of the data"),
)
_EVALUATE = (
    RUN,
    STEP,
    flag("--split", "train, validation or test (default: test; train for --metrics)"),
    flag("--metrics", "of samples, instead of losses: mind,kernel,precision,... (docs/metrics.md)"),
    *_SCORING,
    flag("--samples", "new .npz file for the samples"),
)
_REPORT = (
    flag("folders", "folders of runs", nargs="*", metavar="DIR"),
    flag("--workdir", "folder of a run"),
    flag("--out", "the page (default: report.html in the folder of a single run, or here)"),
    flag("--json", "file to write everything to"),
)
_RUNS = (
    flag("folders", "folders that hold runs (default: logs and runs)", nargs="*", metavar="FOLDER"),
)
_EMA = (
    RUN,
    STEP,
    flag("--length", "share of the training so far to average over, such as 0.1", type=float),
    flag("--out", "new folder for the run with that average (default: WORKDIR/ema/...)"),
    flag("--lengths", "instead: evaluate several, such as 0.02,0.05,0.1,0.15"),
    flag("--split", "of the losses of --lengths (default: validation; train for --metrics)"),
    flag("--metrics", "of samples, besides the losses of --lengths (docs/metrics.md)"),
    *_SCORING,
)
COMMANDS = {
    "train": Command("train a model (the default command)", (*_TRAIN, *PROCESSES)),
    "sample": Command("draw images from a run or from released weights", SAMPLE),
    "evaluate": Command(
        "compute the losses of a run on a split, or metrics of its samples", _EVALUATE
    ),
    "ema": Command("average what a run trained over any length, after the fact", _EMA),
    "convert": Command("weights between runs, .safetensors and diffusers; YAML configs", CONVERT),
    "describe": Command("say what a released file is and which config describes it", DESCRIBE),
    "report": Command("show one or more runs on a page, and in short on the terminal", _REPORT),
    "runs": Command("list the runs in folders: state, step, age, best score", _RUNS),
    "serve": Command("try a model on a page in the browser", SERVE),
    "cache": Command("encode a training split into a latent cache", (*_CACHE, *PROCESSES)),
    "plan": Command("memory, FLOPs and time of a config on a pod that you do not have", _PLAN),
    "options": Command("what a config may hold: keys, types, defaults, choices", _OPTIONS),
}
NO_CONFIG = {
    "ema": "an average is of the run as it is",
    "describe": "a file has no config to change",
    "report": "a report has no config to change",
    "runs": "a list has no config to change",
    "options": "a list has no config to change",
}
