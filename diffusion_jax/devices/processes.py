"""Several processes that train one model: who they are, who leads, and what only one may do.

`joined` must run before anything asks JAX for its devices.
"""

import atexit
import contextlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from diffusion_jax.devices.peers import Peers

TIMEOUT = 300  # seconds that a process waits for the others to start
_NEVER = 1_000_000  # seconds; peers.py notices that a process is gone, and says so
_NEWS_SECONDS = 30.0  # a little more than the keep-alive of peers.py takes
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


class Place(NamedTuple):
    """The place of this process among all; None is what JAX finds out by itself.

    local_device_ids: the devices of this host that it uses; () is all of them.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    method: str | None = None


@contextlib.contextmanager
def joined(flags: Place, exit_code: Callable[[BaseException], int]) -> Iterator[None]:
    """Join the other processes for a block, if flags or environment tell of any.

    When one of them ends before its block does, the others say so in a sentence and end with
    peers.EXIT_PEER. exit_code: the code that this process ends with after an exception.
    Raises ValueError when flags are missing or wrong, ConnectionError when the others cannot be
    reached.
    """
    place = find_place(flags, os.environ)
    if place is None:
        yield
        return
    # JAX's service would swallow SIGTERM until training begins, when train/signals.py takes over.
    jax.config.update("jax_enable_preemption_service", False)
    # Its client meets its service on this machine, see peers.py: proxies are not in between.
    jax.config.update("jax_check_proxy_envs", False)
    os.environ["no_grpc_proxy"] = "127.0.0.1"
    peers = None
    try:
        place = _completed(place)
        address, count, index = place[:3]
        assert address is not None and count is not None and index is not None
        peers = Peers(address, index, count, TIMEOUT)
        jax.distributed.initialize(
            coordinator_address=peers.address,
            coordinator_bind_address=peers.address,
            num_processes=place.num_processes,
            process_id=place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=TIMEOUT,
            heartbeat_timeout_seconds=_NEVER,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        if peers is not None:
            _leave(peers, error, exit_code)
        raise ConnectionError(
            f"cannot join the other processes ({_describe(place)}): {reason}; "
            "--num_processes=1 trains in this process alone"
        ) from error
    if jax.process_index() != 0:  # what the package says is the same in all
        logging.getLogger("diffusion_jax").setLevel(logging.WARNING)
    try:
        yield
    except BaseException as error:
        _leave(peers, error, exit_code)
        raise
    jax.distributed.shutdown()  # waits for all
    peers.finish()


def _completed(place: Place) -> Place:
    """Ask JAX for what the cluster knows; ValueError when it does not know enough."""
    environ = os.environ
    if place.coordinator_address is None and "JAX_COORDINATOR_ADDRESS" in environ:
        place = place._replace(coordinator_address=environ["JAX_COORDINATOR_ADDRESS"])
    if place.local_device_ids is None and "JAX_LOCAL_DEVICE_IDS" in environ:
        ids = tuple(map(int, environ["JAX_LOCAL_DEVICE_IDS"].split(",")))
        place = place._replace(local_device_ids=ids)
    if place.method != "deactivate" and None in place[:4]:
        found = ClusterEnv.auto_detect_unset_distributed_params(*place, TIMEOUT)
        address, count, index, ids = found
        place = Place(address, count, index, None if ids is None else tuple(ids), place.method)
    if missing := [name for name in Place._fields[:3] if getattr(place, name) is None]:
        raise ValueError(f"JAX does not find {' and '.join(missing)} here")
    return place


def _leave(peers: Peers, error: BaseException, exit_code: Callable[[BaseException], int]) -> None:
    """Tell the others of an error, and skip all at the end that would wait for them."""
    code = exit_code(error)
    atexit.register(_end, code)  # comes before all that JAX registered
    reason = f"{type(error).__name__}: {error}"
    # What another process did wrong comes out of JAX here; the news of its end come soon.
    peers.fail(code, reason, wait=_NEWS_SECONDS if isinstance(error, JaxRuntimeError) else 1.0)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_place(flags: Place, environ: Mapping[str, str]) -> Place | None:
    """Combine flags with what a cluster says; None when this process is alone.

    Flags win. A lone machine costs no look-up: only the environment is read, and a TPU host asks
    its metadata through JAX. Raises ValueError in one sentence for what cannot work.
    """
    if flags.num_processes == 1:
        return None
    found = _slurm(environ) or _open_mpi(flags, environ) or _tpu(environ)
    if found is None and flags == Place():
        found = _kubernetes(environ)
    if found is None and flags == Place():
        return None
    if found is None:
        _check_complete(flags)
        place = flags._replace(method="deactivate")
    else:
        place = _filled(flags, found)
    if None not in (place.num_processes, place.process_id):
        assert place.num_processes is not None and place.process_id is not None
        if not 0 <= place.process_id < place.num_processes:
            raise ValueError(
                f"--process_id={place.process_id} should be between 0 and "
                f"{place.num_processes - 1}: there are {place.num_processes} processes"
            )
    return place


def place_of_flags(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    local_device_ids: str | None,
) -> Place:
    """Check what was said on a command line; ValueError for what is no address, number or list."""
    ids = local_device_ids
    if ids is not None and not re.fullmatch(r"\d+(,\d+)*", ids):
        raise ValueError(f"--local_device_ids={ids} should be numbers with commas, such as 0,1")
    if coordinator_address is not None and not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"--coordinator_address={coordinator_address} should be HOST:PORT")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num_processes={num_processes} should be at least 1")
    numbers = None if ids is None else tuple(int(i) for i in ids.split(","))
    return Place(coordinator_address, num_processes, process_id, numbers)


def _check_complete(place: Place) -> None:
    needed = ("coordinator_address", "num_processes", "process_id")
    missing = [f"--{name}" for name in needed if getattr(place, name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: outside of SLURM, Open MPI and TPU hosts, give "
            "--coordinator_address, --num_processes and --process_id, or none of them"
        )


def _filled(flags: Place, found: Place) -> Place:
    return found._replace(**{n: value for n, value in flags._asdict().items() if value is not None})


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """A task of `srun`; a script of sbatch itself, or a lone task, is no cluster."""
    if any(name not in environ for name in _SLURM) or int(environ["SLURM_NTASKS"]) < 2:
        return None
    # "8(x2),4": the first hosts have 8 tasks each. JAX gives a task the GPU of its number on the
    # host, which is wrong for the only one.
    alone = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    return Place(
        num_processes=int(environ["SLURM_NTASKS"]),
        process_id=int(environ["SLURM_PROCID"]),
        local_device_ids=() if alone else None,
        method="slurm",
    )


def _open_mpi(flags: Place, environ: Mapping[str, str]) -> Place | None:
    """A process of `mpirun`. From version 5 on, it does not say where process 0 is."""
    if "OMPI_COMM_WORLD_SIZE" not in environ or int(environ["OMPI_COMM_WORLD_SIZE"]) < 2:
        return None
    method = "ompi" if "OMPI_MCA_orte_hnp_uri" in environ else "mpi4py"
    if method == "mpi4py" and flags.coordinator_address is not None:
        method = "deactivate"
    elif method == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
        raise ValueError(
            "--coordinator_address is missing: this Open MPI does not tell where process 0 is; "
            "give --coordinator_address=HOST:PORT, or install mpi4py"
        )
    rank = int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])  # the GPU of this process, as JAX has it
    alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return Place(
        num_processes=int(environ["OMPI_COMM_WORLD_SIZE"]),
        process_id=int(environ["OMPI_COMM_WORLD_RANK"]),
        local_device_ids=() if alone else (rank,),
        method=method,
    )


def _tpu(environ: Mapping[str, str]) -> Place | None:
    """A host with TPU chips; on GKE the environment tells the hosts, else JAX asks the metadata."""
    if "tpu" not in environ.get("JAX_PLATFORMS", "tpu"):
        return None
    # JAX sets this variable where it finds no chip.
    if "TPU_SKIP_MDS_QUERY" in environ or importlib.util.find_spec("libtpu") is None:
        return None
    hosts = [environ[name] for name in _TPU_HOSTS if name in environ]
    slices = environ.get("MEGASCALE_NUM_SLICES", "1")
    if hosts and "," not in hosts[0] and slices == "1":
        return None
    return Place()


def _kubernetes(environ: Mapping[str, str]) -> Place | None:
    """A pod of an indexed job: JAX asks the cluster through the package kubernetes."""
    if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            f"this is pod {environ['JOB_COMPLETION_INDEX']} of an indexed job, which does not tell "
            "how many there are: give --coordinator_address, --num_processes and --process_id as "
            "deploy/jobset_gpu.yaml does, install kubernetes, or give --num_processes=1 for this "
            "pod alone"
        )
    return Place()


def _describe(place: Place) -> str:
    known = {name: value for name, value in place._asdict().items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in known.items()) or "found by JAX"


def same_for_all(value: str) -> str:
    """The value of process 0, in every process; of up to 1000 bytes."""
    if jax.process_count() == 1:
        return value
    padded = np.zeros(1000, np.uint8)
    text = np.frombuffer(value.encode(), np.uint8)
    padded[: len(text)] = text
    agreed = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return bytes(agreed[agreed != 0]).decode()
