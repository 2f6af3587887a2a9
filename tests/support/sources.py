"""What tests read of a source of records."""

from diffusion_jax.data.records import captions_of, find_features


def captions(source, limit=None, *, caption_key=None):
    """The first caption of the first `limit` records, or of all, in the order of the source."""
    key = find_features(source, caption_key=caption_key).caption
    if key is None:
        raise ValueError("the data set has no captions")
    return [captions_of(source[i][key])[0] for i in range(len(source))[:limit]]
