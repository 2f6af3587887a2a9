"""The numbers that every option of a config may hold: one table for all sections."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.train.power_ema import LARGEST_LENGTH

# What a float32 and an int32 hold; every number of a config ends up in one of them.
LARGEST = float(np.finfo(np.float32).max)
LARGEST_INT = int(np.iinfo(np.int32).max)
# Steps of a cycle that never ends; a schedule computes with it on the host.
FOR_EVER = 10**18
# Packages whose functions the table knows; a user's own functions take any number.
_KNOWN = ("diffusion_jax", "optax")


class Range(NamedTuple):
    """The numbers from low to high, without low if `above`, without high if `below`.

    others: numbers outside that are right as well, such as -1 for "all".
    """

    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False
    below: bool = False
    others: tuple[int | float, ...] = ()

    def holds(self, value: int | float) -> bool:
        """Tell whether a number is right; NaN, infinity and what 32 bits do not hold never are."""
        if value in self.others:
            return True
        largest = LARGEST_INT if isinstance(value, int) else LARGEST
        if not abs(value) <= max(largest, self.high if math.isfinite(self.high) else 0):
            return False
        inside = self.low <= value <= self.high
        on_edge = (self.above and value == self.low) or (self.below and value == self.high)
        return inside and not on_edge

    def in_words(self) -> str:
        """Say what the range allows: "at least 0 and below 1", "" for every finite number."""
        if (self.above, self.below) == (False, False) and math.isfinite(self.low + self.high):
            words = f"between {self.low} and {self.high}"
        else:
            low = f"{'above' if self.above else 'at least'} {self.low}"
            high = f"{'below' if self.below else 'at most'} {self.high}"
            ends = ((self.low, low), (self.high, high))
            words = " and ".join(text for end, text in ends if math.isfinite(end))
        return " or ".join([*([words] if words else []), *map(str, self.others)])


ANY = Range()
COUNT = Range(1)
FROM_0 = Range(0)
ABOVE_0 = Range(0, above=True)
SHARE = Range(0, 1)
BELOW_1 = Range(0, 1, below=True)
INSIDE_1 = Range(0, 1, above=True, below=True)
COUNT_OR_ALL = Range(1, others=(-1,))

_NAMES = {
    COUNT: (
        # train, checkpoint, hooks
        "num_steps batch_size accumulate keep_dims every keep_every keep_last num_batches "
        "agree_every batch_frequency max_images log_every_t patience "
        # data and caches
        "channels bucket_divisor max_examples shard_size samples_at_a_time tile frame_stride "
        "hop short_side num_examples frames_at_a_time overlap frames copies level_dim "
        "num_images num_levels num_samples snapshot_every total_steps pyramid_noise_levels "
        "update_every windows vectors "
        # networks
        "model_channels out_channels in_channels out_ch ch ch_mult channel_mult num_res_blocks "
        "num_heads num_groups patch_size attention_resolutions attn_resolutions context_dim "
        "adm_in_channels num_classes n_embed resolution z_channels embed_dim num_codes ndf "
        "n_layers outdim size shape factor width mlp_dim head_dim num_layers projection_dim "
        "hidden_size depth time_cond_proj_dim "
        "vocab_size video_kernel_size time_kernel_size time_context_dim motion_context_dim "
        "transformer_depth_middle "
        # noise and sampling
        "num_timesteps num_idx order num_frames num_views original_steps restart_steps "
        # learning rate and optimizers
        "decay_steps transition_steps reference_steps max_decay_steps rank "
        "update_proj_gap update_interval ns_steps min_dim_size_to_factor"
    ),
    FROM_0: (
        "keep_best snapshots bits_images min_delta max_corrupt pad prefetch num_threads "
        "num_workers "
        "transformer_depth num_attention_blocks n_stages cosine_s eta s_churn s_noise s_tmin "
        "temperature interval offset_noise_level input_perturbation l_simple_weight "
        "original_elbo_weight disc_start perceptual_start "
        "disc_factor disc_weight perceptual_weight regularization_weights beta kl_weight "
        "weight_decay adam_weight_decay weight_decay_rate eps eps_root adam_eps_root warmup_steps "
        "warm_up_steps transition_begin boundaries scales init_value end_value value f_min f_max "
        "f_start lr_min lr_max lr_start decay_offset initial_accumulator_value initial_scale "
        "lower_bound optimism print_win_rate_every_n_steps threshold weight_lr_power alpha "
        "min_norm min_step_size seed prompts repeats start_step keep_tags conditioner_lr_factor"
    ),
    ABOVE_0: (
        "fps seconds multiplier scale_factor gamma min_snr_gamma norm_limit period rho sigma_min "
        "sigma_max sigma_data p_std gradient_clip_norm exponent power div_factor "
        "final_div_factor decay_rate clip_threshold clipping_threshold estim_lr0 estim_lr_coef "
        "init_estim_sq_dist init_step "
        "timestep_scaling eta_plus max_step_size scaling trust_coefficient consistent_rms "
        "max_ddpm_temb_period shift std mlp_ratio time_scale"
    ),
    SHARE: (
        "drop_tags pyramid_noise_discount flow_ratio ucg_rate ucg_from ema_decay rescale "
        "v_posterior"
    ),
    BELOW_1: "kappa dropout b1 b2 b3 adam_b1 adam_b2 beta3 betas decay momentum",
    INSIDE_1: "t_last linear_start linear_end given_betas pct_start pct_final",
    COUNT_OR_ALL: "num_head_channels num_heads_upsample data fsdp context tensor slices",
    ANY: (
        "scale min_scale image_scale logvar_init p_mean layer_idx default ns_coeffs key "
        "adam_learning_rate frame_noise guidance_scale mean "
        # merge_factor is a share with merge_strategy = "fixed", and otherwise its logit.
        "merge_factor time_block_merge_factor motion_block_merge_factor"
    ),
    Range(0, 1, above=True): "dynamic_percentile object_share",
    Range(0, 0.5): "edge_perc",
    Range(0, 1000): "learning_rate",
    Range(1, 1000): "max_aspect",
    Range(1, 65536): "image_size",
    Range(0, others=(math.inf,)): "s_tmax",
    Range(1, FOR_EVER): "cycle_lengths",
    Range(2): "first_step",
    Range(3): "max_length",
}
# Where one name means several things: "function.option".
_SCOPED = {
    "EmaOptions.power": Range(0, LARGEST_LENGTH, above=True),
    "ddim.eta": SHARE,
    "tcd.eta": SHARE,
    "consistency_loss_fn.num_levels": Range(2),
    "mean_flow_loss_fn.power": FROM_0,
    "restart.low": ABOVE_0,
    # A share with merge_strategy = "fixed", and otherwise its logit.
    "VideoAutoencoder.alpha": ANY,
    "restart.high": ABOVE_0,
    "plms.eta": Range(0, 0),
    "cosine_decay.alpha": SHARE,
    "AdapterOptions.alpha": ABOVE_0,
    "PriorOptions.weight": FROM_0,
    "PriorOptions.share": INSIDE_1,
    "AdaptedLayers.alpha": ABOVE_0,
    "adadelta.rho": BELOW_1,
    "momo.beta": BELOW_1,
    "muon.beta": BELOW_1,
    "signum.beta": BELOW_1,
    "rprop.eta_minus": INSIDE_1,
}
RANGES = {name: own for own, names in _NAMES.items() for name in names.split()} | _SCOPED


def range_of(function: Callable, name: str) -> Range | None:
    """Find the range of a numeric option, None for a function of the user's own."""
    if str(getattr(function, "__module__", "")).partition(".")[0] not in _KNOWN:
        return None
    scoped = f"{getattr(function, '__name__', '')}.{name}"
    return RANGES[scoped] if scoped in RANGES else RANGES.get(name, ANY)


def first_outside(value: Any, wanted: Range) -> int | float | None:
    """Return the first number in a value, a sequence or a mapping that is outside of a range."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        found = (first_outside(item, wanted) for item in value)
        return next((number for number in found if number is not None), None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and not wanted.holds(value) else None
