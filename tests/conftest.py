"""Set-up of every test session: shape checks, eight CPU devices, JAX's strictest checks, one cache.

Nothing of diffusion_jax may be imported here before jaxtyping's hook, which checks the shapes in
every signature: it only reaches modules that are imported after it. The hook is installed here and
not by jaxtyping's own option, which the worker processes of pytest-xdist never see.
"""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Read when the CPU backend starts, and inherited by the processes that tests start. The time-outs
# are for a loaded machine: eight devices on few cores may wait long for each other, and XLA aborts
# after 40 s by default. Tests mostly compile programs that run once: at LLVM's level 0 the training
# step of mnist:tiny takes 4.0 s of CPU time to compile instead of 5.9 at level 1 (and more at the
# default), computes the same losses, and takes 75 ms instead of 48.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
# Fused loops go to LLVM without a detour through MLIR, where the compiler can still do that: half
# of the time of compilation. Newer ones refuse to start with the flag.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    XLA_FLAGS += ("--xla_cpu_use_fusion_emitters=false",)
given = os.environ.get("XLA_FLAGS", "").split()
given_names = {flag.split("=")[0] for flag in given}
added = [flag for flag in XLA_FLAGS if flag.split("=")[0] not in given_names]
os.environ["XLA_FLAGS"] = " ".join(given + added)
os.environ["JAX_PLATFORMS"] = "cpu"
# One cache of compiled programs for all processes of all sessions: an entry is found again by the
# program, the flags and the version of XLA, and is the very machine code that was compiled before.
# An entry that another process is still writing does not unpack; JAX then compiles as if there were
# none. `make clean` removes it.
CACHE = Path(__file__).parents[1] / ".pytest_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# PYTHONDONTWRITEBYTECODE would make every process of the session compile all Python code that it
# imports, JAX included: 9 s of CPU time instead of 3. The bytecode is kept beside that cache.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(CACHE / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    del os.environ["PYTHONDONTWRITEBYTECODE"]

import jax  # noqa: E402
import pytest  # noqa: E402
import support.shape_checks  # noqa: E402
from absl import flags  # noqa: E402

# Hooks.
from support.scheduling import (  # noqa: E402, F401
    pytest_collection_modifyitems,
    pytest_xdist_make_scheduler,
)
from support.tally import pytest_terminal_summary  # noqa: E402, F401

support.shape_checks.install()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# grain reads its absl flags, which only an absl app would have parsed.
flags.FLAGS.mark_as_parsed()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fail early if something started JAX before the settings above could count."""
    if session.config.getoption("numprocesses", None):
        return  # the workers look for themselves
    if len(jax.devices()) != 8:
        raise pytest.UsageError(
            f"Tests need 8 CPU devices and found {jax.devices()}: "
            "XLA_FLAGS holds another count, or something started JAX before tests/conftest.py."
        )


@pytest.fixture(scope="session", autouse=True)
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of prepared data sets, for all processes of this session; none is in the home."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def shared_experiments() -> Iterator[None]:
    """One Experiment for all commands of a module that read the same config."""
    from support.commands import shared_experiments

    with shared_experiments():
        yield


@pytest.fixture(scope="module", autouse=True)
def young_heap() -> Iterator[None]:
    """Keep the garbage collector from going again and again through what earlier modules left.

    What JAX has traced stays in its caches, millions of objects: a tenth of the time went there.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def untraced() -> Iterator[None]:
    """Trace everything anew: for a test that replaces what a trace of another test holds."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """The path of a run folder that does not exist yet."""
    return tmp_path / "run"
