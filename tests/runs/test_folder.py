"""A run folder: its name, its saved config, and its refusal to be taken over."""

import ml_collections
import numpy as np
import pytest

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.runs import folder as run_folder
from diffusion_jax.runs.identity import made_from
from diffusion_jax.train.checkpoints.saving import open_checkpoints


def config(**changes):
    made = ml_collections.ConfigDict(
        dict(
            seed=0,
            train=dict(num_steps=10, batch_size=8),
            model=dict(name="unet", channel_mult=(1, 2), num_classes=None),
            hooks=dict(scalars=dict(every=5)),
        )
    )
    made.update_from_flattened_dict(changes)
    return made


def test_names_follow_latent_diffusion():
    folder = run_folder.new_run_folder("logs", "configs/mnist.py:tiny", postfix="_a")
    assert folder.parent.name == "logs"
    assert folder.name.endswith("_mnist-tiny_a")
    named = run_folder.new_run_folder("logs", "configs/mnist.py", name="first")
    assert named.name.endswith("_first")


def test_saved_config_is_the_config(workdir):
    original = config()
    original.train.twice = original.train.get_ref("num_steps") * 2
    path = run_folder.save_config(workdir, original)
    loaded = load_config(str(path))
    assert loaded.to_dict() == original.to_dict()
    assert loaded.model.channel_mult == (1, 2) and loaded.train.twice == 20


def test_claim_takes_new_folders_and_recognises_its_own(workdir):
    for changes in ({}, {}, {"train.num_steps": 20}):
        with run_folder.claim(workdir, config(**changes)):
            pass
    assert run_folder.load_saved_config(workdir).train.num_steps == 20


def test_two_runs_cannot_share_a_folder(workdir):
    with run_folder.claim(workdir, config()):
        with pytest.raises(ValueError, match="another process trains in"):
            with run_folder.claim(workdir, config()):
                pass
    with run_folder.claim(workdir, config()):
        pass


def test_jobs_that_start_together_get_their_own_folders(tmp_path):
    names = set()
    for _ in range(3):
        folder = run_folder.new_run_folder(str(tmp_path), "configs/mnist.py")
        folder.mkdir()
        names.add(folder.name)
    assert len(names) == 3


def test_check_refuses_another_config_and_changes_nothing(workdir):
    with run_folder.claim(workdir, config()):
        pass
    other = config(**{"model.channel_mult": (1,)})
    message = r"belongs to another config.*model\.channel_mult: \(1, 2\) -> \(1,\)"
    with pytest.raises(ValueError, match=message):
        run_folder.check(workdir, other)
    assert run_folder.load_saved_config(workdir).model.channel_mult == (1, 2)


def test_check_refuses_a_folder_with_other_files(workdir):
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ValueError, match="exists and is not the folder of a run"):
        run_folder.check(workdir, config())
    assert [path.name for path in workdir.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_cut_short_can_be_repeated(workdir):
    workdir.mkdir()
    (workdir / "config.json.tmp").write_text("half a")
    with run_folder.claim(workdir, config()):
        pass
    assert run_folder.has_run(workdir)


def test_missing_run_is_named(workdir):
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        run_folder.load_saved_config(workdir)
    with pytest.raises(FileNotFoundError, match="config file .*x.py does not exist"):
        load_config(f"{workdir}/x.py")


@pytest.mark.parametrize("text", ["", '{"config": {"tr', "[]", '{"changes": []}'])
def test_a_checkpoint_tells_the_config_when_its_file_is_damaged(workdir, caplog, text):
    original = config()
    original.train.twice = original.train.get_ref("num_steps") * 2
    made = made_from(original, changes=[{"step": 1, "path": "seed", "old": 1, "new": 0}])
    with run_folder.claim(workdir, original):
        checkpoints = open_checkpoints(workdir / "checkpoints")
        checkpoints.save(3, {"a": np.zeros(2)}, made)
        checkpoints.close()
    (workdir / "config.json").write_text(text)
    record = run_folder.load_record(workdir)
    assert record.config.to_dict() == original.to_dict() and record.changes[0]["path"] == "seed"
    record.config.train.num_steps = 30
    assert record.config.train.twice == 60
    assert "config.json" in caplog.text and "a checkpoint tells the config" in caplog.text
    run_folder.check(workdir, original)
    with pytest.raises(ValueError, match="differs in seed: 0 -> 5"):
        run_folder.check(workdir, config(seed=5))


def test_a_damaged_config_without_a_checkpoint_is_replaced_by_the_one_that_is_named(workdir):
    with run_folder.claim(workdir, config()):
        pass
    (workdir / "config.json").write_text("")
    message = "config.json is empty, cut or no JSON.* name the config of the run: --config=FILE"
    with pytest.raises(ConfigError, match=message):
        run_folder.load_saved_config(workdir)
    with run_folder.claim(workdir, config(seed=3)):
        pass
    assert run_folder.load_saved_config(workdir).seed == 3


def test_a_python_config_in_a_folder_is_never_executed(workdir):
    (workdir / "configs").mkdir(parents=True)
    (workdir / "configs" / "config.py").write_text("raise SystemExit('executed')")
    message = "config.json does not exist; configs/config.py is a program, .*--config=.*config.py"
    with pytest.raises(FileNotFoundError, match=message):
        run_folder.load_saved_config(workdir)
    with run_folder.claim(workdir, config()):
        pass
    assert run_folder.load_saved_config(workdir).seed == 0
    assert load_config(f"{workdir}/config.json").seed == 0


def test_overrides_of_a_run_reach_what_was_not_trained_alone(workdir):
    run_folder.save_config(workdir, config())
    for overrides in (["--config.sampler.name=euler"], {"sampler.name": "euler"}):
        assert run_folder.load_run_config(workdir, overrides).sampler.name == "euler"
    with pytest.raises(ValueError, match="differs in seed: 0 -> 3: only config.sampler"):
        run_folder.load_run_config(workdir, {"seed": 3})
    with pytest.raises(ConfigError, match="--config.modle is not a section; did you mean 'model'"):
        run_folder.load_run_config(workdir, {"modle.name": "x"})
    assert "sampler" not in run_folder.load_saved_config(workdir)


def test_latest_is_a_link_to_the_newest_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run_folder.point_latest(tmp_path / name)
        assert (tmp_path / "latest").readlink().name == name
    assert run_folder.without_link(tmp_path / "latest") == tmp_path / "b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest"]


def test_what_is_called_latest_and_is_no_link_stays(tmp_path):
    for name in ("latest", "a"):
        (tmp_path / name).mkdir()
    run_folder.point_latest(tmp_path / "a")
    assert not (tmp_path / "latest").is_symlink()
    assert run_folder.without_link(tmp_path / "a") == tmp_path / "a"
