"""CLIP's tokenizer: against known ids and against the original, where its package is installed."""

import gzip
import importlib.util
import pickle
import sys

import numpy as np
import pytest

from diffusion_jax.data import tokenizer as tokenizer_module
from diffusion_jax.data.tokenizer import VOCABULARY, _clean, clip_tokenizer, find_vocabulary

# Texts that the original's ftfy leaves as they are.
TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "A PHOTO of a Cat",
    "  two   spaces\tand\n\na line  ",
    "it's we're I'll he'd they've I'm don't 'tis rock'n'roll",
    "'s 't ''s !'s 'sx",
    "hello,world!! (really?) [yes] {no} <b> a-b a_b a/b #tag @you 50% $3.99 1,000,000",
    "2026 3d 4k 8K 1.5x 007",
    "½ ² Ⅷ ①",
    "café naïve Ångström straße ÇA İstanbul ŒUVRE",
    "Οδυσσέα Привет мир שלום مرحبا नमस्ते ไทย",
    "猫の写真 貓 고양이 사진",
    "fox 🦊, flag of Kenya 🇰🇪, 👋🏽 👨‍👩‍👧‍👦 ❤️ ☆★ ♥",
    "— – … • © ® ™ € £ ¥ ° ± × ÷",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "zzxqjv qwrtpsdf aaaaaaaaaaaaaaaaaaaaaaaaaa",
    "a detailed oil painting of a red fox, trending on artstation, 8k, by greg rutkowski",
    "<|startoftext|>a<|endoftext|>b",
    "| < > <| |> <|startof",
    "word " * 100,
    "long" * 2500,
]


@pytest.fixture(scope="module")
def vocabulary():
    if all(importlib.util.find_spec(name) is None for name in ("open_clip", "clip")):
        pytest.skip("needs openai-clip or open-clip-torch for CLIP's vocabulary")
    return find_vocabulary()


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return clip_tokenizer()


@pytest.fixture(scope="module")
def original(vocabulary):
    """The original SimpleTokenizer, without the package around it, which would import torch."""
    path = vocabulary.parent / "simple_tokenizer.py"
    if not path.is_file():
        pytest.skip("needs openai-clip for the original tokenizer")
    spec = importlib.util.spec_from_file_location("simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_known_ids(tokenizer):
    ids = tokenizer(["a photo of a cat", "A person riding a motorcycle"])
    assert ids.dtype == np.int32 and ids.shape == (2, 77)
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + 70 * [49407]
    assert ids[1, :7].tolist() == [49406, 320, 2533, 6765, 320, 10297, 49407]
    assert tokenizer([]).shape == (0, 77)


def test_same_as_the_original(tokenizer, original):
    assert tokenizer.num_tokens(TEXTS).max() > 2000
    wide = tokenizer._replace(max_length=6000)(TEXTS)
    for text, row, count in zip(TEXTS, wide, tokenizer.num_tokens(TEXTS), strict=True):
        assert row[1 : count - 1].tolist() == original.encode(text), text[:40]


def test_entities_of_html_are_resolved_twice(tokenizer, original):
    texts = ["salt &amp; pepper", "&amp;lt;3 &quot;hi&quot; &#39;s", "AT&T &unknown; &"]
    assert (
        tokenizer(texts).tolist() == tokenizer(["salt & pepper", '<3 "hi" \'s', texts[2]]).tolist()
    )
    for text, row, count in zip(texts, tokenizer(texts), tokenizer.num_tokens(texts), strict=True):
        assert row[1 : count - 1].tolist() == original.encode(text), text


def test_composed_and_decomposed_letters_are_the_same(tokenizer):
    one, two = tokenizer(["caf\u00e9", "cafe\u0301"])
    assert one.tolist() == two.tolist()
    assert one.tolist() != tokenizer(["cafe"])[0].tolist()


def test_padding(vocabulary):
    rows = {pad: clip_tokenizer(max_length=6, pad=pad)(["cat", ""]) for pad in ("eos", "zero")}
    assert rows["eos"].tolist() == [[49406, 2368] + 4 * [49407], [49406] + 5 * [49407]]
    assert rows["zero"].tolist() == [[49406, 2368, 49407, 0, 0, 0], [49406, 49407, 0, 0, 0, 0]]


def test_a_long_text_is_cut_and_still_ends(tokenizer):
    texts = ["cat " * 75, "cat " * 76, "word, " * 2000]
    assert tokenizer.num_tokens(texts).tolist() == [77, 78, 4002]
    ids = tokenizer(texts)
    assert (ids[:, 0] == 49406).all() and (ids[:, -1] == 49407).all()
    assert (ids[:, :-1] != 49407).all()
    assert ids[0].tolist() == ids[1].tolist()


def test_texts_that_are_cut_are_counted_and_told_once(vocabulary, monkeypatch, caplog):
    monkeypatch.setattr(tokenizer_module, "_warned", set())
    short = clip_tokenizer(str(vocabulary), max_length=5)
    for _ in range(2):
        short(["a red fox", "a red fox jumps", "one two three four"])
        short(["fox"])
    (line,) = caplog.messages
    assert line.startswith("2 of 3 texts have more than 3 tokens and lose their end")


def test_other_files_of_the_vocabulary(vocabulary, tokenizer, tmp_path):
    lines = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")
    merges = tmp_path / "merges.txt"
    merges.write_text("\n".join(["#version: 0.2", *lines[1:48895], ""]), encoding="utf-8")
    saved = tmp_path / "tokenizer.json"
    tokenizer.tokenizer.save(str(saved))
    expected = tokenizer(TEXTS).tolist()
    for path in (merges, saved, vocabulary):
        assert clip_tokenizer(str(path))(TEXTS).tolist() == expected, path


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy(TEXTS).tolist() == tokenizer(TEXTS).tolist()


def test_the_vocabulary_is_found_without_an_import(tmp_path, monkeypatch):
    for package in ("first_pkg", "second_pkg", "third_pkg"):
        folder = tmp_path / package / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('needs torch')")
        if package != "first_pkg":
            (folder / VOCABULARY).write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find_vocabulary(("no_such_pkg", "first_pkg", "third_pkg", "second_pkg"))
    assert found == tmp_path / "third_pkg" / "data" / VOCABULARY
    assert not {"first_pkg", "third_pkg"} & set(sys.modules)


def test_no_vocabulary_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install openai-clip .* or name a file"):
        find_vocabulary(("no_such_pkg",))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent.txt.gz", None, "absent.txt.gz' is no file"),
        ("v.txt.gz", b"not gzip", "cannot be read as a vocabulary: Not a gzipped file"),
        (
            "v.txt.gz",
            gzip.compress(b"header\na b\n", mtime=0)[:-6],
            "cannot be read as a vocabulary",
        ),
        ("v.txt", b"header\na b\nc d\n", "2 of its lines 2 to 48895 are pairs"),
        ("v.txt", b"\xff\xfe", "cannot be read as a vocabulary"),
        ("v.txt", b"header\n" + b"ab cd\n" * 48_894, "is not the vocabulary of CLIP"),
        ("v.json", b"{}", "v.json is not a tokenizer.json"),
        ("v.json", None, "no file"),
    ],
)
def test_bad_files(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        clip_tokenizer(str(path))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    path = tmp_path / "tokenizer.json"
    Tokenizer(BPE(vocab={"a": 0}, merges=[])).save(str(path))
    with pytest.raises(ValueError, match="is not a vocabulary of CLIP: it lacks <.startoftext.>"):
        clip_tokenizer(str(path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pad": "none"}, "pad = 'none' is unknown; choose eos or zero"),
        ({"max_length": 2}, "max_length = 2 should be at least 3"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        clip_tokenizer(**options)


@pytest.mark.parametrize(
    ("texts", "error", "sentence"),
    [
        ("a cat", TypeError, "texts is the string 'a cat'; give a list"),
        (["\ud800"], ValueError, "text 0 is not valid Unicode"),
    ],
)
def test_bad_texts(tokenizer, texts, error, sentence):
    with pytest.raises(error, match=sentence):
        tokenizer(texts)


def test_bytes_are_no_text():
    with pytest.raises(TypeError, match="text 1 is b'b'; it should be a string"):
        _clean(1, b"b")


def test_documented_differences_from_the_original(tokenizer, original):
    """Where ftfy or Python's lower() change a text, the original sees another one."""
    for text, as_the_original_sees_it in {
        "it\u2019s": "it's",
        "ﬁne": "fine",
        "ＦＵＬＬ": "full",
        "ΑΣ": "ας",
        "caf\u00c3\u00a9": "café",
    }.items():
        ours, theirs = tokenizer([text, as_the_original_sees_it])
        assert original.encode(text) == theirs[1 : theirs.argmax()].tolist(), text
        assert ours.tolist() != theirs.tolist(), text


def test_a_text_continues_in_windows_of_its_own_start_and_end(tokenizer):
    text = "word " * 100
    ids = tokenizer._replace(windows=3)([text, "a fox"])
    assert ids.shape == (2, 3, 77) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0, 0], tokenizer([text])[0])
    np.testing.assert_array_equal(ids[0, 1], tokenizer(["word " * 25])[0])
    np.testing.assert_array_equal(ids[0, 2], tokenizer([""])[0])
    np.testing.assert_array_equal(ids[1], tokenizer(["a fox", "", ""]))
    assert [tokenizer.num_windows([text]) for text in ("", "word " * 75, "word " * 76)] == [1, 1, 2]


def test_weights_stand_beside_the_tokens_that_they_are_of(tokenizer):
    weighted = tokenizer._replace(windows=2, weighted=True)
    ids = weighted(["word " * 74 + "(red fox:1.5) [dog]", "plain"])
    assert ids.shape == (2, 2, 77, 2) and ids.dtype == np.float32
    np.testing.assert_array_equal(
        ids[0, :, :, 0], tokenizer._replace(windows=2)(["word " * 74 + "red fox dog"])[0]
    )
    np.testing.assert_allclose(ids[0, 0, 73:, 1], [1, 1, 1.5, 1], rtol=1e-6)
    np.testing.assert_allclose(ids[0, 1, :5, 1], [1, 1.5, 1 / 1.1, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(ids[1, ..., 1], np.ones((2, 77)))
    np.testing.assert_array_equal(weighted.plain()(TEXTS[:5]), tokenizer(TEXTS[:5]))
    assert weighted.num_tokens(["(red:1.2)"]) == [3] and tokenizer.num_tokens(["(red:1.2)"]) > 3
