"""Frozen encoders that the pattern of what is trained names, and a step with one of them."""

import jax
import numpy as np
import pytest
from support.experiments import built
from support.trees import drawn

from diffusion_jax.experiment.network.trainable import with_trainable
from diffusion_jax.train.checkpoints.checksums import named_leaves
from diffusion_jax.train.ema import ema_params

CONFIG = "configs/sdxl.py:tiny"


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (None, []),
        ("attn", []),
        ("network/", []),
        ("^conditioner/clip/", ["clip"]),
        ("network/.*attn|conditioner/open_clip/.*attn", ["open_clip"]),
        ("^conditioner/", ["clip", "open_clip"]),
        ("conditioner/nothing/", []),
    ],
)
def test_a_pattern_that_names_a_frozen_encoder_makes_it_trainable(pattern, wanted):
    network = built(CONFIG).network
    embedders = with_trainable(network, pattern).embedders
    texts = [name for name in embedders if embedders[name].text is not None]
    assert [name for name in texts if embedders[name].trainable] == wanted


def test_a_pattern_that_is_found_nowhere_lists_what_there_is():
    with pytest.raises(ValueError, match=r"= 'clop' should be found .*; there are .*network/"):
        built(CONFIG, "--config.train.trainable=clop").abstract_state()


@pytest.mark.slow
def test_a_step_trains_what_the_pattern_names_and_nothing_else():
    options = {
        "train.trainable": r"^conditioner/clip/.*mlp|^network/out_2",
        "train.batch_size": 2,
        "optimizer.learning_rate": 1e-3,
        "lr_schedule.warmup_steps": 0,
        "optimizer.conditioner_lr_factor": 0.5,
        "optimizer.ema_decay": 0.5,
    }
    experiment = built(CONFIG, *(f"--config.{name}={value}" for name, value in options.items()))
    abstract = experiment.abstract_state()
    assert "clip" in abstract.params["conditioner"]
    assert list(experiment.abstract_frozen()["conditioner"]) == ["open_clip"]
    moments = named_leaves(abstract.opt_state["optimizer"])
    assert not [name for name in moments if "input_blocks" in name or "token_embedding" in name]
    frozen = drawn(experiment.abstract_frozen(), 1) | experiment.frozen_constants()
    state = jax.jit(experiment.init)(jax.random.key(0))
    state = state._replace(params=drawn(abstract.params, 2))
    batch = {name: np.asarray(leaf) for name, leaf in drawn(experiment.abstract_batch(), 3).items()}
    texts = experiment.network.with_inputs({**batch, "caption": ["a fox", "a red house"]})
    batch |= {name: texts[name] for name in batch if "tokens" in name}
    new, _ = jax.jit(experiment.train_step)(state, batch, frozen)
    before, after = named_leaves(state.params), named_leaves(new.params)
    changed = {name for name in after if np.any(before[name] != after[name])}
    wanted = {n for n in after if ("/mlp/" in n and "conditioner/clip/" in n) or "/out_2/" in n}
    # Layers behind the one whose states are read have no gradient.
    assert wanted - changed <= {n for n in wanted if "layers_1" in n}
    assert changed <= wanted and {n.split("/")[0] for n in changed} == {"conditioner", "network"}
    averaged = named_leaves(ema_params(new.opt_state))
    name = next(n for n in sorted(changed) if n.startswith("conditioner/"))
    assert np.any(averaged[name] != before[name])
