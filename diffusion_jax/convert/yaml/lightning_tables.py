"""What each option of the trainer, its callbacks, optimizers and data is here."""

from diffusion_jax.convert.yaml.rows import Class, Drop, Only, Table, drop, keep

TORCH = "not needed: a switch of PyTorch"
LIGHTNING = "not needed: a switch of Lightning"
LOGS_THE_RATE = "not needed: hooks.scalars logs the rate"
OWN_RATE = Drop("not needed: base_learning_rate is what is used")
NOT_TFDS = "put the files into data.source.folder, see docs/data.md"

_BY_CYCLES = keep("warm_up_steps f_min f_max f_start cycle_lengths")
SCHEDULERS = {
    "LambdaWarmUpCosineScheduler": Class(
        "lambda_warmup_cosine", keep("warm_up_steps lr_min lr_max lr_start max_decay_steps")
    ),
    "LambdaWarmUpCosineScheduler2": Class("lambda_warmup_cosine2", _BY_CYCLES),
    "LambdaLinearScheduler": Class("lambda_linear", _BY_CYCLES),
}
_ADAM: Table = {
    **keep("eps"),
    "amsgrad": Only((False,), "optimizer.name = 'amsgrad' is a row of its own"),
    "lr": OWN_RATE,
    **drop("fused foreach", TORCH),
}
OPTIMIZERS = {
    "AdamW": Class("adamw", {**_ADAM, **keep(weight_decay=0.01)}),
    "Adam": Class("adam", {**_ADAM, "weight_decay": Only((0, 0.0), "Adam decays nothing here")}),
    "SGD": Class(
        "sgd",
        {
            **keep("momentum nesterov"),
            "dampening": Only((0, 0.0), "SGD has no dampening here"),
            "weight_decay": Only((0, 0.0), "SGD decays nothing here"),
            "lr": OWN_RATE,
        },
    ),
}

_LOGGER = Drop("not needed: every run writes metrics.jsonl and TensorBoard events")
_STRATEGY = Drop("not needed: mesh.data and mesh.fsdp say how devices share the work")
# Options of the stanza `lightning` itself.
STANZA: Table = {"logger": _LOGGER, "strategy": _STRATEGY}
# training.py reads accumulate_grad_batches, devices, gpus, num_nodes, max_steps, precision,
# gradient_clip_val, limit_val_batches, val_check_interval and log_every_n_steps.
TRAINER: Table = {
    **drop("max_epochs min_epochs", "set train.num_steps: an epoch depends on the data"),
    **drop("plugins barebones reload_dataloaders_every_n_epochs", LIGHTNING),
    **drop("sync_batchnorm benchmark inference_mode", TORCH),
    "min_steps": Drop("train.num_steps is the whole length"),
    "max_time": Drop("send SIGTERM: the run saves and ends, and goes on later"),
    "check_val_every_n_epoch": Drop("set hooks.validation.every, in steps"),
    "gradient_clip_algorithm": Only(("norm",), "gradients are clipped by their norm"),
    "accelerator": Drop("not needed: JAX takes what there is"),
    "strategy": _STRATEGY,
    "detect_anomaly": Drop("--debug stops at the first NaN"),
    "deterministic": Drop("not needed: a run is a function of its seed"),
    "num_sanity_val_steps": Drop("not needed: shapes are checked before anything runs"),
    "limit_train_batches": Drop("set data.splits.train = 'train[:1000]'"),
    "limit_test_batches": Drop("set data.splits.test = 'test[:1000]'"),
    "overfit_batches": Drop("set data.splits.train = 'train[:64]'"),
    "fast_dev_run": Drop("set train.num_steps"),
    "profiler": Drop("hooks.profiler traces some steps"),
    "logger": _LOGGER,
    "enable_checkpointing": Only((True,), "checkpoints are always saved"),
    "enable_progress_bar": Drop("not needed: progress is always shown"),
    **drop("enable_model_summary weights_summary", "not needed: parameters.txt lists them"),
    "progress_bar_refresh_rate": Drop("hooks.progress.every, in steps"),
    "default_root_dir": Drop("--logdir"),
    "resume_from_checkpoint": Drop("--resume"),
    **drop(
        "use_distributed_sampler replace_sampler_ddp",
        "not needed: every process reads its own rows",
    ),
}
MODEL_CHECKPOINT: Table = {
    "save_last": Only((True,), "the newest checkpoint is always kept"),
    "save_weights_only": Only((False,), "a checkpoint is a whole state; `convert` takes weights"),
    "filename": Drop("not needed: a checkpoint is named by its step"),
    "dirpath": Drop("not needed: checkpoints are in the run's folder"),
    **drop("verbose auto_insert_metric_name", LIGHTNING),
    **drop(
        "every_n_epochs save_on_train_epoch_end train_time_interval",
        "checkpoint.every counts steps",
    ),
}
IMAGE_LOGGER: Table = {
    **keep("batch_frequency max_images clamp increase_log_steps log_first_step"),
    "rescale": Only((True,), "pictures are always taken from [-1, 1] to [0, 255]"),
    "log_on_batch_idx": Only((False,), "steps are counted"),
    "log_before_first_step": Only((False,), "log_first_step shows the first step"),
    "enable_autocast": Drop("not needed: pictures have the dtypes of training"),
}
LOG_IMAGES: Table = {
    "N": Drop("max_images says how many"),
    **drop("n_row n_rows", "not needed: grids have four columns"),
    "use_ema_scope": Drop("not needed: pictures are drawn with the average if there is one"),
    "sample": Only((True,), "samples are always drawn"),
    "inpaint": Drop("no completed images are logged"),
    **drop("plot_denoise_rows plot_diffusion_rows", "not needed: they are always logged"),
    "plot_progressive_rows": Drop("not needed: denoise_row shows the same"),
    "quantize_denoised": Drop("there is no quantised first stage here"),
    "return_keys": Drop("all pictures are logged"),
    "ucg_keys": Drop("not needed: what has a ucg_rate is dropped in the unconditional half"),
    "unconditional_guidance_label": Drop("conditioning.embedders.*.legacy_ucg_value is the null"),
}
EARLY_STOPPING: Table = {
    **keep("monitor", patience=3),
    **keep("mode min_delta"),
    **drop("verbose strict", LIGHTNING),
    "check_finite": Drop("not needed: hooks.nan_stop is always there"),
}
CALLBACKS: Table = {
    "setup_callback": Drop("not needed: the run folder is always written"),
    "learning_rate_logger": Drop(LOGS_THE_RATE),
    "cuda_callback": Drop("not needed: hooks.scalars logs speed and memory"),
    "ignore_keys_callback": Drop("train.ignore_keys is read at the warm start only"),
}
# Loaders of the originals whose data TFDS has: name in TFDS, image size, channels.
LOADERS = {"MNISTLoader": ("mnist", 28, 1), "CIFAR10Loader": ("cifar10", 32, 3)}
DATA: Table = {
    **drop("num_workers prefetch_factor", "not needed: data.batches.num_threads reads ahead"),
    "wrap": Drop("not needed: a source is an indexable already"),
    "shuffle": Only((True,), "training is always shuffled"),
    "shuffle_test_loader": Only((False,), "evaluation goes in order"),
    "shuffle_val_dataloader": Only((False,), "evaluation goes in order"),
    "use_worker_init_fn": Drop("not needed: batch k is a function of (seed, k)"),
    "skip_val_loader": Drop("validation needs data.splits.validation and hooks.validation"),
    "dummy": Only((False,), "train on a split such as 'train[:1]' instead"),
    "predict": Drop("there is no such split"),
}
