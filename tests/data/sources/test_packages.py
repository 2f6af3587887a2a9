"""Optional packages are found without being imported, and asked for by the name to install."""

import sys

import pytest

from diffusion_jax.data.sources.packages import require_packages


def test_a_package_is_found_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "made_up_pictures").mkdir()
    (tmp_path / "made_up_pictures" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = require_packages("pictures", {"made_up_pictures": "made-up"})
    assert found == [tmp_path / "made_up_pictures"] and "made_up_pictures" not in sys.modules


def test_all_missing_packages_are_named_at_once():
    names = {"json": "json", "no_such_one": "no-such-one", "no_such_two": "two[extra]"}
    with pytest.raises(ModuleNotFoundError) as error:
        require_packages("emoji", names)
    assert str(error.value) == (
        "preparing the data set 'emoji' needs no-such-one, two[extra]: "
        "pip install no-such-one two[extra]"
    )
