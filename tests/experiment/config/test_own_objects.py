"""name = "package.module:Object" takes a user's own objects, with the same checks and commands."""

import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.commands import shared_experiments

from diffusion_jax.cli import main
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.binding import ConfigError, import_object, is_own
from diffusion_jax.experiment.config.files import load_config

MODULE = '''
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion import guidance
from diffusion_jax.diffusion.samplers.by_level import euler
from diffusion_jax.models.conditioning.conditioner import Embedder

SIZE = 3


class Net(nn.Module):
    """One convolution, moved by the label and the time."""

    out_channels: int
    num_classes: int
    width: int = 4
    size_multiple: int = 4

    @nn.compact
    def __call__(self, x, t, context=None, y=None, *, train=False):
        assert context is None
        h = nn.Conv(self.width, (3, 3))(x)
        h = h + nn.Embed(self.num_classes, self.width)(y)[:, None, None, :]
        return nn.Conv(self.out_channels, (3, 3))(h + 1e-3 * t[:, None, None, None])


class Attentive(nn.Module):
    context_dim: int
    adm_in_channels: int
    out_channels: int

    @nn.compact
    def __call__(self, x, t, context=None, y=None, *, train=False):
        assert context.shape[-1] == self.context_dim and y.shape[-1] == self.adm_in_channels
        return nn.Dense(self.out_channels)(x)


class Table(nn.Module):
    width: int

    @nn.compact
    def __call__(self, label):
        return nn.Embed(10, self.width)(label)[:, None, :]


def words(*, width: int, ucg_rate: float = 0.0) -> Embedder:
    return Embedder(Table(width), "label", ucg_rate)


def mean_error(apply, embed, encode, *, batch_size, power: float = 2.0):
    """|x - x_0|^power with x = x_0 + noise of the size of the batch, for the test only."""

    def loss_fn(params, mutable, frozen, batch, keys, *, train):
        x = encode(frozen, batch, keys)
        conditioning = embed(params, frozen, batch, keys if train else None)
        t = jnp.full((x.shape[0],), batch_size, jnp.int32)
        out = apply(params, x, t, conditioning, None)
        loss = jnp.mean(jnp.abs(out - x) ** power)
        return loss, ({"loss": loss, "loss_simple": loss, "power": jnp.float32(power)}, mutable)

    return loss_fn


def absolute(model_output, x_start, t, schedule, *, parameterization, weight, factor: float = 1.0):
    assert parameterization == "v" and schedule.num_timesteps == 1000 and t.shape == (8,)
    per_sample = factor * jnp.abs(model_output - x_start).mean(axis=(1, 2, 3))
    return jnp.average(per_sample, weights=weight), {"loss_simple": per_sample[0]}


def coarse_euler(sigmas, *, every: int = 1):
    return euler(np.concatenate([sigmas[:-1:every], sigmas[-1:]]))


def halved(apply, conditioning, unconditional, scale, *, share: float = 0.5):
    return guidance.cfg(apply, conditioning, unconditional, share * scale)


def heavy(*, factor: float):
    return lambda sigma: factor * jnp.ones_like(sigma)


class Squares:
    """A white square on black, its place the label."""

    def __init__(self, split: str, *, count: int = 16):
        self.split, self.count = split, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.zeros((28, 28, 1), np.uint8)
        label = index % 10
        image[2 * label : 2 * label + 8, 4:12] = 255
        return {"image": image, "label": label}
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own in the current folder."""
    (tmp_path / "own_module.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_module"
    sys.modules.pop("own_module", None)


def build(*overrides, config="mnist:tiny"):
    given = [f"--config.{override}" for override in overrides]
    return make_experiment(load_config(config, given), devices=jax.devices()[:1])


NET = ("model={'name': 'own_module:Net', 'width': 2}",)


def test_a_network_is_built_with_what_follows_and_trains(own):
    built = build(*NET)
    module = built.network.module
    assert (type(module).__name__, module.width) == ("Net", 2)
    assert (module.out_channels, module.num_classes) == (1, 11)
    assert built.network.size_multiple() == 4
    built.check()
    other = build(
        "model={'name': 'own_module:Attentive'}",
        "conditioning={'key': 'crossattn-adm', 'embedders': {'kind': {'name': 'class_embedding',"
        "'num_classes': 10, 'embed_dim': 6}, 'size': {'name': 'numbers', 'input_key':"
        "'target_size', 'outdim': 4}}}",
        "guidance=delete",
    )
    assert (other.network.module.context_dim, other.network.module.adm_in_channels) == (6, 8)
    assert other.network.size_multiple() == 1
    other.check()


def test_a_number_of_classes_is_not_filled_in_with_a_word(own):
    """UNet.num_classes = "sequential" means features; a network of one's own may count classes."""
    sizes = (
        "conditioning={'key': 'adm', 'embedders': {'size': {'name': 'numbers', 'input_key':"
        "'target_size', 'outdim': 4}}}",
        "guidance=delete",
    )
    net = "model={'name': 'own_module:Net', 'num_classes': 5}"
    assert build(net, *sizes).network.module.num_classes == 5
    with pytest.raises(ConfigError, match=r"config\.model\.num_classes is missing"):
        build("model={'name': 'own_module:Net'}", *sizes)


@pytest.mark.slow
def test_an_embedder_a_loss_and_a_weighting(own):
    embedder = "conditioning={'key': 'crossattn', 'embedders': {'a': {'name': 'own_module:words',"
    unet = ("model.use_spatial_transformer=True",)
    built = build(f"{embedder}'width': 5, 'ucg_rate': 0.1}}}}}}", *unet)
    assert built.network.module.context_dim == 5
    built.check()
    loss = build(*NET, "loss={'name': 'own_module:mean_error', 'power': 3}")
    state = loss.init_state()
    batch = {"image": jnp.ones((8, 28, 28, 1)), "label": jnp.zeros(8, jnp.int32)}
    step = jax.jit(loss.train_step)
    _, metrics = step(state, batch, loss.random_frozen())
    assert float(metrics["power"]) == 3.0 and float(metrics["loss"]) > 0
    one, two = (
        build(*NET, f"loss={{'name': 'own_module:absolute', 'factor': {f}}}") for f in (1, 2)
    )
    padded = batch | {"weight": jnp.array([1.0] * 4 + [0.0] * 4)}
    found = [
        jax.jit(b.eval_step)(state.params, {}, b.random_frozen(), padded, 0) for b in (one, two)
    ]
    np.testing.assert_allclose(float(found[1]["loss"]), 2 * float(found[0]["loss"]), rtol=1e-6)
    assert {"loss", "loss_simple"} <= set(found[0]) and float(found[0]["loss"]) > 0
    with pytest.raises(
        ConfigError, match="'own_module:absolute' trains on the schedule's timesteps"
    ):
        build(*NET, "loss={'name': 'own_module:absolute'}", "denoiser={'name': 'continuous'}")
    weights = "weighting={'name': 'own_module:heavy', 'factor': 2.0}"
    one, two = (
        jax.jit(b.eval_step)(state.params, {}, b.random_frozen(), batch, 0)["loss"]
        for b in (build(*NET, "loss={'name': 'denoiser'}", "weighting.name=unit"),
                  build(*NET, "loss={'name': 'denoiser'}", weights))
    )  # fmt: skip
    np.testing.assert_allclose(float(two), 2 * float(one), rtol=1e-5)


def test_a_sampler_and_a_guider(own):
    sampler = "sampler={'name': 'own_module:coarse_euler', 'every': 1, 'num_steps': 3}"
    ours = build(*NET, sampler, "guidance={'name': 'own_module:halved', 'share': 1.0, 'scale': 2.}")
    theirs = build(*NET, "sampler={'name': 'euler', 'num_steps': 3}")
    half = build(*NET, sampler, "guidance={'name': 'own_module:halved', 'scale': 4.0}")
    params, frozen = ours.init_state().params, ours.random_frozen()
    keys = jax.random.split(jax.random.key(3), 2)
    inputs = {"label": np.array([1, 7], np.int32)}
    first, second, third = (
        b.sample_fn(params, frozen, inputs, keys).x for b in (ours, theirs, half)
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)
    np.testing.assert_allclose(third, second, rtol=1e-5)
    plain = ours.sample_fn(params, frozen, inputs, keys, guidance_scale=1.0).x
    assert np.abs(np.asarray(plain - second)).max() > 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.name=own_modul:Net",
            r"model\.name = 'own_modul:Net': cannot import the module 'own",
        ),
        ("model.name=own_module:Nett", "has no 'Nett'; did you mean 'Net'. choose from .*Squares"),
        ("model.name=own_module:SIZE", "'own_module:SIZE' should be a function or a class, not 3"),
        ("model.name=own-module:Net", "'own-module:Net' should be written package.module:Object"),
        ("model.width=a", r"config\.model\.width = 'a' should be int"),
        ("model.widht=3", r"config\.model\.widht = 3 is not an option; did you mean 'width'"),
        ("model.num_classes=3", r"num_classes = 3 should be 11, the null class and the 10"),
        ("optimizer.name=own_module:Net", r"config\.optimizer\.name = 'own_module:Net' is unknown"),
        (
            "data.source.name=own_module:Squares",
            r"config\.data\.source\.countt = 3 is not an option",
        ),
    ],
)
def test_mistakes_are_told(own, override, message):
    with pytest.raises(ConfigError, match=message):
        build(*NET, "data.source.countt=3" if "source" in override else "seed=0", override)


def test_an_object_is_asked_for_what_the_commands_need(own):
    with pytest.raises(
        ConfigError, match=r"embedders\.a\.name = 'own_module:heavy' should return an"
    ):
        build("conditioning.embedders={'a': {'name': 'own_module:heavy', 'factor': 1.0}}")
    assert is_own("a.b:C") and not is_own("cifar10:3.0.2") and not is_own("unet") and not is_own(3)
    assert import_object("own_module:Squares.__len__", "x").__name__ == "__len__"


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:getoutput",
        "os:system",
        "builtins:exec",
        "numpy:load",
        "pip:main",
        "diffusion_jax.experiment.config.files:load_config",
    ],
)
def test_a_config_calls_nothing_that_its_user_did_not_write(tmp_path, name):
    """Somebody else's run folder chooses the object and its arguments."""
    with pytest.raises(ConfigError, match="should be an object of your own"):
        import_object(name, "x")


def test_what_an_own_module_imports_is_not_its_own(own):
    assert import_object(f"{own}:Net", "x").__name__ == "Net"
    for name in ("np.load", "nn.Dense"):
        with pytest.raises(ConfigError, match=f"should be defined in '{own}', which imports it"):
            import_object(f"{own}:{name}", "x")


def test_an_installed_package_that_requires_this_one_is_the_users(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    for package, requirement in (("my_parts", "diffusion-jax>=0.1"), ("library", "jax")):
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").write_text("def loss(): pass\n")
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: {requirement}\n"
        )
        (info / "top_level.txt").write_text(f"{package}\n")
    monkeypatch.syspath_prepend(str(site))
    assert import_object("my_parts:loss", "x").__name__ == "loss"
    with pytest.raises(ConfigError, match="'library' belongs to Python or to an installed package"):
        import_object("library:loss", "x")


@pytest.mark.slow
def test_every_command_reads_a_run_of_own_objects(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_module.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    overrides = [
        "model={'name': 'own_module:Net'}",
        "loss={'name': 'own_module:mean_error'}",
        "data.source={'name': 'own_module:Squares', 'count': 24}",
        "train.num_steps=2",
        "schedule.num_timesteps=20",  # bits per dimension take a network call for each
        "sampler={'name': 'own_module:coarse_euler', 'num_steps': 2}",
    ]
    given = [f"--config.{override}" for override in overrides]
    with shared_experiments():
        assert main(["--config=mnist:tiny", "--workdir=run", *given]) == 0
        assert main(["evaluate", "--workdir=run"]) == 0
        assert "24 records of test" in capsys.readouterr().out
        assert main(["sample", "--workdir=run", "--class=3", "--n=2", "--out=images"]) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 2
    assert main(["plan", "--config=run/config.json", "--topology=cpu:2"]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    sys.modules.pop("own_module")
    capsys.readouterr()
    assert main(["sample", "--workdir=../run", "--class=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config.") and error.count("\n") == 1
    assert "cannot import the module 'own_module'" in error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = (", r"failing\.py.* SyntaxError|SyntaxError.*failing\.py"),
        ("\nraise RuntimeError('a\\n b')", r"failing\.py:2: RuntimeError: a b$"),
        ("import sys\nsys.exit(0)", r"failing\.py:2: SystemExit: 0$"),
    ],
)
def test_a_module_that_fails_is_one_sentence(tmp_path, monkeypatch, body, message):
    (tmp_path / "failing.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"^x = 'failing:f': the module 'failing' fails: .*{message}"
    ):
        import_object("failing:f", "x")
