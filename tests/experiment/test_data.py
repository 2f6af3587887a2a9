"""The `data` section: options reach the batches, evaluation leaves nothing to chance."""

import numpy as np
import pytest

from diffusion_jax.experiment import data as data_section
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.data import build_data


def section(**batches):
    return {
        "source": {"name": "made_up", "data_dir": "nowhere"},
        "splits": {"validation": "train[90%:]"},
        "batches": {"image_size": 4, "channels": 1, "num_threads": 0, **batches},
    }


def wide(count=6):
    """Images of 4 x 12 pixels, white in the middle and black beside it, some with two captions."""
    image = np.zeros((4, 12, 1), np.uint8)
    image[:, 4:8] = 255
    return [{"image": image, "label": i, "text": ["a", "b"][: 1 + i % 2]} for i in range(count)]


def test_options_and_defaults():
    data = build_data(section(image_size=(4, 6), random_flip=True))
    assert data.image_shape == (4, 6, 1)
    assert (data.name, data.source_options) == ("made_up", {"data_dir": "nowhere"})
    assert data.splits == {"train": "train", "validation": "train[90%:]", "test": None}
    assert data.image_options.resize == data.batch_options["resize"] == "bicubic"
    assert data.batch_options["random_flip"] is True and data.batch_options["num_workers"] == 0
    assert not {"source", "batch_size", "seed", "finish"} & data.batch_options.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"imagesize": 4},
            "config.data.batches.imagesize = 4 is not an option; did you mean 'image",
        ),
        ({"shufle": True}, "batches.shufle = True is not an option; did you mean 'shuffle'"),
        ({"batch_size": 4}, "config.data.batches.batch_size = 4 is not an option"),
        ({"finish": None}, "config.data.batches.finish = None is not an option"),
        ({"pad": 0.5}, "config.data.batches.pad = 0.5 should be int"),
        ({"drop_tags": 0.1}, r"batches\.drop_tags = 0\.1 needs config\.data\.batches\.tags"),
        ({"tags": ""}, r"batches\.tags = '' should be what lies between tags"),
        ({"tags": ",", "drop_tags": 1.5}, r"batches\.drop_tags = 1\.5 should be between 0 and 1"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        build_data(section(**change))


def test_missing_parts_are_named():
    for name in ("source", "batches"):
        rest = {key: value for key, value in section().items() if key != name}
        with pytest.raises(ConfigError, match=f"config.data.{name} is missing"):
            build_data(rest)
    with pytest.raises(ConfigError, match="config.data.source.name is missing"):
        build_data(section() | {"source": {}})
    with pytest.raises(ConfigError, match="config.data.batches.image_size is missing"):
        build_data(section() | {"batches": {}})


def test_a_role_opens_its_split(monkeypatch):
    opened = []

    def open_source(*place, **options):
        opened.append((place, options))
        return wide()

    monkeypatch.setattr(data_section, "open_source", open_source)
    data = build_data(section())
    data.source("validation")
    assert opened == [(("made_up", "train[90%:]"), {"data_dir": "nowhere"})]
    with pytest.raises(ConfigError, match="config.data.splits.test is not set"):
        data.source("test")
    with pytest.raises(ConfigError, match="split 'val' is unknown; choose from train, validation"):
        data.source("val")


@pytest.mark.parametrize(("crop", "left"), [("random", 4), ("center", 4), ("stretch", 0)])
def test_evaluation_cuts_the_middle_where_training_cuts_at_random(crop, left):
    """The middle third of an image is white; stretched, a window is black at both sides."""
    data = build_data(section(crop=crop, resize="area"))
    (batch,) = data.eval_batches(wide(), batch_size=6).iterate(0)
    assert (batch["image"].min() == 1.0) == (crop != "stretch")
    assert batch["crop_top_left"].tolist() == [[0, left]] * 6
    online = data.train_batches(wide(), batch_size=6, seed=0).iterate(0)
    lefts = np.concatenate([next(online)["crop_top_left"][:, 1] for _ in range(5)])
    assert len(set(lefts.tolist())) == (9 if crop == "random" else 1)


def test_flips_and_crops_of_training_do_not_reach_evaluation():
    data = build_data(section(random_flip=True, shuffle=False, num_workers=1, crop="random"))
    first, again = (list(data.eval_batches(wide(), batch_size=4).iterate(0)) for _ in range(2))
    assert [batch["index"].tolist() for batch in first] == [[0, 1, 2, 3], [4, 5, -1, -1]]
    assert [batch["weight"].tolist() for batch in first] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left["image"], right["image"])


def test_finish_reaches_every_maker_of_batches():
    data = build_data(section())

    def finish(batch):
        return {**batch, "seen": True}

    assert next(data.train_batches(wide(), batch_size=2, seed=0, finish=finish).iterate(0))["seen"]
    assert next(data.eval_batches(wide(), batch_size=2, finish=finish).iterate(0))["seen"]


def test_classes_of_the_label_that_batches_carry():
    assert build_data(section(label_key="label")).class_names(wide()) == ()
    with pytest.raises(ValueError, match="label_key = 'kind' is no feature; choose from image"):
        build_data(section(label_key="kind")).class_names(wide())


def test_the_fingerprint_is_of_the_features_that_batches_carry():
    data = build_data(section())
    found = data.fingerprint(wide())
    assert (found["num_examples"], found["class_names"]) == (6, [])
    other = [{**record, "kind": 1} for record in wide()]
    assert data.fingerprint(other) == found
    assert build_data(section(label_key="kind")).fingerprint(other)["digest"] != found["digest"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"name": ""}, r"config\.data\.source\.name = '' should be the name of a TFDS data set"),
        ({"name": None}, r"config\.data\.source\.name = None should be the name"),
        ({"name": "image_folder"}, r"config\.data\.source\.folder is missing"),
        ({"name": "openmoji", "size": 0}, r"config\.data\.source\.size = 0 should be at least 1"),
        (
            {"name": "openmoji", "siez": 9},
            r"source\.siez = 9 is not an option; did you mean 'size'",
        ),
        ({"name": "cifar10", "download": 3}, r"config\.data\.source\.download = 3 should be bool"),
    ],
)
def test_options_of_a_source_are_checked_before_it_is_opened(source, message):
    with pytest.raises(ConfigError, match=message):
        build_data({"source": source, "batches": {"image_size": 8}})
    assert build_data({"source": {"name": "x", "version": "1"}, "batches": {"image_size": 8}})
