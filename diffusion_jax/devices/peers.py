"""Processes that train together: when one of them ends too early, the others say which, and end.

JAX's own service would end them by an abort in C++, at once or after minutes. So process 0 listens
at the coordinator's address itself, for two kinds of connections:

- "grpc": it is handed on to JAX's service, which listens on this machine only. JAX's client in
  every other process goes through such a connection too and never sees it close.
- "watch": one from every other process, for as long as they train. It closes when either end dies,
  and the system's keep-alive closes it when a machine or the network is gone. A process that is
  only stopped keeps it open. The lines on it are "CODE REASON", from a process that fails, and BYE.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, final

EXIT_PEER = 69  # another process ended too early (sysexits.h, EX_UNAVAILABLE)
EXIT_SIGNAL = 75  # another process was stopped by a signal: the same command goes on
_BYE = b"bye\n"
_STDERR = 2  # the descriptor: the main thread may hold the lock of sys.stderr
_GRACE_SECONDS = 5.0  # in which a process may find the reason itself that another one failed for
_HELLO_SECONDS = 10.0
_LOOK_SECONDS = 0.2
_LINE_BYTES = 4096
# A connection without an answer is closed after 10 + 3 * 5 seconds.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
_log = logging.getLogger(__name__)


@final
class Peers:
    """The watch over the other processes; `address` is where JAX's client and service meet."""

    def __init__(self, address: str, index: int, count: int, timeout: float) -> None:
        """Meet the others; ConnectionError names those who do not come within the timeout."""
        self._count, self._index, self._timeout = count, index, timeout
        self._watched: dict[int, tuple[socket.socket, str]] = {}
        self._kept: list[socket.socket] = []  # of JAX's client
        self._over = threading.Event()  # this process ends by itself
        self._lock = threading.Lock()
        host, _, port = address.rpartition(":")
        self._place = (host.strip("[]"), int(port))
        if index == 0:
            self.address = f"127.0.0.1:{_free_port()}"
            for listener in _listen(*self._place):
                _thread(self._accept, listener)
            self._wait_for_all()
        else:
            connection = self._connect(f"watch {index} {socket.gethostname()}")
            self._add(0, connection, self._place[0])
            listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
            _thread(self._relay, listener)

    def fail(self, code: int, reason: str, *, wait: float = 1.0) -> None:
        """Tell the others why this process ends; wait: seconds to hear that it is their fault."""
        time.sleep(wait)
        self._over.set()
        self._tell(f"{code} {self._name(self._index, socket.gethostname())} ended: {reason}")

    def finish(self) -> None:
        """Tell the others that this process needs them no more."""
        self._over.set()
        self._send(_BYE)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            _thread(self._greet, connection)

    def _greet(self, connection: socket.socket) -> None:
        """Find out what a new connection is for; one that does not say so is closed."""
        try:
            connection.settimeout(_HELLO_SECONDS)
            words = _read_line(connection).split()
            connection.settimeout(None)
            if words[:1] == ["grpc"]:
                _join(connection, _reach(_split(self.address), self._timeout))
            elif words[:1] == ["watch"] and len(words) == 3 and words[1].isdigit():
                self._welcome(int(words[1]), connection, words[2])
            else:
                connection.close()
        except OSError:
            connection.close()

    def _welcome(self, index: int, connection: socket.socket, host: str) -> None:
        with self._lock:
            if 0 < index < self._count and index not in self._watched:
                self._add(index, connection, host)
                return
        text = f"{EXIT_PEER} process_id = {index} on {host} is taken or not below {self._count}\n"
        connection.sendall(text.encode())
        connection.close()

    def _relay(self, listener: socket.socket) -> None:
        """Carry the connections of JAX's client to process 0, and never close their near end."""
        while True:
            inner, _ = listener.accept()
            self._kept.append(inner)
            _join(inner, self._connect("grpc"), keep=True)

    def _connect(self, hello: str) -> socket.socket:
        connection = _reach(self._place, self._timeout)
        connection.sendall(f"{hello}\n".encode())
        return connection

    def _wait_for_all(self) -> None:
        until = time.monotonic() + self._timeout
        while len(self._watched) < self._count - 1:
            if time.monotonic() > until:
                missing = sorted(set(range(1, self._count)) - set(self._watched))
                names = ", ".join(map(str, missing))
                raise ConnectionError(f"process {names} did not come within {self._timeout:.0f} s")
            time.sleep(_LOOK_SECONDS)

    def _add(self, index: int, connection: socket.socket, host: str) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._watched[index] = (connection, host)
        _thread(self._watch, index, connection, host)

    def _watch(self, index: int, connection: socket.socket, host: str) -> None:
        """Read what another process says until it is gone."""
        try:
            line = _read_line(connection)
        except OSError:
            line = ""
        if line + "\n" == _BYE.decode():
            return
        who = self._name(index, host)
        died = f"{EXIT_PEER} {who} died: it was killed, ran out of memory, or its machine is gone"
        self._tell(line or died)
        code, _, reason = (line or died).partition(" ")
        if self._over.wait(0.0 if code == str(EXIT_PEER) else _GRACE_SECONDS):
            return
        with self._lock:  # of two threads, the first one speaks
            text = (
                f"\nerror: {reason}; this process ends too: start all of them again, and the same "
                "command goes on from the newest checkpoint\n"
            )
            os.write(_STDERR, text.encode())
            os._exit(EXIT_SIGNAL if code == str(EXIT_SIGNAL) else EXIT_PEER)

    def _name(self, index: int, host: str) -> str:
        return f"process {index} of {self._count} on {host}"

    def _tell(self, line: str) -> None:
        self._send(" ".join(line.split()).encode()[: _LINE_BYTES - 1] + b"\n")

    def _send(self, data: bytes) -> None:
        for connection, _ in list(self._watched.values()):
            with contextlib.suppress(OSError):  # that one is gone, which its own thread notices
                connection.sendall(data)


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listen at an address of this machine, else (a service's name, say) at all of them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    listeners: list[socket.socket] = []
    for family, place in dict.fromkeys((family, place[:2]) for family, *_, place in found):
        try:
            listeners.append(socket.create_server(place, family=family))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    reached = [one.getsockname()[0] for one in listeners]
    # The name of a machine is often its loopback address on the machine itself.
    named = host in (*reached, "localhost") and listeners
    if not named and all(map(is_loopback, reached)):
        for listener in listeners:
            listener.close()
        _log.warning("other machines cannot reach this one at %s: listening at all addresses", host)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return [socket.create_server(("", port), family=family, dualstack_ipv6=both)]
    return listeners


def _reach(place: tuple[str, int], timeout: float) -> socket.socket:
    """Connect to who may not listen yet."""
    until = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(place, timeout=_HELLO_SECONDS)
            connection.settimeout(None)
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()  # a port that nobody listens at may be connected to itself
        except OSError as error:
            if time.monotonic() > until:
                reason = error.strerror or str(error)
                raise ConnectionError(
                    f"process 0 does not answer at {place[0]}:{place[1]} within {timeout:.0f} s: "
                    f"{reason}"
                ) from error
        time.sleep(_LOOK_SECONDS)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _join(near: socket.socket, far: socket.socket, *, keep: bool = False) -> None:
    """Copy what comes on each connection to the other; keep: `near` stays open without `far`."""
    _thread(_copy, near, far, far)
    _thread(_copy, far, near, None if keep else near)


def _copy(source: socket.socket, target: socket.socket, closes: socket.socket | None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    if closes is not None:
        with contextlib.suppress(OSError):
            closes.shutdown(socket.SHUT_RDWR)


def _read_line(connection: socket.socket) -> str:
    """Read up to the end of a line; "" when the connection was closed before."""
    data = b""
    while not data.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(data) >= _LINE_BYTES:
            return ""
        data += byte
    return data.decode(errors="replace").strip()


def _thread(target: Callable[..., Any], *args: Any) -> None:
    threading.Thread(target=target, args=args, name=target.__name__, daemon=True).start()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
