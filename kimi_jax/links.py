"""Connects process 0 of a job with each other process: messages in order, and word of a lost process within seconds.

Each process makes a pair of keys for itself (CurveZMQ, https://rfc.zeromq.org/spec/26), and tells the others the public
one through the store of the coordinator of `jax.distributed`. Process 0 has a port for each other process, where it
takes in the owner of that process's key and refuses anybody else; they know it by its key as well. So nobody has to
hand out a secret, no secret leaves its process, and what is sent is encrypted. Reading the store lets nobody in; who
can write to it could end the job through JAX already.

libzmq sends the heartbeats in threads of its own, both ways: a process that computes, or compiles, is not taken for a
lost one.
"""

import dataclasses
import socket
import threading
from collections.abc import Callable
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from kimi_jax.printable import printable

HEARTBEAT_S = 1.0
# Without a sign of life for so long a process is lost.
SILENCE_S = 5.0
_MEET_S = 60.0
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_WATCHED = zmq.EVENT_DISCONNECTED | _REFUSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


@dataclasses.dataclass
class _Link:
    """The connection with one process. `fd` numbers it among those that strangers may try to make at its port."""

    key: bytes
    host: str
    socket: "zmq.Socket[bytes]"
    monitor: "zmq.Socket[bytes]"
    fd: int = -1


class Links:
    """The connections of process number `process` with process 0, or of process 0 with all `processes` others.

    store: `key_value_set` and `blocking_key_value_get` of the coordinator that the processes share.
    address: the name or number of process 0's host.

    Raises ConnectionError where the others do not answer within a minute, or process 0 refuses this process.
    """

    def __init__(self, store: Any, process: int, processes: int, address: str):
        self.process, self.processes = process, processes
        self._context: zmq.Context[Any] = zmq.Context()
        self._links: dict[int, _Link] = {}
        self._over = threading.Event()
        self._sending = threading.Lock()  # a socket is one thread's at a time
        self._watching: threading.Thread | None = None
        try:
            public, secret = zmq.curve_keypair()
            store.key_value_set(f"kimi-jax/key/{process}", f"{public.decode()} {socket.gethostname()}")
            for other in range(1, processes) if self.first else (0,):
                key, host = store.blocking_key_value_get(f"kimi-jax/key/{other}", round(1000 * _MEET_S)).split(" ", 1)
                self._links[other] = self._link(key.encode(), printable(host, 100), public, secret)
            if self.first:
                self._accept(store)
            else:
                self._connect(store, address)
        except BaseException:
            self.close()
            raise

    @property
    def first(self) -> bool:
        """True in process 0."""
        return self.process == 0

    def name(self, process: int) -> str:
        """Returns a process's number and host, for messages."""
        host = self._links[process].host if process in self._links else socket.gethostname()
        return f"process {process} of {self.processes} (host {host})"

    def send(self, message: bytes) -> None:
        """Sends a message to process 0, or from it to all others; returns at once. A lost process gets none: `watch`
        tells of it."""
        with self._sending:
            for link in self._links.values():
                try:
                    link.socket.send(message, zmq.DONTWAIT)
                except zmq.Again:
                    continue

    def receive(self) -> list[bytes]:
        """Waits for the next message of process 0, or in process 0 for one of each other process, in their order."""
        return [link.socket.recv() for link in self._links.values()]

    def watch(self, on_loss: Callable[[int], Any]) -> None:
        """Calls `on_loss` with the number of a process whose connection ends before `close`, in a thread of its own."""
        self._watching = threading.Thread(target=self._watch, args=(on_loss,), name="kimi-jax links", daemon=True)
        self._watching.start()

    def close(self) -> None:
        """Ends the connections."""
        self._over.set()
        if self._watching is not None:
            self._watching.join()
        while self._links:
            _, link = self._links.popitem()
            link.socket.disable_monitor()
            link.monitor.close(linger=0)
            link.socket.close(linger=0)
        self._context.term()

    def _link(self, key: bytes, host: str, public: bytes, secret: bytes) -> _Link:
        made = self._context.socket(zmq.DEALER)
        made.setsockopt(zmq.IPV6, 1)
        made.setsockopt(zmq.CURVE_PUBLICKEY, public)
        made.setsockopt(zmq.CURVE_SECRETKEY, secret)
        made.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * HEARTBEAT_S))
        made.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * SILENCE_S))
        made.setsockopt(zmq.RECONNECT_IVL, -1)
        made.setsockopt(zmq.SNDHWM, 0)  # process 0 is never more than two steps ahead
        made.setsockopt(zmq.RCVHWM, 0)
        return _Link(key, host, made, made.get_monitor_socket(_WATCHED))

    def _accept(self, store: Any) -> None:
        """Takes in every other process, each at a port of its own."""
        known = _KnownKeys({str(other): link.key for other, link in self._links.items()})
        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        try:
            for other, link in self._links.items():
                authenticator.configure_curve_callback(str(other), known)
                link.socket.setsockopt(zmq.CURVE_SERVER, 1)
                link.socket.setsockopt(zmq.ZAP_DOMAIN, str(other).encode())
                link.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # refuses all once the authenticator is gone
                store.key_value_set(f"kimi-jax/port/{other}", str(link.socket.bind_to_random_port("tcp://*")))
            for other, link in self._links.items():
                self._meet(other)
                link.socket.send(b"")
        finally:
            authenticator.stop()

    def _connect(self, store: Any, address: str) -> None:
        port = store.blocking_key_value_get(f"kimi-jax/port/{self.process}", round(1000 * _MEET_S))
        self._links[0].socket.setsockopt(zmq.CURVE_SERVERKEY, self._links[0].key)
        self._links[0].socket.connect(f"tcp://{address}:{port}")
        self._links[0].socket.send(b"")
        self._meet(0)

    def _meet(self, other: int) -> None:
        """Waits for the first message of a process."""
        link, poller = self._links[other], zmq.Poller()
        poller.register(link.socket, zmq.POLLIN)
        if not self.first:
            poller.register(link.monitor, zmq.POLLIN)
        ready = dict(poller.poll(round(1000 * _MEET_S)))
        if link.socket in ready:
            link.fd = int(link.socket.recv(copy=False).get(zmq.SRCFD))
        elif ready:
            raise ConnectionRefusedError(f"{self.name(other)} refused process {self.process}: it knows another key")
        else:
            raise ConnectionError(f"{self.name(other)} did not answer within {_MEET_S:g} s")

    def _watch(self, on_loss: Callable[[int], Any]) -> None:
        poller = zmq.Poller()
        for link in self._links.values():
            poller.register(link.monitor, zmq.POLLIN)
        while not self._over.is_set():
            ready = dict(poller.poll(200))
            for other, link in self._links.items():
                if link.monitor in ready:
                    event = recv_monitor_message(link.monitor)
                    if event["event"] == zmq.EVENT_DISCONNECTED and event["value"] == link.fd:
                        on_loss(other)


@dataclasses.dataclass(frozen=True)
class _KnownKeys:
    """Says which key belongs to which domain, in the form that pyzmq's authenticator asks for."""

    keys: dict[str, bytes]

    def callback(self, domain: str, key: bytes) -> bool:
        return self.keys.get(domain) == key
