"""The benchmarks run, and refuse what would be no comparison; PyTorch's side is not needed here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax import load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Let the scripts import each other, as they do when they are started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in (
        "paired",
        "train_step",
        "sample",
        "sampling",
        "compile_time",
        "autoencoder",
        "video",
        "race",
        "race_data",
        "lora",
    ):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("name, unit", [("train_step", "step"), ("sample", "batch")])
def test_our_side_runs_and_prints_its_times(scripts, capsys, name, unit):
    module = __import__(name)
    [numbers] = module.main(["--no_peer", "--nets=tiny", "--rounds=2", "--repeats=1"])
    assert len(numbers["ours"]) == 2 and all(round_.wall > 0 for round_ in numbers["ours"])
    said = capsys.readouterr().out
    assert re.search(rf"tiny: configs/mnist.py:tiny, a {unit} of 8 images", said)
    assert re.search(rf"{unit}, least +\d+\.\d+ s", said)


def test_an_unknown_net_is_refused_with_the_choices(scripts, capsys):
    import paired

    with pytest.raises(SystemExit):
        paired.parse(["--nets=demo,cifar"], "", nets="demo")
    assert "'cifar' is unknown; choose from demo, wide28, cifar10, tiny" in capsys.readouterr().err


def test_networks_of_different_size_are_refused(scripts):
    import paired

    paired.same_size(1_000_000, 1_020_000)
    with pytest.raises(ValueError, match="1,000,000 parameters here, 1,050,000 in PyTorch"):
        paired.same_size(1_000_000, 1_050_000)


def test_the_ratio_pairs_the_rounds(scripts):
    import paired

    ours, theirs = object.__new__(paired.Side), object.__new__(paired.Side)
    # The second round was disturbed: twice as long on both sides, which a paired ratio ignores.
    ours.rounds = [paired.Round(1.0, 1.0), paired.Round(2.0, 1.0), paired.Round(1.0, 1.0)]
    theirs.rounds = [paired.Round(3.0, 2.0), paired.Round(6.0, 2.0), paired.Round(4.0, 2.0)]
    assert paired.ratios(ours, theirs) == {
        "median": 3.0,
        "lowest": 3.0,
        "highest": 4.0,
        "least": 3.0,
        "cpu": 2.0,
    }


@pytest.mark.slow
def test_our_side_of_a_first_stage_runs_and_shows_what_weighing_costs(scripts, capsys):
    import autoencoder

    [numbers] = autoencoder.main(["--no_peer", "--nets=tiny", "--rounds=2", "--repeats=1"])
    assert numbers["ratio"] is None and len(numbers["ours"]) == 2
    assert -1.0 < numbers["share"]["median"] < 1.0
    said = capsys.readouterr().out
    assert "tiny: configs/emoji_vae.py:tiny, a step of 4 images" in said
    assert re.search(r"weighing the adversary: -?\d+\.\d% of our step", said)


def test_first_stages_are_timed_with_lpips_and_adversary_from_the_first_step(scripts):
    """The other side computes both in every step."""
    import autoencoder

    for _, (config, _, overrides) in autoencoder.NETS.items():
        loss = load_config(config, overrides).loss
        assert (loss.perceptual_start, loss.disc_start) == (0, 0)


def test_first_stages_that_see_other_numbers_are_refused(scripts):
    import autoencoder

    ours = {"L1": 0.5, "LPIPS": 0.1}
    autoencoder.same_values(ours, {"L1": 0.5001, "LPIPS": 0.1})
    with pytest.raises(ValueError, match="LPIPS is 0.100000 here and 0.110000 in PyTorch"):
        autoencoder.same_values(ours, {"L1": 0.5, "LPIPS": 0.11})


def test_what_weighing_costs_is_the_part_that_goes_without_it(scripts):
    import autoencoder
    import paired

    adaptive, fixed = object.__new__(paired.Side), object.__new__(paired.Side)
    adaptive.rounds = [paired.Round(2.0, 1.0), paired.Round(4.0, 2.0)]
    fixed.rounds = [paired.Round(1.5, 0.9), paired.Round(3.0, 1.0)]
    share = autoencoder.weighing_share(adaptive, fixed)
    assert share == {"median": 0.25, "cpu": pytest.approx(0.1)}


@pytest.mark.slow
def test_our_side_of_latent_sampling_runs_and_prints_its_times(scripts, capsys):
    import sampling

    options = "--nets=tiny --latents=16 --batch_sizes=2 --threads=1 --num_steps=2 --rounds=2"
    [numbers] = sampling.main(["--no_peer", *options.split()])
    assert len(numbers["ours"]) == 2 and numbers["ratios"] == []
    said = capsys.readouterr().out
    assert "tiny latents=16x16 batch=2 steps=2 threads=1 float32" in said
    assert re.search(r"jax .*: \d+\.\d+ s a batch in the median", said)


def test_compilation_is_paid_after_as_many_images_as_the_totals_say(scripts):
    import sampling

    # Ours: 10 s and 1 s a batch; theirs 3 s a batch: level at 5 batches, ahead with the sixth.
    assert sampling.images_until_ahead((1.0, 3.0), (10.0, 0.0), count=4) == 6 * 4
    assert sampling.images_until_ahead((1.0, 3.0), (11.0, 0.0), count=1) == 6
    assert sampling.images_until_ahead((1.0, 3.0), (0.0, 5.0), count=4) == 4
    assert sampling.images_until_ahead((3.0, 3.0), (10.0, 0.0), count=4) is None


def test_wrong_options_of_latent_sampling_are_refused(scripts, capsys):
    import sampling

    for option, message in [
        ("--nets=sdxl2", "'sdxl2' is unknown; choose from tiny, small64, small128, sdxl"),
        ("--peers=lazy", "'lazy' is unknown; choose from eager, compile"),
        ("--threads=4096", "--threads=4096: this process has"),
        ("--num_steps=0", "--num_steps=0 should be at least 1"),
    ]:
        with pytest.raises(SystemExit):
            sampling.parse([option])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_scanned_blocks_are_traced_once(scripts, capsys):
    import compile_time

    options = ["--config=configs/sdxl.py:tiny", "--programs=forward", "--latents=16"]
    unrolled, scanned = compile_time.main(options)
    assert unrolled["parameters"] == scanned["parameters"]
    assert unrolled["stablehlo_operations"] > 1.1 * scanned["stablehlo_operations"]
    assert unrolled["equations"] > 1.1 * scanned["equations"]
    assert set(unrolled["seconds"]) == {"build", "trace", "lower"}
    assert re.search(r"forward scanned .*: build .* s .*, trace .* s", capsys.readouterr().out)


@pytest.mark.slow
def test_on_gpu_measures_tiny_networks_on_a_cpu_and_loses_nothing(tmp_path):
    out = tmp_path / "on_gpu"
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), "--tiny", "--configs", "vae_kl_f8"]
    done = subprocess.run(
        [*command, "--seconds=400", f"--out={out}"], capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr  # flags of GPUs are refused by a CPU's compiler
    rows = json.loads(out.with_suffix(".json").read_text())
    assert rows[0]["config"] == "vae_kl_f8" and rows[0]["images_per_second"] > 0
    assert rows[0]["planned_bytes"] > 0 and "| vae_kl_f8 train |" in done.stdout
    assert len(rows) == 5 and all(row["flags"] in done.stdout for row in rows)


def test_on_gpu_stops_when_its_time_is_over(tmp_path):
    out = tmp_path / "on_gpu"
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), "--seconds=0", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.with_suffix(".json").read_text())
    assert len(rows) == 11 and all(row["skipped"] == "no time was left" for row in rows)


def test_clips_are_compared_with_what_really_follows(scripts):
    import numpy as np
    import video

    # A line that moves by a pixel a frame, and samples that know it but for noise.
    truth = np.zeros((3, 6, 4, 12, 1), np.uint8)
    for n, t in np.ndindex(3, 6):
        truth[n, t, :, n + t] = 200
    noise = np.random.default_rng(0).integers(0, 20, truth.shape)
    noise[:, 0] = 0
    samples = (truth + noise).astype(np.uint8)
    found = video.next_frames(samples, truth)
    assert found.samples == pytest.approx(np.sqrt((noise[:, 1:] ** 2).mean()))
    assert found.copied == pytest.approx(np.sqrt(2 * 200**2 / 12))
    assert found.samples < found.shuffled < 1.05 * found.copied
    errors = video.frame_errors(samples, truth)
    assert len(errors) == 6 and errors[0] == 0 and min(errors[1:]) > 5
    assert video.mean_bucket(truth, 8.0) > 200 and video.mean_bucket(truth[:, :1], 8.0) == 0

    distances, places = video.nearest(samples[[2, 0]], truth)
    assert list(places) == [2, 0]
    assert distances == pytest.approx([video.rms(samples[i], truth[i]) for i in (2, 0)])
    near = video.neighbours(truth[:2], samples, truth)
    assert near.samples == pytest.approx(0, abs=1e-3)
    assert near.unseen == pytest.approx(video.rms(samples, truth), rel=0.1)
    shown = video.above_each_other(truth, samples)
    assert shown.shape == (6, 3 * 2 * (4 + 2), 3 * 3 * (12 + 2), 3)
    np.testing.assert_array_equal(shown[:, 3:15:3, 3:39:3, 0], truth[0, ..., 0])
    np.testing.assert_array_equal(shown[:, 21:33:3, 45:81:3, 2], samples[1, ..., 0])


def test_distances_of_videos_are_of_all_frames_that_i3d_needs(scripts, monkeypatch):
    import types

    import numpy as np
    import video

    lengths = set()

    def features(params, frames):
        lengths.add(frames.shape[1])
        return frames.mean((1, 2, 3))

    extractor = types.SimpleNamespace(features=features, params={})
    monkeypatch.setattr(video, "make_extractor", lambda name: extractor)
    truth = np.random.default_rng(0).integers(0, 100, (4, 8, 2, 2, 3)).astype(np.uint8)
    found = video.video_distances({"same": truth, "brighter": truth + 2}, truth)
    # Equal covariances: the squared distance of the means is left, 2 levels in 3 channels.
    assert found["same"] == pytest.approx(0, abs=1e-3)
    assert found["brighter"] == pytest.approx(3 * 2**2, abs=1e-2) and lengths == {16}


TICKS = "import sys, time\nfor _ in range(30): print(time.monotonic(), flush=True); time.sleep(.01)"


def test_racers_take_turns_and_are_timed_without_waiting(scripts, tmp_path):
    import race

    names = ("a", "b")
    racers = [
        race.Racer(name, [sys.executable, "-c", TICKS], tmp_path / name, budget=60)
        for name in names
    ]
    race.race(racers, seconds=0.1)
    ticks = sorted(
        (float(line), name)
        for name in names
        for line in (tmp_path / name / "log.txt").read_text().splitlines()
    )
    order = [name for _, name in ticks]
    changes = sum(x != y for x, y in zip(order, order[1:], strict=False))
    assert len(order) == 60 and 3 <= changes <= 12, order
    # Both are timed: 0.3 s of ticks and a start each, though twice as much has passed.
    assert all(0.3 <= racer.seconds < 10 and racer.cpu > 0 for racer in racers)
    assert ticks[-1][0] - ticks[0][0] < sum(racer.seconds for racer in racers)


def test_a_racer_that_fails_or_never_ends_stops_the_race(scripts, tmp_path, monkeypatch):
    import race

    code = "import sys, time; print('no such file'); sys.exit(3)"
    bad = race.Racer("bad", [sys.executable, "-c", code], tmp_path / "bad", budget=60)
    slow = race.Racer(
        "slow",
        [sys.executable, "-c", "import time; time.sleep(60)"],
        tmp_path / "slow",
        budget=0.01,
    )
    with pytest.raises(RuntimeError, match=r"(?s)bad ended with code 3:.*no such file"):
        race.race([bad], seconds=30)
    monkeypatch.setattr(race, "START", 0.0)
    with pytest.raises(RuntimeError, match=r"slow has taken \d+ s"):
        race.race([slow], seconds=0.1)
    assert slow.process.poll() is not None


def test_steps_that_fit_into_a_time_leave_room_for_compilation(scripts):
    import race

    # 30 s in all: 10 s before the first step, 100 steps of 0.1 s, and 10 s after them.
    speed = race.speed_of(30.0, [(20, 1002.0), (60, 1006.0), (100, 1010.0)])
    assert speed == pytest.approx((20.0, 0.1))
    assert speed.steps_in(60.0) == 400 and speed.steps_in(1.0) == 1


def test_both_sides_of_the_race_read_the_same_data(scripts, tmp_path, monkeypatch):
    import gzip

    import numpy as np
    import race_data

    images, labels = race_data.digits()
    assert images.shape == (4500, 28, 28, 1) and np.bincount(labels).tolist() == [450] * 10
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    records = race_data.Arrays("train", path=tmp_path / "data.npz")
    assert len(records) == 4500 and records[7]["label"] == labels[7]
    np.testing.assert_array_equal(records[7]["image"], images[7])

    monkeypatch.setattr(race_data, "FASHION", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        race_data.fashion()
    content = gzip.compress(bytes(16) + images[:3].tobytes())
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes(8) + bytes([3, 1, 4]))
    pictures, classes = race_data.fashion()
    np.testing.assert_array_equal(pictures, images[:3])
    assert classes.tolist() == [3, 1, 4]


def test_turns_of_the_other_side_do_not_count(scripts):
    import lora

    turns = [lora.Turn(*times, 1.0) for times in ((0.0, 5.0), (10.0, 15.0), (20.0, 22.0))]
    assert lora.active(turns, 3.0, 21.0) == 2.0 + 5.0 + 1.0
    assert lora.active(turns, 5.0, 10.0) == 0.0


def test_a_lora_is_scored_by_what_it_learned_and_what_it_kept(scripts):
    """One side draws the 8 emoji and moves the others by 0.1; the base draws grey."""
    import lora

    stream = np.random.default_rng(0)
    own, others = (
        lora.Emoji(stream.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8), [str(n)] * n)
        for n in (lora.OWN, lora.KEPT)
    )
    count = lora.OWN * lora.DRAWS
    grey = np.full((count + lora.KEPT, 4, 4, 3), 0.5)
    drawings = np.tile(own.images / 255.0, (lora.DRAWS, 1, 1, 1))
    learned = np.concatenate([drawings, grey[count:] + 0.1])
    base, ours = lora.score({"base": grey, "ours": learned}, own, others)
    assert (ours["own"], ours["found"]) == (0.0, 1.0) and abs(ours["kept"] - 0.1) < 1e-9
    assert base["kept"] == 0.0 and base["found"] <= 0.25
    assert abs(base["own"] - lora.distance(grey[:count], drawings).mean()) < 1e-9


def test_the_lora_benchmark_needs_a_new_folder_and_50_others(scripts, tmp_path, capsys):
    import lora

    for option, told in (
        (f"--out={tmp_path}", "exists; choose a new folder"),
        ("--num_others=49", "--num_others=49 should be at least 50"),
    ):
        with pytest.raises(SystemExit):
            lora.main([option])
        assert told in capsys.readouterr().err
