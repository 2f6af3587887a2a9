"""When one process ends too early, the others say which and end; no JAX is needed to see that."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from diffusion_jax.devices import peers
from diffusion_jax.devices.peers import EXIT_PEER, Peers, is_loopback

HOST = socket.gethostname()
SCRIPT = textwrap.dedent(
    """
    import sys
    from diffusion_jax.devices.peers import Peers
    assert "jax" not in sys.modules
    peers = Peers(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 20.0)
    print("ready", peers.address, flush=True)
    for line in sys.stdin:
        word, _, text = line.strip().partition(" ")
        if word == "fail":
            peers.fail(int(text[:2]), text[3:], wait=0.0)
        elif word == "finish":
            peers.finish()
        print("did", flush=True)
        if word == "fail":
            sys.exit(int(text[:2]))
    """
)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Started:
    """Processes that have met, and what they said."""

    def __init__(self, count, host="127.0.0.1"):
        self.address = f"{host}:{free_port()}"
        pipe = subprocess.PIPE
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, self.address, str(index), str(count)],
                stdin=pipe, stdout=pipe, stderr=pipe, text=True,
            )
            for index in range(count)
        ]  # fmt: skip
        lines = [process.stdout.readline().split() for process in self.all]
        assert [line[0] for line in lines] == ["ready"] * count
        self.meeting = [line[1] for line in lines]

    def tell(self, index, text):
        self.all[index].stdin.write(f"{text}\n")
        self.all[index].stdin.flush()
        assert self.all[index].stdout.readline() == "did\n"

    def ends(self, *indices):
        return [
            (self.all[index].wait(timeout=20), self.all[index].stderr.read()) for index in indices
        ]


@pytest.fixture
def start():
    started = []

    def start(*args, **options):
        started.append(Started(*args, **options))
        return started[-1]

    yield start
    for group in started:
        for process in group.all:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_process_that_dies_is_named_and_all_end(start, victim):
    group = start(3)
    group.all[victim].kill()
    begun = time.monotonic()
    for code, said in group.ends(*{0, 1, 2} - {victim}):
        assert code == EXIT_PEER and said.strip().count("\n") == 0
        host = "127.0.0.1" if victim == 0 else HOST
        assert f"error: process {victim} of 3 on {host} died" in said
        assert "start all of them again, and the same command goes on" in said
    assert time.monotonic() - begun < 4.5  # nobody waits for another reason


@pytest.mark.slow
@pytest.mark.parametrize(("told", "code"), [(2, EXIT_PEER), (75, 75)])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_fails_says_why(start, monkeypatch, victim, told, code):
    group = start(3)
    group.tell(victim, f"fail {told:02d} OSError: no space left")
    for found, said in group.ends(*{0, 1, 2} - {victim}):
        assert found == code
        assert f"process {victim} of 3 on {HOST} ended: OSError: no space left; this" in said


def test_one_that_fails_too_keeps_its_own_code(start):
    group = start(2)
    group.tell(0, "fail 02 ValueError: x")
    group.tell(1, "fail 02 ValueError: x")
    assert group.ends(0, 1) == [(2, ""), (2, "")]


def test_one_that_is_done_is_not_missed(start):
    group = start(3)
    group.tell(2, "finish")
    group.all[2].kill()
    group.tell(1, "finish")
    group.tell(0, "finish")
    group.all[0].kill()
    time.sleep(1)
    assert group.all[1].poll() is None


def test_one_that_is_stopped_for_a_while_is_waited_for(start):
    group = start(2)
    group.all[1].send_signal(signal.SIGSTOP)
    time.sleep(1)
    assert group.all[0].poll() is None
    group.all[1].send_signal(signal.SIGCONT)
    group.tell(1, "finish")
    group.tell(0, "finish")


def test_connections_of_jax_reach_the_service_in_process_0(start):
    group = start(2)
    host, _, port = group.meeting[0].rpartition(":")
    client_host, _, client_port = group.meeting[1].rpartition(":")
    with socket.create_server((host, int(port))) as service:
        client = socket.create_connection((client_host, int(client_port)))
        client.sendall(b"PRI * HTTP/2.0")
        served, _ = service.accept()
        assert served.recv(100) == b"PRI * HTTP/2.0"
        served.sendall(b"answer")
        assert client.recv(100) == b"answer"
        served.close()  # the client must not see this: it would abort
        client.settimeout(1)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_stranger_and_a_second_of_one_number_are_sent_away(start):
    group = start(2)
    host, _, port = group.address.rpartition(":")
    for hello, answer in ((b"GET / HTTP/1.1\n", b""), (b"watch 1 here\n", b"69 process_id = 1 on")):
        stranger = socket.create_connection((host, int(port)))
        stranger.sendall(hello)
        assert stranger.recv(20) == answer
    time.sleep(0.5)
    assert [process.poll() for process in group.all] == [None, None]


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux")
def test_only_the_given_address_listens(start):
    group = start(2)
    port = int(group.address.rpartition(":")[2])
    with open("/proc/net/tcp") as four, open("/proc/net/tcp6") as six:
        lines = [line.split() for line in (*four, *six)]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize("host", ["a.name.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_told_and_all_addresses_listen(caplog, host):
    (listener,) = peers._listen(host, 0)
    assert listener.getsockname()[0] in ("::", "0.0.0.0")
    assert f"cannot reach this one at {host}: listening at all" in caplog.messages[0]
    listener.close()


def test_a_port_that_is_taken_is_an_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host in ("localhost", "127.0.0.1"):
            with pytest.raises(OSError, match="Address already in use"):
                Peers(f"{host}:{taken.getsockname()[1]}", 0, 2, timeout=5.0)


def test_those_who_do_not_come_are_named():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError, match=r"process 1, 2 did not come within 0 s"):
        Peers(address, 0, 3, timeout=0.3)
    nobody = re.escape(f"127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionError, match=f"process 0 does not answer at {nobody} within 0 s"):
        Peers(nobody.replace("\\", ""), 1, 3, timeout=0.3)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected
