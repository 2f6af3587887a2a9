"""What each option of the trainer, its callbacks, optimizers and data is here."""

from diffusion_jax.convert.yaml.rows import Class, Drop, Key, Only, Table

EPOCHS = "set train.num_steps: an epoch depends on the data"
TORCH = "not needed: a switch of PyTorch"
LIGHTNING = "not needed: a switch of Lightning"

SCHEDULERS = {
    "LambdaWarmUpCosineScheduler": Class(
        "lambda_warmup_cosine",
        {
            name: Key(name)
            for name in ("warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps")
        },
    ),
    "LambdaWarmUpCosineScheduler2": Class(
        "lambda_warmup_cosine2",
        {
            name: Key(name)
            for name in ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths")
        },
    ),
    "LambdaLinearScheduler": Class(
        "lambda_linear",
        {
            name: Key(name)
            for name in ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths")
        },
    ),
}
NO_VERBOSITY = "not needed: hooks.scalars logs the rate"

_ADAM: Table = {
    "eps": Key("eps"),
    "amsgrad": Only((False,), "optimizer.name = 'amsgrad' is a row of its own"),
    "lr": Drop("not needed: base_learning_rate is what is used"),
    "fused": Drop(TORCH),
    "foreach": Drop(TORCH),
}
OPTIMIZERS = {
    "AdamW": Class("adamw", {**_ADAM, "weight_decay": Key("weight_decay", 0.01)}),
    "Adam": Class("adam", {**_ADAM, "weight_decay": Only((0, 0.0), "Adam decays nothing here")}),
    "SGD": Class(
        "sgd",
        {
            "momentum": Key("momentum"),
            "nesterov": Key("nesterov"),
            "dampening": Only((0, 0.0), "SGD has no dampening here"),
            "weight_decay": Only((0, 0.0), "SGD decays nothing here"),
            "lr": Drop("not needed: base_learning_rate is what is used"),
        },
    ),
}

# accumulate_grad_batches, devices, gpus, num_nodes, max_steps, precision, gradient_clip_val,
# limit_val_batches, val_check_interval and log_every_n_steps: yaml_training.py.
TRAINER: Table = {
    "max_epochs": Drop(EPOCHS),
    "min_epochs": Drop(EPOCHS),
    "min_steps": Drop("train.num_steps is the whole length"),
    "max_time": Drop("send SIGTERM: the run saves and ends, and goes on later"),
    "check_val_every_n_epoch": Drop("set hooks.validation.every, in steps"),
    "gradient_clip_algorithm": Only(("norm",), "gradients are clipped by their norm"),
    "accelerator": Drop("not needed: JAX takes what there is"),
    "strategy": Drop("not needed: mesh.data and mesh.fsdp say how devices share the work"),
    "plugins": Drop(LIGHTNING),
    "sync_batchnorm": Drop(TORCH),
    "benchmark": Drop(TORCH),
    "detect_anomaly": Drop("--debug stops at the first NaN"),
    "deterministic": Drop("not needed: a run is a function of its seed"),
    "num_sanity_val_steps": Drop("not needed: shapes are checked before anything runs"),
    "limit_train_batches": Drop("set data.splits.train = 'train[:1000]'"),
    "limit_test_batches": Drop("set data.splits.test = 'test[:1000]'"),
    "overfit_batches": Drop("set data.splits.train = 'train[:64]'"),
    "fast_dev_run": Drop("set train.num_steps"),
    "profiler": Drop("hooks.profiler traces some steps"),
    "logger": Drop("not needed: every run writes metrics.jsonl and TensorBoard events"),
    "enable_checkpointing": Only((True,), "checkpoints are always saved"),
    "enable_progress_bar": Drop("not needed: progress is always shown"),
    "enable_model_summary": Drop("not needed: parameters.txt lists them"),
    "progress_bar_refresh_rate": Drop("hooks.progress.every, in steps"),
    "weights_summary": Drop("not needed: parameters.txt lists them"),
    "default_root_dir": Drop("--logdir"),
    "resume_from_checkpoint": Drop("--resume"),
    "reload_dataloaders_every_n_epochs": Drop(LIGHTNING),
    "use_distributed_sampler": Drop("not needed: every process reads its own rows"),
    "replace_sampler_ddp": Drop("not needed: every process reads its own rows"),
    "inference_mode": Drop(TORCH),
    "barebones": Drop(LIGHTNING),
}
MODEL_CHECKPOINT: Table = {
    "save_last": Only((True,), "the newest checkpoint is always kept"),
    "save_weights_only": Only((False,), "a checkpoint is a whole state; `convert` takes weights"),
    "filename": Drop("not needed: a checkpoint is named by its step"),
    "dirpath": Drop("not needed: checkpoints are in the run's folder"),
    "verbose": Drop(LIGHTNING),
    "auto_insert_metric_name": Drop(LIGHTNING),
    "every_n_epochs": Drop("checkpoint.every counts steps"),
    "save_on_train_epoch_end": Drop("checkpoint.every counts steps"),
    "train_time_interval": Drop("checkpoint.every counts steps"),
}
IMAGE_LOGGER: Table = {
    "batch_frequency": Key("batch_frequency"),
    "max_images": Key("max_images"),
    "clamp": Key("clamp"),
    "increase_log_steps": Key("increase_log_steps"),
    "log_first_step": Key("log_first_step"),
    "rescale": Only((True,), "pictures are always taken from [-1, 1] to [0, 255]"),
    "log_on_batch_idx": Only((False,), "steps are counted"),
    "log_before_first_step": Only((False,), "log_first_step shows the first step"),
    "enable_autocast": Drop("not needed: pictures have the dtypes of training"),
}
LOG_IMAGES: Table = {
    "N": Drop("max_images says how many"),
    "n_row": Drop("not needed: grids have four columns"),
    "n_rows": Drop("not needed: grids have four columns"),
    "use_ema_scope": Drop("not needed: pictures are drawn with the average if there is one"),
    "sample": Only((True,), "samples are always drawn"),
    "inpaint": Drop("no completed images are logged"),
    "plot_denoise_rows": Drop("not needed: they are always logged"),
    "plot_diffusion_rows": Drop("not needed: they are always logged"),
    "plot_progressive_rows": Drop("not needed: denoise_row shows the same"),
    "quantize_denoised": Drop("there is no quantised first stage here"),
    "return_keys": Drop("all pictures are logged"),
    "ucg_keys": Drop("not needed: what has a ucg_rate is dropped in the unconditional half"),
    "unconditional_guidance_label": Drop("conditioning.embedders.*.legacy_ucg_value is the null"),
}
EARLY_STOPPING: Table = {
    "monitor": Key("monitor"),
    "patience": Key("patience", 3),
    "mode": Key("mode"),
    "min_delta": Key("min_delta"),
    "verbose": Drop(LIGHTNING),
    "strict": Drop(LIGHTNING),
    "check_finite": Drop("not needed: hooks.nan_stop is always there"),
}
CALLBACKS = {
    "setup_callback": "not needed: the run folder is always written",
    "learning_rate_logger": "not needed: hooks.scalars logs the rate",
    "cuda_callback": "not needed: hooks.scalars logs speed and memory",
    "ignore_keys_callback": "train.ignore_keys is read at the warm start only",
}
# Loaders of the originals whose data TFDS has: name there, image size, channels.
LOADERS = {"MNISTLoader": ("mnist", 28, 1), "CIFAR10Loader": ("cifar10", 32, 3)}
READING = "not needed: data.batches.num_threads reads ahead"
DATA: Table = {
    "num_workers": Drop(READING),
    "prefetch_factor": Drop(READING),
    "wrap": Drop("not needed: a source is an indexable already"),
    "shuffle": Only((True,), "training is always shuffled"),
    "shuffle_test_loader": Only((False,), "evaluation goes in order"),
    "shuffle_val_dataloader": Only((False,), "evaluation goes in order"),
    "use_worker_init_fn": Drop("not needed: batch k is a function of (seed, k)"),
    "skip_val_loader": Drop("validation needs data.splits.validation and hooks.validation"),
    "dummy": Only((False,), "train on a split such as 'train[:1]' instead"),
    "predict": Drop("there is no such split"),
}
NOT_TFDS = "put the files into data.source.folder, see docs/data.md"
