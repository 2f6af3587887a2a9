"""Set-up of every test session: eight CPU devices, and JAX's strictest checks.

Nothing of diffusion_jax may be imported here at module level: jaxtyping's hook, which checks the
shapes in every signature, only reaches modules that are imported after it. Compiled programs are
cached between runs only if JAX_COMPILATION_CACHE_DIR names a folder.
"""

import os
from pathlib import Path

# Read when the CPU backend starts, and inherited by the processes that tests start. The time-outs
# are for a loaded machine: eight devices on few cores may wait long for each other, and XLA aborts
# after 40 s by default. LLVM's level 1 compiles a small convolutional network with attention in two
# thirds of the CPU time (16.0 -> 10.4 s), runs it as fast, and moves its loss by 1e-7 of its value.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=1",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
given = os.environ.get("XLA_FLAGS", "").split()
given_names = {flag.split("=")[0] for flag in given}
os.environ["XLA_FLAGS"] = " ".join(
    given + [flag for flag in XLA_FLAGS if flag.split("=")[0] not in given_names]
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# grain reads its absl flags, which only an absl app would have parsed.
flags.FLAGS.mark_as_parsed()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fail early if something started JAX before the settings above could count."""
    if len(jax.devices()) != 8:
        raise pytest.UsageError(
            f"Tests need 8 CPU devices and found {jax.devices()}: "
            "XLA_FLAGS holds another count, or something started JAX before tests/conftest.py."
        )


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """The path of a run folder that does not exist yet."""
    return tmp_path / "run"
