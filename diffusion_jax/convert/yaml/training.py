"""Data, optimizer and the lightning stanza of a YAML config -> sections of ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.convert.yaml import lightning_tables as tables
from diffusion_jax.convert.yaml.parts import Sections
from diffusion_jax.convert.yaml.reading import NUMBER, Node, leaves
from diffusion_jax.convert.yaml.rows import Drop, convert_class, convert_options

_CROPS = ("RandomCrop", "AddOriginalImageSizeAsTupleAndCropToSquare")


class Trainer(NamedTuple):
    """The options of the trainer that other sections depend on.

    batch_size: samples of an update, over all devices and micro-batches. dtype: options of `model`
    for the trainer's precision.
    """

    batch_size: int | None
    accumulate: int
    dtype: Sections
    clip_norm: float | None
    is_validated: bool


class Picture(NamedTuple):
    """The images that the model is made for, and whether captions and sizes come with them.

    image_size: the side in pixels, None where only the data can say. num_frames: of clips of video,
    None for images. clips: the source of such clips.
    """

    image_size: int | None
    channels: int
    has_captions: bool = False
    has_sizes: bool = False
    num_frames: int | None = None
    clips: Sections | None = None


def convert_data(node: Node, picture: Picture) -> Sections:
    """Convert the data stanza to `data`.

    TFDS has what some loaders read; anything else becomes a folder of images, or of clips, that is
    still to be named.
    """
    params, loader = node.child("params"), node.class_name()
    convert_options(params, tables.DATA)
    if loader in tables.LOADERS:
        node.target()
        name, side, channels = tables.LOADERS[loader]
        return {
            "source": {"name": name, "download": False},
            "splits": {"train": "train", "validation": "test", "test": "test"},
            "batches": {"image_size": side, "channels": channels, "cache": True},
        }
    node.note("target", f"{loader} is no source of ours; {tables.NOT_TFDS}")
    source = {"name": "image_folder", "folder": "set me"} | dict(picture.clips or {})
    if picture.has_captions:
        source["caption"] = "txt"
    splits = {role: role for role in ("train", "validation", "test") if params.has(role)}
    return {
        "source": source,
        "splits": {"train": "train"} | splits,
        "batches": _batches(params.child("train"), picture),
    }


def _batches(train: Node, picture: Picture) -> Sections:
    flips, crops = train.class_name().startswith("LSUN"), picture.has_sizes
    sizes: list[int] = []
    for path, value in leaves(train.path, train.values):
        key = path.rpartition(".")[2]
        is_class = key == "target" and isinstance(value, str)
        if key in ("size", "crop_size") and isinstance(value, int):
            sizes.append(value)
        elif is_class and value.endswith("RandomHorizontalFlip") or (key == "flip_p" and value):
            flips = True
        elif is_class and value.endswith(_CROPS) or (key == "random_crop" and value):
            crops = True
        else:
            continue
        train.seen.add(path)
    side = min(sizes) if sizes else picture.image_size
    if side is None:
        side = 1024 if picture.has_sizes else 512
        train.chosen.append(f"images have {side} x {side} pixels")
    batches: Sections = {"image_size": side, "channels": picture.channels}
    batches |= {} if picture.num_frames is None else {"num_frames": picture.num_frames}
    batches |= {"crop": "random"} if crops else {}
    return batches | ({"random_flip": True} if flips else {})


def convert_trainer(root: Node) -> Trainer:
    """Convert the trainer's devices, micro-batches and precision."""
    trainer = root.child("lightning").child("trainer")
    convert_options(trainer, tables.TRAINER)
    accumulate = trainer.take("accumulate_grad_batches", 1, int)
    devices = 1
    for key in ("devices", "gpus"):
        if trainer.has(key):
            devices = max(1, _count(trainer.take(key, kind=(int, str, tuple))))
        trainer.take(key, None)
    devices *= trainer.take("num_nodes", 1, int)
    data = root.child("data").child("params")
    size = data.take("batch_size", None, int)
    loader = data.child("train").child("loader") if data.has("train") else data
    if loader is not data:
        size = loader.take("batch_size", size, int)
        convert_options(loader, tables.DATA)
    precision = str(trainer.take("precision", 32))
    return Trainer(
        None if size is None else size * devices * accumulate,
        accumulate,
        {"dtype": "bfloat16"} if precision.startswith(("16", "bf16")) else {},
        trainer.take("gradient_clip_val", None, NUMBER),
        data.has("validation") or root.child("data").class_name().endswith("Loader"),
    )


def _count(devices: Any) -> int:
    """Count devices, given as a number, a list or text such as "0,1"."""
    if isinstance(devices, str):
        return len([part for part in devices.split(",") if part.strip()])
    return len(devices) if isinstance(devices, tuple) else devices


def convert_optimizers(
    model: Node, params: Node, trainer: Trainer, ema_decay: float | None
) -> Sections:
    """Convert the rates of a diffusion model to `optimizer` and `lr_schedule`."""
    rate = model.take("base_learning_rate", 1e-5, NUMBER)
    if not model.has("base_learning_rate"):
        model.chosen.append("the learning rate is 1e-5")
    optimizer = convert_optimizer(params.child("optimizer_config"), rate, {"name": "adamw"})
    if trainer.clip_norm:
        optimizer["gradient_clip_norm"] = trainer.clip_norm
    return {
        "optimizer": optimizer | {"ema_decay": ema_decay},
        "lr_schedule": convert_scheduler(params.child("scheduler_config")),
    }


def convert_optimizer(node: Node, rate: float, otherwise: Mapping[str, Any]) -> Sections:
    """Convert an optimizer_config; `otherwise` stands for one that is absent or unknown."""
    found = convert_class(node, tables.OPTIMIZERS, "optimizer") or dict(otherwise)
    betas = node.child("params").take("betas", None, tuple)
    if betas is not None:
        if len(betas) != 2:
            raise ValueError(f"{node.at('params.betas')} = {betas} should be two numbers")
        found |= {"b1": betas[0], "b2": betas[1]}
    if found["name"] == "adamw":
        found.setdefault("weight_decay", 0.01)
    return {"name": found.pop("name"), "learning_rate": rate} | found


def convert_scheduler(node: Node) -> Sections:
    """Convert a scheduler_config to `lr_schedule`."""
    convert_options(node.child("params"), {"verbosity_interval": Drop(tables.LOGS_THE_RATE)})
    return convert_class(node, tables.SCHEDULERS, "schedule") or {"name": "constant"}


def convert_loop(
    root: Node,
    trainer: Trainer,
    monitor: str | None = None,
    log_every_t: int | None = None,
    *,
    is_ldm: bool,
) -> Sections:
    """Convert lengths, hooks and checkpoints to `train`, `hooks` and `checkpoint`.

    monitor: the score that picks the best checkpoints.
    """
    stanza = root.child("lightning")
    convert_options(stanza, tables.STANZA)
    options = stanza.child("trainer")
    steps = options.take("max_steps", None, int)
    if steps is None or steps < 0:
        steps = 100_000
        root.chosen.append("training takes 100,000 steps")
    batch_size = trainer.batch_size
    if batch_size is None:
        batch_size = 16 * trainer.accumulate
        root.chosen.append(f"a batch has {batch_size} samples")
    train: Sections = {"num_steps": steps, "batch_size": batch_size}
    if trainer.accumulate > 1:
        train["accumulate"] = trainer.accumulate
    # Their main.py scales the rate by the samples of an update unless --scale_lr=False.
    if is_ldm and trainer.batch_size is not None:
        train["scale_lr"] = True
    train["ckpt_path"] = root.child("model").child("params").take("ckpt_path", None)
    checkpoint = _checkpoint(stanza, monitor if trainer.is_validated else None)
    hooks: Sections = {"scalars": {"every": options.take("log_every_n_steps", 50)}}
    hooks |= _callbacks(stanza.child("callbacks"), log_every_t)
    every = options.take("val_check_interval", None)
    if trainer.is_validated:
        is_steps = isinstance(every, int) and every > 1
        hooks["validation"] = {"every": every if is_steps else checkpoint["every"]}
        limit = options.take("limit_val_batches", None)
        if isinstance(limit, int):
            hooks["validation"]["num_batches"] = limit
    else:
        for key in ("val_check_interval", "limit_val_batches"):
            options.note(key, "there is no validation: set data.splits.validation first")
    return {"train": train, "hooks": hooks, "checkpoint": checkpoint}


def _checkpoint(stanza: Node, monitor: str | None) -> Sections:
    params = _saving(stanza.child("modelcheckpoint"))
    checkpoint: Sections = {"every": params.take("every_n_train_steps", 1000, int), "keep_last": 2}
    monitor = params.take("monitor", monitor)
    best = params.take("save_top_k", 3 if monitor is not None else 0, int)
    if best < 0:
        checkpoint["keep_every"] = checkpoint["every"]
    elif monitor is not None and best > 0:
        checkpoint |= {"keep_best": best, "monitor": monitor, "mode": params.take("mode", "min")}
    # This callback keeps everything that it saves.
    name = "metrics_over_trainsteps_checkpoint"
    if stanza.child("callbacks").has(name):
        params = _saving(stanza.child("callbacks").child(name))
        if params.take("save_top_k", -1, int) >= 0:
            params.note("save_top_k", "checkpoint.keep_every keeps all of them")
        checkpoint["keep_every"] = params.take("every_n_train_steps", 10_000, int)
    return checkpoint


def _saving(callback: Node) -> Node:
    """Open the options of a checkpoint callback, and convert the ones that MODEL_CHECKPOINT has."""
    callback.take("target", None)
    convert_options(callback.child("params"), tables.MODEL_CHECKPOINT)
    return callback.child("params")


def _callbacks(callbacks: Node, log_every_t: int | None) -> Sections:
    hooks: Sections = {}
    convert_options(callbacks, tables.CALLBACKS)
    logger = callbacks.child("image_logger")
    logger.expect("ImageLogger", "pictures are logged by hooks.images")
    params = logger.child("params")
    images = {"batch_frequency": 1000, "max_images": 4}
    images |= convert_options(params, tables.IMAGE_LOGGER)
    convert_options(params.child("log_images_kwargs"), tables.LOG_IMAGES)
    if log_every_t is not None:
        images["log_every_t"] = log_every_t
    if not params.take("disabled", False):
        hooks["images"] = images
    mappings = [name for name, value in callbacks.values.items() if isinstance(value, Mapping)]
    for one in map(callbacks.child, mappings):
        if one.class_name() == "EarlyStopping":
            one.target()
            hooks["early_stopping"] = convert_options(one.child("params"), tables.EARLY_STOPPING)
    return hooks


def sampling_of_pictures(root: Node) -> Sections:
    """Read what log_images_kwargs says of sampling: ddim_steps, ddim_eta and the scale."""
    logger = root.child("lightning").child("callbacks").child("image_logger")
    options = logger.child("params").child("log_images_kwargs")
    names = {
        "ddim_steps": "num_steps",
        "ddim_eta": "eta",
        "unconditional_guidance_scale": "scale",
    }
    return {ours: options.take(key) for key, ours in names.items() if options.has(key)}
