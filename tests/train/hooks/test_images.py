import numpy as np
import pytest
from PIL import Image

from diffusion_jax.train.hooks.images import images
from diffusion_jax.train.loop import Event
from diffusion_jax.train.writers import Writer, background_writer, image_writer


def due_steps(last, **options):
    hook = images(lambda state, batch: {}, Writer(), **options)
    return [step for step in range(1, last + 1) if hook.due(step)]


def upstream_steps(last, frequency, increase):
    """ImageLogger of the originals, which pops a list as it goes."""
    left = [2**n for n in range(int(np.log2(frequency)) + 1)] if increase else [frequency]
    found = []
    for step in range(1, last + 1):
        if step % frequency == 0 or step in left:
            found.append(step)
            if left:
                left.pop(0)
    return found


@pytest.mark.parametrize("frequency", [1, 5, 8, 100, 750])
@pytest.mark.parametrize("increase", [True, False])
def test_same_steps_as_the_originals(frequency, increase):
    got = due_steps(2000, batch_frequency=frequency, increase_log_steps=increase)
    assert got == upstream_steps(2000, frequency, increase)


def test_first_step_on_request():
    options = dict(batch_frequency=10, increase_log_steps=False)
    assert due_steps(20, log_first_step=True, **options) == [1, 10, 20]
    assert due_steps(20, **options) == [10, 20]


def event(step=100, batch="train batch"):
    return Event(step, "state", {}, batch, 0.0)


def test_grids_are_what_was_logged(tmp_path, memory_writer):
    (memory, written) = memory_writer()
    samples = np.linspace(-1, 1, 6)[:, None, None, None] * np.ones((6, 5, 7, 3))
    row = np.linspace(-1, 1, 6).reshape(2, 3, 1, 1, 1) * np.ones((1, 1, 5, 7, 1))

    def log_images(state, batch):
        assert (state, batch) == ("state", "train batch")
        return {"samples": samples, "diffusion_row": row, "captions": ["a\n fox", "b"]}

    writer = background_writer(memory, image_writer(tmp_path))
    hook = images(log_images, writer, max_images=5)
    hook.act(event())
    writer.close()
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png"))
    assert files == [
        f"train/{key}_gs-000100.png" for key in ("captions", "diffusion_row", "samples")
    ]
    grid = np.asarray(Image.open(tmp_path / "train/samples_gs-000100.png"))
    assert grid.shape == (2 + 2 * 7, 2 + 4 * 9, 3)
    expected = np.rint((samples[:5, 0, 0, 0] + 1) * 127.5)
    assert [grid[2 + i // 4 * 7, 2 + i % 4 * 9, 0] for i in range(5)] == expected.tolist()
    assert grid[2 + 7, 2 + 9, 0] == 0  # the sixth image is one too many
    rows = written.images[100]["train/diffusion_row"]
    assert rows.shape == (1, 2 + 2 * 7, 2 + 3 * 9, 1)
    assert [rows[0, 2 + 7 * (i // 3), 2 + 9 * (i % 3), 0] for i in range(6)] == np.rint(
        (row.ravel()[::35][:6] + 1) * 127.5
    ).tolist()
    assert written.images[100]["train/captions"].max() == 255
    assert written.texts == {100: {"train/captions": "a fox\nb\n"}}
    assert (tmp_path / "train/captions_gs-000100.txt").read_text() == "a fox\nb\n"


def test_clamp(tmp_path, memory_writer):
    wide = np.array([-3.0, 3.0, 1.0, 0.0]).reshape(1, 2, 2, 1) * np.ones((1, 1, 1, 3))
    for clamp, expected in [(True, [0, 255, 255, 128]), (False, [0, 255, 170, 128])]:
        memory, written = memory_writer()
        images(lambda s, b: {"x": wide}, memory, clamp=clamp).act(event())
        assert written.images[100]["train/x"][0, ..., 0].ravel().tolist() == expected


def test_validation_shows_its_own_batch(memory_writer):
    memory, written = memory_writer()
    seen = []

    def log_images(state, batch):
        seen.append(batch)
        return {"inputs": np.zeros((1, 4, 4, 3))}

    images(log_images, memory, split="validation", batch="val batch").act(event())
    assert seen == ["val batch"]
    assert list(written.images[100]) == ["validation/inputs"]


def test_what_cannot_be_shown_is_named():
    hook = images(lambda s, b: {"latents": np.zeros((2, 4, 4, 4))}, Writer())
    with pytest.raises(ValueError, match=r"cannot show 'train/latents': .*\(2, 4, 4, 4\)"):
        hook.act(event())


def test_bad_options():
    with pytest.raises(ValueError, match="batch_frequency = 0 should be at least 1 step"):
        images(lambda s, b: {}, Writer(), batch_frequency=0)
