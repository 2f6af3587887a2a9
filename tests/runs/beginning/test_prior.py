"""Images that a model draws before training: drawn once, in parts, and mixed into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.experiments import built

from diffusion_jax.diffusion.samplers.driver import Samples
from diffusion_jax.runs.beginning.prior import draw_images, with_prior

OVERRIDES = (
    "data.batches.buckets=False",
    "data.batches.num_threads=0",
    "data.batches.caption='a sks fox'",
    "train.batch_size=4",
    "prior.prompt='a fox'",
    "prior.num_images=5",
    "prior.batch_size=2",
    "prior.weight=0.5",
)
SOURCE = [{"image": np.zeros((32, 32, 3), np.uint8), "caption": f"own {i}"} for i in range(4)]


class Model:
    """An experiment whose sampler draws an image of one grey level for each key."""

    def __init__(self, *overrides):
        self.calls = []
        experiment = built(
            "configs/sdxl.py:tiny", *(f"--config.{o}" for o in (*OVERRIDES, *overrides))
        )
        task = experiment.task
        drawing = task.drawing._replace(sample_fn=self.draw)
        self.experiment = experiment._replace(task=task._replace(drawing=drawing))

    def draw(self, params, frozen, inputs, keys, *, num_steps, guidance_scale):
        self.calls.append((params, {name: len(rows) for name, rows in inputs.items()}))
        levels = jax.vmap(lambda key: jax.random.uniform(key, minval=-1.0))(keys)
        return Samples(
            jnp.broadcast_to(levels[:, None, None, None], (len(keys), 32, 32, 3)), None, None
        )

    def mix(self, workdir, *, begins=True, home=None):
        own = self.experiment.train_batches(SOURCE)
        home = workdir if home is None else home
        return with_prior(self.experiment, own, {"w": 1}, {}, workdir, home=home, begins=begins)


def levels(folder):
    files = sorted(folder.glob("*.png"))
    return {file.name: int(np.asarray(Image.open(file))[0, 0, 0]) for file in files}


def test_images_are_drawn_once_and_mixed_with_the_data(tmp_path):
    model = Model()
    batch = next(model.mix(tmp_path).iterate(0))
    assert len(model.calls) == 3 and model.calls[0][0] == {"w": 1}
    assert set(model.calls[0][1].values()) == {2}
    drawn = levels(tmp_path / "prior")
    assert list(drawn) == [f"0000{i}.png" for i in range(5)] and len(set(drawn.values())) > 3
    assert batch["caption"].tolist() == ["a sks fox", "a fox"] * 2
    assert batch["weight"].tolist() == [1.0, 0.5, 1.0, 0.5]
    pixels = np.rint((batch["image"][1::2, 0, 0, 0] + 1) * 127.5).astype(int)
    assert set(pixels.tolist()) <= set(drawn.values())
    assert all(name in batch for name in model.experiment.abstract_batch())
    again = Model()
    resumed = again.mix(tmp_path, begins=False)
    np.testing.assert_array_equal(next(resumed.iterate(0))["image"], batch["image"])
    assert again.calls == []


def test_drawing_goes_on_where_it_was_ended(tmp_path):
    whole, part = Model(), Model()
    whole.mix(tmp_path / "whole")
    draw_images(part.experiment, {"w": 1}, {}, tmp_path / "part/prior", [0, 1])
    part.mix(tmp_path / "part")
    assert len(part.calls) == 3
    assert levels(tmp_path / "part/prior") == levels(tmp_path / "whole/prior")


def test_a_fork_takes_the_images_of_its_run_and_own_pictures_count(tmp_path):
    first, fork = Model(), Model()
    first.mix(tmp_path / "a")
    fork.mix(tmp_path / "b", home=tmp_path / "a", begins=False)
    assert fork.calls == [] and levels(tmp_path / "b/prior") == levels(tmp_path / "a/prior")
    folder = tmp_path / "own"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32)).save(folder / f"photo{i}.jpg")
    named = Model(f"prior.folder={folder}")
    named.mix(tmp_path / "c")
    assert len(named.calls) == 1 and list(levels(folder)) == ["00000.png"]


def test_missing_images_and_those_of_another_prompt_are_told(tmp_path):
    model = Model()
    with pytest.raises(ValueError, match="lacks 5 of 5 images of config.prior, which were drawn"):
        model.mix(tmp_path, begins=False)
    assert not (tmp_path / "prior").exists()
    model.mix(tmp_path)
    with pytest.raises(ValueError, match="holds images of 'a fox', and config.prior.prompt = 'a c"):
        Model("prior.prompt='a cat'").mix(tmp_path)
