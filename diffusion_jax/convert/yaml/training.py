"""Data, optimizer and the lightning stanza of a YAML config -> sections of ours."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from diffusion_jax.convert.yaml import lightning_tables as tables
from diffusion_jax.convert.yaml.reading import NUMBER, Node, leaves
from diffusion_jax.convert.yaml.rows import convert_class, convert_options

Sections = dict[str, Any]
_CROPS = ("RandomCrop", "AddOriginalImageSizeAsTupleAndCropToSquare")


class Trainer(NamedTuple):
    """What of the trainer shapes other sections. batch_size: of all devices and micro-batches."""

    batch_size: int | None
    accumulate: int
    half_precision: bool
    clip_norm: float | None
    is_validated: bool


class Picture(NamedTuple):
    """What the model says of its images: their side in pixels, their channels, and what comes with
    them. image_size: None where only the data can say."""

    image_size: int | None
    channels: int
    has_captions: bool
    has_sizes: bool


def convert_data(node: Node, picture: Picture) -> tuple[Sections, str | None]:
    """Convert the data stanza to `data`, and say what had to be chosen.

    TFDS has what some loaders read; anything else becomes an image_folder that is still to be
    named.
    """
    params = node.child("params") if node.values else node
    loader = node.target() if node.values else ""
    convert_options(params, tables.DATA)
    if loader in tables.LOADERS:
        name, side, channels = tables.LOADERS[loader]
        return {
            "source": {"name": name, "download": False},
            "splits": {"train": "train", "validation": "test", "test": "test"},
            "batches": {"image_size": side, "channels": channels, "cache": True},
        }, None
    node.seen.discard(node.at("target"))
    node.note("target", f"{loader} is no source of ours; {tables.NOT_TFDS}")
    batches, chosen = _batches(params, picture)
    source = {"name": "image_folder", "folder": "set me"}
    if picture.has_captions:
        source["caption"] = "txt"
    splits = {"train": "train"}
    for role in ("validation", "test"):
        if params.has(role):
            splits[role] = role
    return {"source": source, "splits": splits, "batches": batches}, chosen


def _batches(params: Node, picture: Picture) -> tuple[Sections, str | None]:
    train = params.child("train")
    side, flips, crops = picture.image_size, False, picture.has_sizes
    if train.target().startswith("LSUN"):
        train.seen.add(train.at("target"))
        flips = True
    train.seen.discard(train.at("target"))
    found: list[int] = []
    for path, value in leaves(train.path, train.values):
        key = path.rpartition(".")[2]
        is_class = key == "target" and isinstance(value, str)
        if key in ("size", "crop_size") and isinstance(value, int):
            found.append(value)
        elif is_class and value.endswith("RandomHorizontalFlip") or (key == "flip_p" and value):
            flips = True
        elif is_class and value.endswith(_CROPS) or (key == "random_crop" and value):
            crops = True
        else:
            continue
        train.seen.add(path)
    side = min(found) if found else side
    chosen = None
    if side is None:
        side = 1024 if picture.has_sizes else 512
        chosen = f"images have {side} x {side} pixels"
    batches: Sections = {"image_size": side, "channels": picture.channels}
    batches |= {"crop": "random"} if crops else {}
    return batches | ({"random_flip": True} if flips else {}), chosen


def convert_trainer(root: Node) -> Trainer:
    """Read what counts devices, micro-batches and bits."""
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
        precision.startswith(("16", "bf16")),
        trainer.take("gradient_clip_val", None, NUMBER),
        data.has("validation") or root.child("data").peek("target", "").endswith("Loader"),
    )


def _count(devices: Any) -> int:
    """Count what `devices: 0,1` or a number or a list means."""
    if isinstance(devices, str):
        return len([part for part in devices.split(",") if part.strip()])
    return len(devices) if isinstance(devices, tuple) else devices


def convert_optimizer(
    node: Node, learning_rate: float, ema_decay: float | None, clip_norm: float | None
) -> Sections:
    """Convert an optimizer_config to `optimizer`; torch's AdamW where there is none."""
    optimizer: Sections = {"name": "adamw"}
    if node.values:
        optimizer = convert_class(node, tables.OPTIMIZERS, "optimizer") or optimizer
        betas = node.child("params").take("betas", None, tuple)
        if betas is not None and len(betas) != 2:
            raise ValueError(f"{node.at('params.betas')} = {betas} should be two numbers")
        if betas is not None:
            optimizer |= {"b1": betas[0], "b2": betas[1]}
    optimizer = {"name": optimizer.pop("name"), "learning_rate": learning_rate} | optimizer
    if optimizer["name"] == "adamw":
        optimizer = optimizer | {"weight_decay": 0.01} | optimizer
    if clip_norm:
        optimizer["gradient_clip_norm"] = clip_norm
    return optimizer | {"ema_decay": ema_decay}


def convert_loop(
    root: Node, trainer: Trainer, monitor: str | None, log_every_t: int | None
) -> tuple[Sections, list[str]]:
    """Convert lengths, hooks and checkpoints to `train`, `hooks` and `checkpoint`.

    monitor: the score that picks the best checkpoints. Returns what was chosen, too.
    """
    stanza, chosen = root.child("lightning"), []
    options = stanza.child("trainer")
    steps = options.take("max_steps", None, int)
    if steps is None or steps < 0:
        steps = 100_000
        chosen.append("training takes 100,000 steps")
    batch_size = trainer.batch_size
    if batch_size is None:
        batch_size = 16 * trainer.accumulate
        chosen.append(f"a batch has {batch_size} samples")
    train: Sections = {"num_steps": steps, "batch_size": batch_size}
    if trainer.accumulate > 1:
        train["accumulate"] = trainer.accumulate
    checkpoint = _checkpoint(stanza, monitor if trainer.is_validated else None)
    hooks: Sections = {"scalars": {"every": options.take("log_every_n_steps", 50)}}
    hooks |= _callbacks(stanza, log_every_t)
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
    return {"train": train, "hooks": hooks, "checkpoint": checkpoint}, chosen


def _checkpoint(stanza: Node, monitor: str | None) -> Sections:
    params = stanza.child("modelcheckpoint").child("params")
    stanza.child("modelcheckpoint").take("target", None)
    convert_options(params, tables.MODEL_CHECKPOINT)
    checkpoint: Sections = {"every": params.take("every_n_train_steps", 1000, int), "keep_last": 2}
    monitor = params.take("monitor", monitor)
    best = params.take("save_top_k", 3 if monitor is not None else 0, int)
    if best < 0:
        checkpoint["keep_every"] = checkpoint["every"]
    elif monitor is not None and best > 0:
        checkpoint |= {"keep_best": best, "monitor": monitor, "mode": params.take("mode", "min")}
    return checkpoint | _trainstep_checkpoints(stanza.child("callbacks"))


def _trainstep_checkpoints(callbacks: Node) -> Sections:
    """Read metrics_over_trainsteps_checkpoint, which keeps all that it saves."""
    name = "metrics_over_trainsteps_checkpoint"
    if not callbacks.has(name):
        return {}
    one = callbacks.child(name)
    one.take("target", None)
    params = one.child("params")
    convert_options(params, tables.MODEL_CHECKPOINT)
    if params.take("save_top_k", -1, int) >= 0:
        params.note("save_top_k", "checkpoint.keep_every keeps all of them")
    return {"keep_every": params.take("every_n_train_steps", 10_000, int)}


def _callbacks(stanza: Node, log_every_t: int | None) -> Sections:
    callbacks = stanza.child("callbacks")
    hooks: Sections = {}
    for name, reason in tables.CALLBACKS.items():
        callbacks.note(name, reason)
    logger = callbacks.child("image_logger")
    if logger.target("ImageLogger") != "ImageLogger":
        logger.note("target", "pictures are logged by hooks.images")
    params = logger.child("params")
    images = {"batch_frequency": 1000, "max_images": 4}
    images |= convert_options(params, tables.IMAGE_LOGGER)
    convert_options(params.child("log_images_kwargs"), tables.LOG_IMAGES)
    if log_every_t is not None:
        images["log_every_t"] = log_every_t
    if not params.take("disabled", False):
        hooks["images"] = images
    for one in _of_class(callbacks, "EarlyStopping"):
        hooks["early_stopping"] = convert_options(one.child("params"), tables.EARLY_STOPPING)
    return hooks


def _of_class(callbacks: Node, wanted: str) -> Iterator[Node]:
    for name, value in callbacks.values.items():
        if isinstance(value, Mapping) and callbacks.child(name).target() == wanted:
            yield callbacks.child(name)
        elif name not in ("image_logger", "metrics_over_trainsteps_checkpoint"):
            callbacks.seen.discard(f"{callbacks.at(name)}.target")


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
