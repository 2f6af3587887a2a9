"""Cached batches are those of make_batches with latents for pixels; damage is named."""

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.buckets import BucketRule, sort_into_buckets
from diffusion_jax.data.emphasis import read_emphasis
from diffusion_jax.data.images import ImageOptions, open_images
from diffusion_jax.data.latent_cache import cached_batches, open_cache, read_entry
from diffusion_jax.data.latent_shards import (
    Entry,
    Shards,
    claim_folder,
    missing_shards,
    read_null,
    verify_shards,
    write_null,
    write_shard,
)
from diffusion_jax.data.records import Record

COUNT, SHARD = 11, 4
NULL = {"cached/text/0": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)}


def made_up_source():
    """Wide and tall images whose first pixel tells their number, some with two captions."""
    source = []
    for number in range(COUNT):
        image = np.full((16, 8, 3) if number % 3 else (8, 16, 3), number, np.uint8)
        image[:, : image.shape[1] // 2] += 100
        captions = [f"caption {number}.{i}" for i in range(1 + number % 2)]
        source.append({"image": image, "label": number % 4, "captions": captions})
    return source


def moments_of(pixels):
    """As an encoder would: a function of the pixels [h w c] alone, [h/4 w/4 2]."""
    left_and_right = pixels[2::4, 1::4, 0]
    return np.stack([left_and_right, -left_and_right], axis=-1).astype(np.float32)


def text_of(caption):
    return np.float32([[float(word) for word in caption.split()[1].split(".")]])


def make_entries(source, numbers, buckets):
    for number in numbers:
        fields = source[number]
        pixels = fields["image"] / 127.5 - 1
        yield Entry(
            Record(
                None, pixels.shape[:2], pixels.shape[:2], fields["label"],
                tuple(fields["captions"]), number,
            ),
            int(buckets[number]),
            np.stack([moments_of(pixels), moments_of(pixels[:, ::-1])]),
            {"cached/text/0": np.stack([text_of(text) for text in fields["captions"]])},
        )  # fmt: skip


def make_cache(folder, dtype="float32", parts=(("size", 16),), wanted=None):
    source = made_up_source()
    shards = Shards(folder, claim_folder(folder, dict(parts)), COUNT, SHARD)
    rule = BucketRule(divisor=8, max_aspect=2.0, pad=0)
    shapes, members = sort_into_buckets(source, "image", (8, 16), rule, at_least=3)
    buckets = np.empty(COUNT, int)
    for bucket, numbers in enumerate(members):
        buckets[numbers] = bucket
    for shard in range(shards.num_shards) if wanted is None else wanted:
        entries = make_entries(source, shards.records(shard), buckets)
        write_shard(shards, shard, entries, shapes, dtype)
    write_null(shards, NULL)
    return shards


def test_clips_are_those_of_make_batches(tmp_path):
    rng = np.random.default_rng(0)
    source = [
        {"video": rng.integers(0, 256, (3 if n else 1, 8, 8, 3), dtype=np.uint8), "fps": 6.0}
        for n in range(COUNT)
    ]
    for number, record in enumerate(source):
        record["azimuths"] = number + np.arange(len(record["video"])) / 3
    options = {"num_frames": 2, "frame_stride": 2, "frame_columns": ("azimuths",)}
    images = open_images(source, ImageOptions(8, **options))
    shards = Shards(tmp_path, claim_folder(tmp_path, {}), COUNT, SHARD)
    for shard in range(shards.num_shards):
        records = [images.read(number, (8, 8)) for number in shards.records(shard)]
        entries = [
            Entry(
                record._replace(image=None), 0,
                np.stack([[moments_of(frame / 127.5 - 1) for frame in view]
                          for view in (record.image, record.image[..., ::-1, :])]), {},
                {"first": np.stack([record.image[0], record.image[0, :, ::-1]])},
            )
            for record in records
        ]  # fmt: skip
        write_shard(shards, shard, entries, images.shapes, "float32")
    write_null(shards, {})
    place: Any = dict(batch_size=4, seed=5, random_flip=True, num_threads=0)
    online = make_batches(source, image_size=8, **options, **place)
    cached = cached_batches(open_cache(shards), **place)
    stills = 0
    for _, theirs, ours in zip(range(9), online.iterate(0), cached.iterate(0), strict=False):
        assert set(theirs) - {"image"} == set(ours) - {"moments", "mirrored", "first"}
        for name in theirs.keys() & ours.keys():
            np.testing.assert_array_equal(theirs[name], ours[name])
        np.testing.assert_array_equal(theirs["image"][:, 0], ours["first"])
        wanted = [[moments_of(frame) for frame in clip] for clip in theirs["image"]]
        np.testing.assert_allclose(ours["moments"], wanted, atol=1e-6)
        stills += ours["image_only_indicator"][:, 0].sum()
    assert ours["azimuths"].shape == (4, 2, 1)
    assert stills in (3, 4) and ours["moments"].shape == (4, 2, 2, 2, 2)


@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 3)])
@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_those_of_make_batches(tmp_path, flip, index, count):
    place: Any = dict(batch_size=3, seed=5, process_index=index, process_count=count)
    place["num_threads"] = 0
    online = make_batches(
        made_up_source(), image_size=(8, 16), buckets=True, bucket_divisor=8, random_flip=flip,
        **place,
    )  # fmt: skip
    cache = open_cache(make_cache(tmp_path))
    cached = cached_batches(cache, random_flip=flip, **place)
    assert cached.shapes == online.shapes and len(online.shapes) == 2
    assert (cached.num_examples, cached.steps_per_epoch) == (COUNT, online.steps_per_epoch)
    mirrored = 0
    for _, theirs, ours in zip(range(20), online.iterate(2), cached.iterate(2), strict=False):
        assert set(theirs) - {"image"} == set(ours) - {"moments", "mirrored", "cached/text/0"}
        for name in theirs.keys() & ours.keys():
            np.testing.assert_array_equal(theirs[name], ours[name])
            assert theirs[name].dtype == ours[name].dtype
        wanted = np.stack([moments_of(pixels) for pixels in theirs["image"]])
        np.testing.assert_allclose(ours["moments"], wanted, atol=1e-6)
        texts = np.stack([text_of(text) for text in theirs["caption"]])
        np.testing.assert_array_equal(ours["cached/text/0"], texts)
        mirrored += ours["mirrored"].sum() if flip else 0
    assert flip == (0 < mirrored < 20 * 3 // count)
    assert ours["moments"].dtype == np.float32
    finished = cached_batches(cache, finish=lambda batch: {**batch, "more": 1}, **place)
    assert next(finished.iterate(0))["more"] == 1


def test_repeats_and_weights_are_those_of_make_batches(tmp_path):
    source = [r | {"times": 1 + n % 3, "counts": n / 4} for n, r in enumerate(made_up_source())]
    keys = dict(repeats_key="times", weight_key="counts")
    place: Any = dict(batch_size=3, seed=5, num_threads=0)
    options: Any = dict(image_size=(8, 16), buckets=True, bucket_divisor=8)
    online = make_batches(source, **options, **keys, **place)
    emphasis = read_emphasis(source, **keys)
    cached = cached_batches(open_cache(make_cache(tmp_path)), emphasis=emphasis, **place)
    assert cached.steps_per_epoch == online.steps_per_epoch
    for _, theirs, ours in zip(range(20), online.iterate(2), cached.iterate(2), strict=False):
        for name in ("index", "loss_weight", "caption"):
            np.testing.assert_array_equal(theirs[name], ours[name])


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_small_dtypes_round_and_null_outputs_keep_theirs(tmp_path, dtype, error):
    cache = open_cache(make_cache(tmp_path, dtype))
    found, exact = read_entry(cache, 3), list(make_entries(made_up_source(), [3], np.zeros(9)))[0]
    assert str(found.moments.dtype) == str(found.outputs["cached/text/0"].dtype) == dtype
    assert found.record == exact.record
    np.testing.assert_allclose(found.moments.astype(float), exact.moments, rtol=error)
    assert np.abs(found.moments.astype(float) - exact.moments).max() > 0
    assert cache.null["cached/text/0"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(cache.null["cached/text/0"], NULL["cached/text/0"])


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", 1e5, "moments of record 5 reaches 1e[+]05, which float16 cannot hold; choose"),
        ("float32", np.nan, "moments of record 5 is not finite; choose another config.latent"),
    ],
)
def test_values_that_do_not_fit_are_an_error(tmp_path, dtype, value, message):
    shards = make_cache(tmp_path, wanted=[0])
    entries = list(make_entries(made_up_source(), shards.records(1), np.zeros(COUNT)))
    entries[1].moments[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=message):
        write_shard(shards, 1, entries, [(8, 16)], dtype)
    assert missing_shards(shards) == [1, 2]


def test_what_a_kill_leaves_is_made_again_with_the_same_bytes(tmp_path):
    whole, torn = make_cache(tmp_path / "whole"), make_cache(tmp_path / "torn", wanted=[0, 2])
    torn.path(0).with_suffix(".json").unlink()  # killed between shard and index
    (torn.folder / f".{torn.path(1).name}.unfinished").write_bytes(b"half a shard")
    assert missing_shards(torn) == [0, 1]
    with pytest.raises(
        ValueError, match="not complete: 2 of its 3 shards are missing; the command cache"
    ):
        open_cache(torn)
    make_cache(tmp_path / "torn", wanted=[0, 1])
    contents = [
        {path.name: path.read_bytes() for path in shards.folder.iterdir()}
        for shards in (whole, torn)
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2 * 3 + 2


def test_a_shard_that_was_cut_short_is_named(tmp_path):
    shards = make_cache(tmp_path)
    content = shards.path(1).read_bytes()
    shards.path(1).write_bytes(content[: len(content) // 2])
    for attempt in (missing_shards, open_cache, verify_shards):
        with pytest.raises(ValueError, match="00001-of-00003.arrayrecord of the latent.*damaged"):
            attempt(shards)
    shards.path(1).unlink()
    assert missing_shards(shards) == [1]
    with pytest.raises(ValueError, match="00001-of-00003.arrayrecord.*missing"):
        verify_shards(shards)
    shards.path(0).with_suffix(".json").write_text('{"bytes": 1')
    with pytest.raises(ValueError, match="00000-of-00003.json of the latent cache is damaged"):
        missing_shards(shards)


def test_a_flipped_bit_is_found_by_the_checksum_and_when_it_is_read(tmp_path):
    shards = make_cache(tmp_path)
    content = bytearray(shards.path(0).read_bytes())
    place = content.index(b"caption 2.0")
    content[place + 8] ^= 1  # "caption 3.0"
    shards.path(0).write_bytes(content)
    with pytest.raises(ValueError, match="00000-of-00003.*damaged: its bytes are not those"):
        verify_shards(shards)
    cache = open_cache(shards)
    with pytest.raises(ValueError, match="record 2 of the latent cache cannot be read.*00000-of"):
        read_entry(cache, 2)
    assert read_entry(cache, 7).record.index == 7


def test_a_record_that_arrayrecord_let_pass_fails_its_own_checksum(tmp_path):
    cache = open_cache(make_cache(tmp_path))
    packed = bytearray(cache.source[2])
    packed[-1] ^= 1
    with pytest.raises(ValueError, match="record 2 .*its checksum differs"):
        read_entry(cache._replace(source=[b"", b"", bytes(packed)]), 2)


def test_any_bit_of_an_index_a_key_and_the_null_file_counts(tmp_path):
    """Also those in "buckets", which decide what is read for which record."""
    shards = make_cache(tmp_path)
    readers = {
        "00001-of-00003.json": missing_shards,
        "key.json": lambda shards: claim_folder(shards.folder, {"size": 16}),
        "null.bin": read_null,
    }
    for name, read in readers.items():
        whole = (tmp_path / name).read_bytes()
        for place in range(len(whole)):
            for bit in range(8):
                changed = bytearray(whole)
                changed[place] ^= 1 << bit
                (tmp_path / name).write_bytes(changed)
                with pytest.raises(ValueError, match=f"{name[:-4]}.* (damaged|another latent)"):
                    read(shards)
        (tmp_path / name).write_bytes(whole)
        read(shards)


def test_a_shard_in_the_place_of_another_is_refused(tmp_path):
    """Shards 0 and 1 have as many records, and here as many bytes."""
    shards = make_cache(tmp_path)
    shards.path(1).write_bytes(shards.path(0).read_bytes().ljust(shards.path(1).stat().st_size))
    with pytest.raises(ValueError, match="00001-of-00003.*damaged"):
        verify_shards(shards)
    verify_shards(shards, [0, 2])
    for suffix in (".arrayrecord", ".json"):
        content = shards.path(0).with_suffix(suffix).read_bytes()
        shards.path(1).with_suffix(suffix).write_bytes(content)
    for attempt in (missing_shards, open_cache, verify_shards):
        with pytest.raises(ValueError, match="00001-of-.* another latent cache or place"):
            attempt(shards)


def test_a_record_in_the_place_of_another_is_refused(tmp_path):
    cache = open_cache(make_cache(tmp_path))
    exchanged = cache._replace(source=[cache.source[1], cache.source[0]])
    with pytest.raises(
        ValueError, match="record 0 of the latent cache cannot be read.*is record 1"
    ):
        read_entry(exchanged, 0)


def test_the_null_file_of_another_cache_is_refused(tmp_path):
    here, there = (make_cache(tmp_path / name, parts=[("size", name)]) for name in ("a", "b"))
    (there.folder / "null.bin").replace(here.folder / "null.bin")
    with pytest.raises(ValueError, match="a/null.bin belongs to another latent cache"):
        open_cache(here)


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    """As after a power cut: whatever has its name is whole, and names come in order."""
    done, sync, replace = [], os.fsync, Path.replace

    def spy_sync(handle):
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        sync(handle)

    def spy_replace(path, target):
        done.append((path.name, target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    make_cache(tmp_path / "cache")
    renamed = [i for i, (what, _) in enumerate(done) if what != "sync"]
    assert len(done) == 3 * len(renamed)
    for i in renamed:
        assert done[i - 1] == ("sync", done[i][0])
        assert done[i + 1] == ("sync", "cache")
    names = [done[i][1] for i in renamed]
    shard = ["00000-of-00003.arrayrecord", "00000-of-00003.json"]
    assert names[:3] == ["key.json", *shard] and names[-1] == "null.bin"


def test_a_key_that_differs_is_refused_with_what_differs(tmp_path):
    parts = {"size": (8, 16), "crop": "center", "weights": "ab12", "split": "train", "old": 1}
    digest = claim_folder(tmp_path, parts)
    assert claim_folder(tmp_path, dict(parts)) == digest
    assert json.loads((tmp_path / "key.json").read_text())["parts"]["size"] == [8, 16]
    with pytest.raises(ValueError) as error:
        claim_folder(tmp_path, parts | {"size": 32})
    assert str(error.value) == (
        f"the latent cache in {tmp_path} was made with size = [8, 16] (this config has 32): "
        "choose another config.latent_cache.folder or delete it"
    )
    other = {"size": 32, "crop": "stretch", "weights": "cd", "split": "test", "new": 2}
    with pytest.raises(ValueError, match="crop = 'center' .this config has 'stretch'.*3 more"):
        claim_folder(tmp_path, other)
    del parts["old"]
    with pytest.raises(ValueError, match="no new .this config has 2., old = 1 .this config has no"):
        claim_folder(tmp_path, parts | {"new": 2})


def test_shards_of_another_cache_and_strange_folders_are_refused(tmp_path):
    here, there = (make_cache(tmp_path / name, parts=[("size", name)]) for name in ("a", "b"))
    for suffix in (".arrayrecord", ".json"):
        there.path(1).with_suffix(suffix).replace(here.path(1).with_suffix(suffix))
    with pytest.raises(ValueError, match="a/00001-of-00003.arrayrecord belongs to another latent"):
        open_cache(here)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(ValueError, match="photos holds no latent cache .no key.json., but cat.png"):
        claim_folder(tmp_path / "photos", {"size": 16})


def test_bad_arguments_are_those_of_make_batches(tmp_path):
    cache = open_cache(make_cache(tmp_path))
    with pytest.raises(ValueError, match="batch_size = 12 should be at most 11"):
        cached_batches(cache, batch_size=12)
    with pytest.raises(ValueError, match="batch_size = 3 should be a positive multiple of the 2"):
        cached_batches(cache, batch_size=3, process_count=2)
