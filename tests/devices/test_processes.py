"""Which environment means several processes, and what is missing, in one sentence."""

import importlib.util

import jax
import pytest

from diffusion_jax.cli import main
from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.devices import processes
from diffusion_jax.devices.processes import Place, find_place, same_for_all
from diffusion_jax.runs.failures import exit_code
from diffusion_jax.train.hooks.received import Interrupted

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI_4.items() if "orte" not in name}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
EXPLICIT = Place("host:1234", 2, 1)


@pytest.fixture
def packages(monkeypatch):
    """The optional packages that seem to be installed."""
    installed = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    return installed


def place_of(arguments):
    return processes.place_of_flags(
        arguments.coordinator_address,
        arguments.num_processes,
        arguments.process_id,
        arguments.local_device_ids,
    )


def flags(*argv):
    return place_of(parse_arguments(["train", "--config=x.py", *argv]))


def test_a_lone_machine_asks_nobody(packages):
    packages |= {"libtpu", "mpi4py", "kubernetes"}  # installed, but this is no cluster
    assert find_place(Place(), {"TPU_SKIP_MDS_QUERY": "1"}) is None
    alone = {**SLURM, "SLURM_NTASKS": "1"}
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    for environ in (alone, batch_script, {**OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE": "1"}):
        assert find_place(Place(), environ | {"TPU_SKIP_MDS_QUERY": "1"}) is None


def test_nothing_is_joined_by_default(monkeypatch):
    for name in (*SLURM, *OPEN_MPI_4, *POD):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # must not be called
    with processes.joined(place_of(parse_arguments(["--config=x.py"])), exit_code):
        assert not jax.distributed.is_initialized()


def test_flags(packages):
    given = flags("--coordinator_address=host:1234", "--num_processes=2", "--process_id=1")
    assert given == EXPLICIT
    # JAX must not look for a cluster then
    assert find_place(given, {}) == EXPLICIT._replace(method="deactivate")
    assert flags("--local_device_ids=0,3").local_device_ids == (0, 3)


@pytest.mark.parametrize("environ", [SLURM, OPEN_MPI_4, OPEN_MPI_5, POD])
def test_one_process_on_request(packages, environ):
    assert find_place(Place(num_processes=1), environ) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_processes=2"], "--coordinator_address and --process_id missing: outside of SLURM"),
        (["--process_id=0"], "--coordinator_address and --num_processes missing"),
        (
            ["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 should be between 0 and 1: there are 2 processes",
        ),
        (["--coordinator_address=host"], "--coordinator_address=host should be HOST:PORT"),
        (["--num_processes=0"], "--num_processes=0 should be at least 1"),
        (["--local_device_ids=a"], "--local_device_ids=a should be numbers with commas"),
    ],
)
def test_flags_that_are_missing_or_wrong(packages, argv, message):
    with pytest.raises(ValueError, match=message):
        find_place(flags(*argv), {})


def test_a_wrong_flag_is_one_sentence(capsys):
    assert main(["--config=configs/mnist.py:tiny", "--num_processes=2"]) == 2
    assert capsys.readouterr().err.startswith("error: --coordinator_address and --process_id mis")


def test_slurm(packages):
    found = find_place(Place(), SLURM)
    assert found == Place(num_processes=16, process_id=9, method="slurm")
    # JAX would give the only task of a host its first GPU and leave the others idle
    one_per_host = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x16)"}
    assert find_place(Place(), one_per_host).local_device_ids == ()
    assert find_place(Place(local_device_ids=(2,)), one_per_host).local_device_ids == (2,)
    assert find_place(Place("here:1"), SLURM).coordinator_address == "here:1"


def test_open_mpi(packages):
    rank = Place(num_processes=4, process_id=3, local_device_ids=(1,), method="ompi")
    assert find_place(Place(), OPEN_MPI_4) == rank
    with pytest.raises(ValueError, match="does not tell where process 0 is"):
        find_place(Place(), OPEN_MPI_5)
    explicit = rank._replace(coordinator_address="host:1", method="deactivate")
    assert find_place(Place("host:1"), OPEN_MPI_5) == explicit
    packages.add("mpi4py")
    assert find_place(Place(), OPEN_MPI_5) == rank._replace(method="mpi4py")


def test_tpu_hosts(packages):
    packages.add("libtpu")
    assert find_place(Place(), {}) == Place()  # the metadata of the VM, asked by JAX
    assert find_place(Place(), {"TPU_WORKER_HOSTNAMES": "a,b"}) == Place()
    assert find_place(Place(), {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    slices = {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}
    assert find_place(Place(), slices) == Place()
    assert find_place(Place(), {"JAX_PLATFORMS": "cpu"}) is None


def test_kubernetes(packages):
    with pytest.raises(ValueError, match="this is pod 2 of an indexed job.*deploy/jobset_gpu.yaml"):
        find_place(Place(), POD)
    assert find_place(EXPLICIT, POD) == EXPLICIT._replace(method="deactivate")
    assert find_place(Place(), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None
    packages.add("kubernetes")
    assert find_place(Place(), POD) == Place()


def test_others_that_cannot_be_reached(monkeypatch):
    def fail(*args):
        assert not jax.config.jax_enable_preemption_service  # it would take SIGTERM
        raise ConnectionError("DEADLINE_EXCEEDED: nobody there\nmore")

    monkeypatch.setattr(processes, "Peers", fail)
    with (
        pytest.raises(ConnectionError) as caught,
        processes.joined(EXPLICIT, exit_code),
    ):
        raise AssertionError("it has not joined")
    jax.config.update("jax_enable_preemption_service", True)
    text = str(caught.value)
    assert "coordinator_address host:1234" in text and "nobody there; --num_pro" in text


@pytest.fixture
def joining(monkeypatch):
    """What joined does with JAX and with the other processes, in order."""
    did = []

    class Peers(processes.Peers):
        address = "127.0.0.1:5"

        def __init__(self, *args):
            did.append(("meet", *args))

        def fail(self, code, reason, *, wait):
            did.append(("fail", code, reason, wait))

        def finish(self):
            did.append("finish")

    distributed = processes.jax.distributed
    monkeypatch.setattr(processes, "Peers", Peers)
    monkeypatch.setattr(distributed, "initialize", lambda **options: did.append(options))
    monkeypatch.setattr(distributed, "shutdown", lambda: did.append("shutdown"))
    monkeypatch.setattr(processes.atexit, "register", lambda *call: did.append(call))
    yield did
    jax.config.update("jax_enable_preemption_service", True)


def test_jax_meets_where_the_watch_does_and_leaves_before_it(joining):
    with processes.joined(EXPLICIT, exit_code):
        meet, options = joining
    assert meet == ("meet", "host:1234", 1, 2, processes.TIMEOUT)
    assert options["coordinator_address"] == options["coordinator_bind_address"] == "127.0.0.1:5"
    assert (options["process_id"], options["num_processes"]) == (1, 2)
    assert options["cluster_detection_method"] == "deactivate"
    assert joining[2:] == ["shutdown", "finish"]


@pytest.mark.parametrize(
    ("error", "code", "wait"),
    [
        (RuntimeError("x"), 1, 1.0),
        (Interrupted("x"), 75, 1.0),
        (jax.errors.JaxRuntimeError("x"), 1, 30.0),  # what JAX says of another one's death
    ],
)
def test_the_others_learn_of_an_error(joining, error, code, wait):
    with pytest.raises(type(error)), processes.joined(EXPLICIT, exit_code):
        raise error
    (end, its_code), told = joining[2:]
    assert told == ("fail", code, f"{type(error).__name__}: x", wait)
    assert (end.__name__, its_code) == ("_end", code)  # and JAX waits for nobody


def test_the_environment_of_jax_counts(monkeypatch, packages):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "there:7")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")
    place = Place(num_processes=2, process_id=1, method="deactivate")
    assert processes._completed(place)[:4] == ("there:7", 2, 1, (2, 3))
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with pytest.raises(ValueError, match="JAX does not find coordinator_address here"):
        processes._completed(place)
    for name, value in OPEN_MPI_4.items():
        monkeypatch.setenv(name, value)
    found = processes._completed(find_place(Place(), OPEN_MPI_4))
    assert found[1:4] == (4, 3, (1,)) and found.coordinator_address.startswith("10.96.0.1:")


def test_one_process_agrees_with_itself():
    assert same_for_all("logs/2026") == "logs/2026"
