"""make_optimizer against torch: AdamW with clipping and LambdaLR over 20 steps, and the average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.train.ema import ema_params
from diffusion_jax.train.lr_schedules import LR_SCHEDULES
from diffusion_jax.train.optimizer import make_optimizer

pytestmark = pytest.mark.parity

SHAPES = {"kernel": (3, 3, 4, 8), "bias": (8,), "scale": (8,)}
SCHEDULE = {
    "warm_up_steps": (5,),
    "f_min": (0.1,),
    "f_max": (1.0,),
    "f_start": (0.01,),
    "cycle_lengths": (20,),
}


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("scheduled", [False, True])
def test_adamw_follows_torch(clip, scheduled):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    # weights of the size that networks have; rounding grows with them
    start = {k: 0.1 * random.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    gradients = [
        {k: random.normal(size=s).astype(np.float32) for k, s in SHAPES.items()} for _ in range(20)
    ]
    multiplier = LR_SCHEDULES["lambda_warmup_cosine2"](**SCHEDULE) if scheduled else None
    tx, lr_at = make_optimizer(
        "adamw",
        learning_rate=1e-2,
        lr_multiplier=multiplier,
        gradient_clip_norm=clip,
        ema_decay=0.9999,
    )
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    # as accurate as optimised code is: LLVM at level 0, the default of tests, fuses no products
    update = jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 1})

    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=1e-2)
    rate = (lambda n: float(multiplier(n))) if scheduled else (lambda n: 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, rate)
    shadow = {k: torch.tensor(v) for k, v in start.items()}

    for n, gradient in enumerate(gradients):
        assert float(lr_at(n)) == pytest.approx(adamw.param_groups[0]["lr"], rel=1e-6)
        updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, updates)
        for k, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[k])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        adamw.step()
        scheduler.step()
        decay = min(0.9999, (1 + (n + 1)) / (10 + (n + 1)))
        for k in shadow:
            shadow[k] -= (1 - decay) * (shadow[k] - theirs[k].detach())
        for k in SHAPES:
            np.testing.assert_allclose(params[k], theirs[k].detach().numpy(), rtol=0, atol=1e-6)
            np.testing.assert_allclose(ema_params(state)[k], shadow[k].numpy(), rtol=0, atol=1e-6)
