"""Which process runs which tests: files stay whole, for what they share, and the longest go first.

A file whose tests share a trained run, or what JAX has traced and compiled, costs twice when two
processes have parts of it. `make test` asks for it with --dist=loadscope.
"""

from typing import Any

import pytest

# In the order of the time they take, in the slow group or in the default tests; all others follow.
LONGEST = (
    "tests/test_end_to_end.py",
    "tests/test_latent_end_to_end.py",
    "tests/faults/test_training_faults.py",
    "tests/test_configs.py",
    "tests/test_pipeline.py",
    "tests/models/unet/test_unet.py",
    "tests/experiment/test_experiment.py",
    "tests/models/first_stage/test_video_decoder.py",
    "tests/models/layers/test_transformer.py",
    "tests/experiment/first_stage/test_frozen.py",
    "tests/experiment/first_stage/test_autoencoding.py",
    "tests/runs/test_training.py",
    "tests/runs/test_latent_cache.py",
)
# They ask for the shapes of the same released networks, which take seconds to trace.
TOGETHER = {
    "tests/convert/weights/test_names.py": "tests/models/unet/test_unet.py",
    "tests/convert/weights/test_identify.py": "tests/models/unet/test_unet.py",
}


def file_of(nodeid: str) -> str:
    """Return the file whose process runs a test."""
    file = nodeid.partition("::")[0]
    return TOGETHER[file] if file in TOGETHER else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the longest files to the front; every process has to find the same order."""
    rank = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(file_of(item.nodeid), len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to the processes, in the order of the collection."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = file_of  # type: ignore[method-assign]
    return scheduler
