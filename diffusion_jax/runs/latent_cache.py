"""How a config's data and frozen networks make a latent cache, and how training reads it."""

import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.data import transforms
from diffusion_jax.data.batches import Batches, prefetched
from diffusion_jax.data.images import Images, open_images
from diffusion_jax.data.latent_cache import LatentCache, open_cache
from diffusion_jax.data.latent_shards import (
    NULL_FILE,
    Entry,
    Shards,
    claim_folder,
    missing_shards,
    verify_shards,
    write_null,
    write_shard,
)
from diffusion_jax.data.progress import log_progress
from diffusion_jax.data.records import Record, Records
from diffusion_jax.devices.mesh import batch_sharding, batch_shards, make_mesh, replicated
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.network.frames import FRAME
from diffusion_jax.models.conditioning.conditioner import (
    Embedder,
    cached_outputs,
    name_outputs,
    outputs_of,
)
from diffusion_jax.models.conditioning.windows import null_tokens
from diffusion_jax.runs.latent_key import cache_options, cached_embedders, describe_cache
from diffusion_jax.runs.weights import has_frozen, make_frozen, run_frozen
from diffusion_jax.types import PyTree

_log = logging.getLogger(__name__)


class CachedTraining(NamedTuple):
    """Training from a cache: its batches, and what else a run needs for them.

    frozen: the networks that made it, with the constants. null: what stands for dropped texts, to
    be added to frozen. with_images: see image_reader.
    """

    batches: Batches
    frozen: PyTree
    null: dict[str, PyTree]
    with_images: Callable[[Mapping[str, Any], int], dict[str, Any]]


def encode_split(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | None = None
) -> LatentCache:
    """Make or finish the latent cache of a config's training split, see make_latent_cache.

    workdir: the folder of a run whose saved frozen networks are used, if it has any.
    """
    experiment = make_experiment(config)
    cache_options(experiment)  # a config without a cache is not worth loading weights
    source = experiment.data.source("train")
    return make_latent_cache(experiment, load_frozen(experiment, workdir), source)


def train_from_cache(
    experiment: Experiment, source: Records, workdir: pathlib.Path | None = None
) -> CachedTraining:
    """Make or finish the cache of the training split and open it for training.

    workdir: the folder of a run whose saved frozen networks are used, if it has any.
    Raises ValueError as make_latent_cache does.
    """
    frozen = load_frozen(experiment, workdir)
    cache = make_latent_cache(experiment, frozen, source)
    null = jax.device_put(dict(cache.null), replicated(experiment.mesh))
    null = {"null_outputs": null} if null else {}
    return CachedTraining(
        experiment.cached_batches(cache, source), frozen, null, image_reader(experiment, source)
    )


def load_frozen(experiment: Experiment, workdir: pathlib.Path | None) -> PyTree:
    """Read the frozen networks that a run saved in a folder, or make them from their files."""
    if workdir is not None and has_frozen(workdir):
        return run_frozen(experiment, workdir)
    return make_frozen(experiment)


def make_latent_cache(
    experiment: Experiment,
    frozen: PyTree,
    source: Records,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> LatentCache:
    """Encode what the cache of a config still lacks, compare all its checksums, and open it.

    Process p of n writes and checks the shards p, p + n, ...; give both numbers to play one of
    several, then a cache that waits for the others is an error. The log says how far it is.

    Raises ValueError when the folder has a cache made from other weights, data or options, naming
    them; when a shard is damaged; and when too many images are unreadable.
    """
    options = cache_options(experiment)
    folder = pathlib.Path(os.path.expanduser(options.folder))
    digest = claim_folder(folder, describe_cache(experiment, frozen, source))
    shards = Shards(folder, digest, len(source), options.shard_size)
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    missing = missing_shards(shards)
    if missing or not (folder / NULL_FILE).exists():
        _log.info(
            "encoding %d records into %s: %d of %d shards are there already",
            len(source), folder, shards.num_shards - len(missing), shards.num_shards,
        )  # fmt: skip
        encoder = _build_encoder(experiment, frozen)
        write_null(shards, encoder.null)
        own = [shard for shard in missing if shard % count == index]
        _write_shards(experiment, source, shards, own, encoder)
    verify_shards(shards, range(index, shards.num_shards, count))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("latent cache")
    return open_cache(shards)


def image_reader(
    experiment: Experiment, source: Records
) -> Callable[[Mapping[str, Any], int], dict[str, Any]]:
    """Make with_images(batch, n) -> the first n rows of a batch, with images.

    If the batch came from a cache, the images are read now and replace what the cache gave.
    """
    images = _open(experiment, source, buckets=False)  # the batch tells the shape

    def with_images(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
        rows = {name: column[:count] for name, column in batch.items()}
        if "image" in rows:
            return rows
        height, width = rows["target_size"][0].tolist()
        read = [images.read_or_next(int(i), (height, width)).image for i in rows["index"]]
        pixels = np.stack(cast("list[np.ndarray]", read))
        if "mirrored" in rows:
            pixels[rows["mirrored"]] = pixels[rows["mirrored"]][..., ::-1, :]
        embedders = experiment.network.embedders
        kept = [key for name in embedders for key in cached_outputs(rows, name)]
        rows = {k: v for k, v in rows.items() if k not in ("moments", "mirrored", FRAME, *kept)}
        return {"image": transforms.to_float(pixels), **rows}

    return with_images


class _Encoder(NamedTuple):
    """Frozen networks on the devices of this process. size: rows that go through at a time.

    moments: float32 images [n h w c] -> [n h' w' 2c'], clips [n t h w c] -> [n t h' w' 2c'].
    texts: n captions -> name in a batch -> [n ...]. null: name in a batch -> what stands for a
    dropped text.
    """

    size: int
    moments: Callable[[np.ndarray], np.ndarray]
    texts: Callable[[Sequence[str]], dict[str, np.ndarray]]
    null: Mapping[str, np.ndarray]


def _build_encoder(experiment: Experiment, frozen: PyTree) -> _Encoder:
    network, embedders = experiment.network, cached_embedders(experiment)
    stage = network.first_stage
    assert stage is not None
    here = jax.process_index()
    mesh = make_mesh(devices=[d for d in experiment.mesh.devices.flat if d.process_index == here])
    size = -(-cache_options(experiment).batch_size // batch_shards(mesh)) * batch_shards(mesh)
    weights = {
        "first_stage": frozen["first_stage"],
        "texts": {name: frozen["conditioner"][name] for name in embedders},
    }
    weights = _on_own_devices(experiment, weights, mesh)
    encode = jax.jit(stage.moments)

    @jax.jit
    def embed(params: PyTree, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
        named = [
            name_outputs(name, outputs_of(embedder, params[name], tokens[name]))
            for name, embedder in embedders.items()
        ]
        return {key: output for outputs in named for key, output in outputs.items()}

    def in_batches(function: Callable[[Any], Any], rows: PyTree) -> Any:
        total, parts = len(jax.tree.leaves(rows)[0]), []
        for start in range(0, total, size):
            part = jax.tree.map(lambda x, start=start: x[start : start + size], rows)
            padded = jax.tree.map(lambda x: _padded(x, size), part)
            parts.append(jax.device_get(function(jax.device_put(padded, batch_sharding(mesh)))))
        return jax.tree.map(lambda *found: np.concatenate(found)[:total], *parts)

    def texts(captions: Sequence[str]) -> dict[str, np.ndarray]:
        tokenizers = {name: network.tokenize[e.input_key][1] for name, e in embedders.items()}
        tokens = {name: tokenize(captions) for name, tokenize in tokenizers.items()}
        return in_batches(functools.partial(embed, weights["texts"]), tokens)

    def null_outputs() -> dict[str, np.ndarray]:
        tokens = {name: _null_input(embedder) for name, embedder in embedders.items()}
        found = in_batches(functools.partial(embed, weights["texts"]), tokens)
        return {
            key: np.zeros_like(output[0]) if embedder.null_value is None else output[0]
            for name, embedder in embedders.items()
            for key, output in cached_outputs(found, name).items()
        }

    def moments(image: np.ndarray) -> np.ndarray:
        frames = image.reshape(-1, *image.shape[-3:])
        found = in_batches(functools.partial(encode, weights["first_stage"]), frames)
        return found.reshape(*image.shape[:-3], *found.shape[1:])

    return _Encoder(
        size,
        moments,
        texts,
        null_outputs() if embedders else {},
    )


def _null_input(embedder: Embedder) -> np.ndarray:
    """Give the tokens of a dropped text [1 ...], zeros where its outputs are zeroed."""
    like = jnp.zeros((1, *embedder.shape), embedder.dtype)
    if embedder.null_value is None:
        return np.asarray(like)
    return np.broadcast_to(np.asarray(null_tokens(embedder.null_value, like)), like.shape)


def _on_own_devices(experiment: Experiment, weights: PyTree, mesh: Any) -> PyTree:
    """Copy weights whole to every device of this process, so that it can encode on its own."""
    if jax.process_count() > 1:
        gather = jax.jit(lambda tree: tree, out_shardings=replicated(experiment.mesh))
        weights = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), gather(weights))
    return jax.device_put(weights, replicated(mesh))


class _Chunk(NamedTuple):
    """Records of one shape in one shard that are encoded together."""

    shard: int
    bucket: int
    numbers: np.ndarray


def _write_shards(
    experiment: Experiment,
    source: Records,
    shards: Shards,
    wanted: Sequence[int],
    encoder: _Encoder,
) -> None:
    options, dtype = experiment.data.batch_options, cache_options(experiment).dtype
    images, network = _open(experiment, source), experiment.network
    frame = network.frame_place if network.reads_frame else None
    buckets = np.zeros(len(source), np.int64)
    for bucket, numbers in enumerate(images.members):
        buckets[numbers] = bucket
    at_once = max(1, encoder.size // (options["num_frames"] or 1))
    chunks = list(_chunks(shards, wanted, buckets, at_once))

    def load(number: int) -> tuple[_Chunk, list[Record]]:
        chunk = chunks[number]
        size = images.shapes[chunk.bucket]
        return chunk, [images.read_or_next(int(i), size) for i in chunk.numbers]

    steps = grain.MapDataset.range(len(chunks)).map(load)
    loaded = log_progress(
        prefetched(steps, options["num_threads"], 0, 2)(0),
        sum(len(chunk.numbers) for chunk in chunks),
        "encoding records",
        size=lambda item: len(item[0].numbers),
    )
    entries: dict[int, Entry] = {}
    for chunk, records in loaded:
        found = _encode(encoder, chunk, records, options["random_flip"], frame)
        entries |= dict(zip(chunk.numbers.tolist(), found, strict=True))
        numbers = shards.records(chunk.shard)
        if len(entries) == len(numbers):
            write_shard(shards, chunk.shard, [entries[n] for n in numbers], images.shapes, dtype)
            entries = {}


def _chunks(
    shards: Shards, wanted: Iterable[int], buckets: np.ndarray, size: int
) -> Iterator[_Chunk]:
    for shard in wanted:
        numbers = np.asarray(shards.records(shard))
        for bucket in np.unique(buckets[numbers]):
            chosen = numbers[buckets[numbers] == bucket]
            for start in range(0, len(chosen), size):
                yield _Chunk(shard, int(bucket), chosen[start : start + size])


def _encode(
    encoder: _Encoder, chunk: _Chunk, records: Sequence[Record], flips: bool, frame: int | None
) -> list[Entry]:
    images: Any = [record.image for record in records]  # all readable: see read_or_next
    image = np.stack(images)
    views = [image, np.ascontiguousarray(image[..., ::-1, :])] if flips else [image]
    found = [encoder.moments(transforms.to_float(view)) for view in views]
    moments = np.stack(found, axis=1)
    shown = None if frame is None else np.stack([view[:, frame] for view in views], axis=1)
    outputs: list[dict[str, np.ndarray]] = [{} for _ in records]
    if encoder.null:
        captions = [_captions(record) for record in records]
        found = encoder.texts([text for texts in captions for text in texts])
        ends = np.cumsum([len(texts) for texts in captions])
        outputs = [
            {name: x[end - len(texts) : end] for name, x in found.items()}
            for texts, end in zip(captions, ends, strict=True)
        ]
    return [
        Entry(
            record._replace(image=None),
            chunk.bucket,
            moments[row],
            outputs[row],
            {} if shown is None else {FRAME: shown[row]},
        )
        for row, record in enumerate(records)
    ]


def _captions(record: Record) -> tuple[str, ...]:
    if record.captions is None:
        raise ValueError(
            "config.latent_cache.text = True needs captions, and the data set has none; name the "
            "feature with config.data.batches.caption_key if it has another name"
        )
    return record.captions


def _open(experiment: Experiment, source: Records, **changes: Any) -> Images:
    """Open the images that online training shows, sorted into its buckets, keeping none."""
    options = experiment.data.image_options._replace(cache=False, **changes)
    return open_images(source, options, at_least=experiment.training.batch_size)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)), mode="edge")
