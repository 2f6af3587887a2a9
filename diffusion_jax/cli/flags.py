"""The commands and their flags, as tables."""

from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command: its help, and its flags with the keywords of argparse's add_argument."""

    help: str
    flags: tuple[tuple[str, dict[str, Any]], ...]


def flag(name: str, help: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Make a flag; without a type or an action it takes a text."""
    return name, {"help": help, **options}


LOCAL = "127.0.0.1"
SWITCH = {"action": "store_true"}
CONFIG = flag("--config", "configs/x.py[:variant]; --config.a.b=v overrides a value")
RUN = flag("--workdir", "folder of a run", required=True)
STEP = flag("--step", "checkpoint to use (default: the newest)", type=int)
VARIANT = flag("--variant", "files of a diffusers folder: fp16, non_ema, ...")
EMA = flag("--ema", "the averages in a .ckpt file", **SWITCH)
RELEASED = (VARIANT, EMA)
LORA = flag("--lora", "FILE or FILE:WEIGHT to add; may be repeated", action="append", default=[])
DEBUG = flag("--debug", "no donation, NaN checks, debugger", **SWITCH)
PROCESSES = (
    flag("--coordinator_address", "HOST:PORT of process 0, where nothing says it: docs/pods.md"),
    flag("--num_processes", "how many there are; 1: this one alone", type=int),
    flag("--process_id", "number of this process, from 0", type=int),
    flag("--local_device_ids", "GPUs of this host to use: 0,1 (default: all)"),
)
FORMS = ("safetensors", "native", "diffusers", "run", "stablehlo", "peft", "kohya")
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
_SAMPLE = (
    flag("--workdir", "folder of a run"),
    STEP,
    flag("--checkpoint", "instead: .safetensors, native or released, .ckpt, diffusers folder"),
    flag("--config", "with --checkpoint: the config that describes it, if it is not known"),
    *RELEASED,
    LORA,
    flag("--class", "class number or name, or a list: 7 or 1,2,3", dest="label"),
    flag("--prompt", "text, for models that read text"),
    flag("--negative_prompt", "text to lead away from"),
    flag("--n", "images of the prompt or of each class, 16 if unset", type=int),
    flag("--steps", "sampling steps (default: the config's)", type=int),
    flag("--guidance_scale", "1 is off (default: the config's)", type=float),
    *(flag(f"--{x}", "pixels (default: the config's)", type=int) for x in ("height", "width")),
    flag(
        "--image",
        "to begin with (--strength), to complete (--mask), to edit, a video's first frame, or a "
        "video to draw from other sides (SV4D)",
    ),
    flag("--orbit", "for SV4D: SV3D's weights, or the video that it drew of the first frame"),
    flag("--strength", "share of the steps that redraws --image", type=float),
    flag("--mask", "file, white where --image is kept"),
    flag("--resize", "--image of another size: resize (if unset), crop or pad"),
    flag("--image_guidance_scale", "of a model for edits (default: the config's)", type=float),
    flag("--control_image", "what a ControlNet sees: FILE[:SCALE], or canny:FILE of a photo"),
    flag("--seed", "image i depends on (seed, i) only", type=int, default=0),
    flag("--batch_size", "per device call (default: 64 images or 1 video)", type=int),
    flag("--num_frames", "of a video (default: the config's)", type=int),
    flag("--fps", "of a video: SVD's fps_id, frames per second less 1", type=float),
    flag("--motion_bucket_id", "how much moves in a video, 0 to 255", type=float),
    flag("--elevation", "degrees of the camera above an object, 10 if unset", type=float),
    flag("--azimuths", "degrees around it in each frame: 20,40,..., the last is the picture's"),
    flag("--cond_aug", "noise on the picture that a video begins with", type=float),
    flag("--raw", "raw weights instead of a run's EMA", **SWITCH),
    flag("--out", "folder for the images (default: WORKDIR/samples/...)"),
)
_CONVERT = (
    flag("--from", "run, .safetensors, .ckpt, diffusers folder", dest="source"),
    flag("--config", "the config that describes --from, if that is no run and not known"),
    *RELEASED,
    LORA,
    flag("--base", "with --format=peft or kohya: the LoRA of what --from changed of this file"),
    flag("--to", "new .safetensors or .stablehlo file, folder, or config file"),
    flag("--batch_size", "images that a .stablehlo program draws", type=int, default=1),
    flag("--format", "of --to, if open", choices=FORMS),
    flag("--dtype", "of the file (default: as is)", choices=("float32", "bfloat16", "float16")),
    STEP,
    flag("--raw", "raw weights of a run, not its EMA", **SWITCH),
    flag("--with_ema", "raw weights of a run, and its EMA as model_ema.*", **SWITCH),
    flag("--nonfinite", "write NaN and infinite numbers, too", **SWITCH),
    flag("--from_yaml", "YAML config of sgm or latent-diffusion"),
)
_CACHE = (CONFIG, flag("--workdir", "of a run: with the frozen networks that it saved"))
_PLAN = (
    CONFIG,
    flag("--topology", "v5p:2x2x1 (TPU slices), h100:8 (GPUs) or cpu:8"),
    flag("--per_device_batch", "samples per device and step (default: the config's)", type=int),
    flag("--search", "find the largest batch that fits, by remat policy", **SWITCH),
    flag("--json", "file to write all figures to"),
)
_DESCRIBE = (flag("file", ".safetensors, .ckpt, diffusers folder", nargs="?", default=""),)
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
_RUNS = (flag("folder", "folder that holds runs", nargs="?", default="logs", metavar="FOLDER"),)
_SERVE = (
    flag("--workdir", "folder of a run"),
    flag("--checkpoint", "instead: a file, or a folder of diffusers"),
    flag("--config", "with --checkpoint: the config that describes it, if it is not known"),
    flag("--host", "address to listen at; others than this machine need a token", default=LOCAL),
    flag("--port", "0 takes any that is free", type=int, default=7860),
    flag("--token", "what requests must know (default: drawn where --host needs one)"),
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
    "sample": Command("draw images from a run or from released weights", _SAMPLE),
    "evaluate": Command(
        "compute the losses of a run on a split, or metrics of its samples", _EVALUATE
    ),
    "ema": Command("average what a run trained over any length, after the fact", _EMA),
    "convert": Command("weights between runs, .safetensors and diffusers; YAML configs", _CONVERT),
    "describe": Command("say what a released file is and which config describes it", _DESCRIBE),
    "report": Command("show one or more runs on a page, and in short on the terminal", _REPORT),
    "runs": Command("list the runs in a folder: state, step, age, best score", _RUNS),
    "serve": Command("try a model on a page in the browser", _SERVE),
    "cache": Command("encode a training split into a latent cache", (*_CACHE, *PROCESSES)),
    "plan": Command("memory, FLOPs and time of a config on a pod that you do not have", _PLAN),
    "options": Command("what a config may hold: keys, types, defaults, choices", _OPTIONS),
}
