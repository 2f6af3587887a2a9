"""The flags of commands that read weights: to draw, to convert, to look, to serve."""

from diffusion_jax.runs.command_line import SWITCH, flag

LOCAL = "127.0.0.1"
STEP = flag("--step", "checkpoint to use (default: the newest)", type=int)
_RELEASED = (
    flag("--variant", "files of a diffusers folder: fp16, non_ema, ..."),
    flag("--ema", "the averages in a .ckpt file", **SWITCH),
)
_LORA = flag("--lora", "FILE or FILE:WEIGHT to add; may be repeated", action="append", default=[])
_EMBEDDING = flag(
    "--embedding", "FILE[:TOKEN] of a new token; may be repeated", action="append", default=[]
)
_FORMS = ("safetensors", "native", "diffusers", "run", "stablehlo", "peft", "kohya")
SAMPLE = (
    flag("--workdir", "folder of a run"),
    STEP,
    flag("--checkpoint", "instead: .safetensors, native or released, .ckpt, diffusers folder"),
    flag("--config", "with --checkpoint: the config that describes it, if it is not known"),
    *_RELEASED,
    _LORA,
    _EMBEDDING,
    flag("--class", "class number or name, or a list: 7 or 1,2,3", dest="label"),
    flag("--prompt", "text, for models that read text"),
    flag("--negative_prompt", "text to lead away from"),
    flag("--prompt_weights", "(word:1.2), (word), [word] weigh words", default=None, **SWITCH),
    flag("--n", "images of the prompt or of each class, 16 if unset", type=int),
    flag("--steps", "sampling steps (default: the config's)", type=int),
    flag("--guidance_scale", "1 is off (default: the config's)", type=float),
    *(flag(f"--{x}", "pixels (default: the config's)", type=int) for x in ("height", "width")),
    flag(
        "--image",
        "to begin with (--strength), to complete (--mask), to edit, a video's first frame, or a "
        "video to draw from other sides (SV4D)",
    ),
    flag(
        "--orbit", "for SV4D: SV3D's weights or run, or the video that it drew of the first frame"
    ),
    flag("--strength", "share of the steps that redraws --image", type=float),
    flag("--mask", "file, white where --image is kept"),
    flag("--resize", "--image of another size: resize (if unset), crop or pad"),
    flag("--image_guidance_scale", "of a model for edits (default: the config's)", type=float),
    flag("--control_image", "what a ControlNet sees: FILE[:SCALE], or canny:FILE of a photo"),
    flag("--seed", "image i depends on (seed, i) only; a list has one for each: 1,2,3", default=0),
    flag("--variation_seed", "one, or a list: whose noise --variation_strength goes towards"),
    flag("--variation_strength", "0 to 1: how far to go", type=float),
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
CONVERT = (
    flag("--from", "run, .safetensors, .ckpt, diffusers folder", dest="source"),
    flag("--config", "the config that describes --from, if that is no run and not known"),
    *_RELEASED,
    _LORA,
    flag("--base", "with --format=peft or kohya: the LoRA of what --from changed of this file"),
    flag("--to", "new .safetensors or .stablehlo file, folder, or config file"),
    flag("--batch_size", "images that a .stablehlo program draws", type=int, default=1),
    flag("--format", "of --to, if open", choices=_FORMS),
    flag("--dtype", "of the file (default: as is)", choices=("float32", "bfloat16", "float16")),
    STEP,
    flag("--raw", "raw weights of a run, not its EMA", **SWITCH),
    flag("--with_ema", "raw weights of a run, and its EMA as model_ema.*", **SWITCH),
    flag("--nonfinite", "write NaN and infinite numbers, too", **SWITCH),
    flag("--from_yaml", "YAML config of sgm or latent-diffusion"),
)
DESCRIBE = (flag("file", ".safetensors, .ckpt, diffusers folder", nargs="?", default=""),)
SERVE = (
    flag("--workdir", "folder of a run"),
    flag("--checkpoint", "instead: a file, or a folder of diffusers"),
    flag("--config", "with --checkpoint: the config that describes it, if it is not known"),
    _LORA,
    _EMBEDDING,
    flag("--host", "address to listen at; others than this machine need a token", default=LOCAL),
    flag("--port", "0 takes any that is free", type=int, default=7860),
    flag("--token", "what requests must know (default: drawn where --host needs one)"),
)
