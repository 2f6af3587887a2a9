"""Pictures go into the page as data, samples first, fewer where there are too many."""

import base64

from support.reports import logged, picture

from diffusion_jax.runs.report.embedding import MAX_STEPS, embedded
from diffusion_jax.runs.report.gathering import gather

ROWS = [{"step": 8, "time": 70.0, "train/loss": 2.0}]


def test_samples_come_first_with_their_captions(workdir):
    logged(workdir, ROWS)
    for name in ("train/inputs", "train/samples", "val/samples", "val/conditioning"):
        path = picture(workdir, name, 4)
    path.with_suffix(".txt").write_text("seven\n<b>nine</b>\n")
    found = embedded(gather(workdir), 1 << 20)
    assert found["names"][:2] == ["val/samples", "train/samples"] and found["steps"] == [4]
    assert found["files"]["val/conditioning"][4]["texts"] == ["seven", "<b>nine</b>"]
    url = found["files"]["train/inputs"][4]["image"]
    start = "data:image/png;base64,"
    content = (workdir / "images/train/inputs_gs-000004.png").read_bytes()
    assert url.startswith(start) and base64.b64decode(url.removeprefix(start)) == content


def test_many_pictures_are_spread_over_the_steps_within_the_limit(workdir):
    logged(workdir, ROWS)
    steps = range(10, 1010, 10)
    size = sum(picture(workdir, "val/samples", step).stat().st_size for step in steps)
    found = embedded(gather(workdir), size)["steps"]
    assert len(found) == MAX_STEPS and found[0] == 10 and found[-1] == 1000
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 10
    found = embedded(gather(workdir), size // 20)["steps"]
    assert 2 <= len(found) <= 5 and found[-1] == 1000
    assert embedded(gather(workdir), 1)["steps"] == [1000]
