"""Summaries of features and their files: whole, damaged, of another network, of EDM and ADM."""

import numpy as np
import pytest

from diffusion_jax.metrics.summaries import load_summary, read_npz, save_npz, save_summary, summary

ROWS = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)


@pytest.fixture
def found():
    stream = summary("net", "1:abc", limit=5)
    return stream.result(stream.update(stream.init(), ROWS, np.arange(12)))


@pytest.fixture
def path(found, tmp_path):
    path = tmp_path / "new" / "train.npz"
    save_summary(path, found, "data 1")
    return path


def test_a_summary_holds_moments_and_some_rows(found):
    assert found.moments.count == 12 and len(found.kept.rows) == 5
    np.testing.assert_allclose(found.moments.mean, ROWS.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_array_equal(found.kept.rows, ROWS[found.kept.ids])


def test_it_comes_back_bit_for_bit(found, path):
    again = load_summary(path, "net", "1:abc", "data 1")
    assert (again.features, again.key, again.moments.count) == ("net", "1:abc", 12)
    pairs = zip(found.moments[1:] + found.kept, again.moments[1:] + again.kept, strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
    assert [file.name for file in path.parent.iterdir()] == ["train.npz"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("other", "1:abc"), "holds statistics of net; make them with other"),
        (("net", "1:abd"), "holds statistics of other weights of net"),
        (("net", "1:abc", "data 2"), "holds statistics of other images; delete it"),
    ],
)
def test_statistics_of_something_else_are_refused(path, asked, message):
    with pytest.raises(ValueError, match=message):
        load_summary(path, *asked)


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9])
def test_damage_is_found_wherever_it_is(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.npz is damaged"):
        load_summary(path, "net", "1:abc")


def test_changed_numbers_and_half_files_are_damage(path):
    arrays = read_npz(path)
    arrays["mu"] = arrays["mu"] + 1e-12
    save_npz(path.with_name("changed.npz"), arrays)
    path.with_name("half.npz").write_bytes(path.read_bytes()[:500])
    for name in ("changed", "half"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is damaged"):
            load_summary(path.with_name(f"{name}.npz"), "net", "1:abc")
    with pytest.raises(FileNotFoundError, match="there are no statistics at"):
        load_summary(path.with_name("none.npz"), "net", "1:abc")


@pytest.mark.parametrize("more", [{}, {"mu_s": np.zeros(3), "arr_0": np.zeros((2, 4, 4, 3))}])
def test_files_of_edm_and_adm_are_moments_alone(tmp_path, more):
    np.savez(tmp_path / "edm.npz", mu=np.ones(3, np.float32), sigma=np.eye(3), **more)
    found = load_summary(tmp_path / "edm.npz", "inception", "1:abc")
    assert found.kept is None and found.key is None
    assert found.moments.mean.dtype == np.float64
    np.testing.assert_array_equal(found.moments.covariance, np.eye(3))


def test_other_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    np.savez(tmp_path / "b.npz", mu=np.ones(3), sigma=np.eye(4))
    for name, message in (
        ("a", "holds x; statistics have mu and sigma"),
        ("b", r"mu of shape \(3"),
    ):
        with pytest.raises(ValueError, match=message):
            load_summary(tmp_path / f"{name}.npz", "inception", "1:abc")
