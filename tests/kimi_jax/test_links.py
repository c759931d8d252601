"""Links carry messages in order, refuse strangers, and say which process is lost, whether it ends or falls silent."""

import contextlib
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from kimi_jax import links
from kimi_jax.links import Links


class Store:
    """Keeps texts in memory, as a job's coordinator does."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            self.values.setdefault(key, value)
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000), key
            return self.values[key]


@contextlib.contextmanager
def linked(processes=2, store=None):
    """Yields the links of each process of a job, and a queue of (process, lost process)."""
    store, losses = store or Store(), queue.Queue()
    with ThreadPoolExecutor(processes) as threads, contextlib.ExitStack() as stack:
        made = list(threads.map(lambda i: Links(store, i, processes, "localhost"), range(processes)))
        for each in made:
            stack.callback(each.close)
            each.watch(lambda lost, process=each.process: losses.put((process, lost)))
        yield made, losses


def test_messages_come_in_order_both_ways():
    with linked(3) as ((first, second, third), losses):
        for message in (b"a", b"b" * 10**6, b""):
            first.send(message)
        for other in (second, third):
            assert [other.receive() for _ in range(3)] == [[b"a"], [b"b" * 10**6], [b""]]
        third.send(b"3")
        second.send(b"2")
        assert first.receive() == [b"2", b"3"]
        assert first.name(2) == f"process 2 of 3 (host {socket.gethostname()})"
        assert (first.first, second.first) == (True, False)
        assert losses.empty()


def test_an_ended_process_is_named_and_the_others_go_on():
    with linked(3) as ((first, second, third), losses):
        second.close()
        assert losses.get(timeout=5) == (0, 1)
        first.send(b"on")
        assert third.receive() == [b"on"]
        first.close()
        assert losses.get(timeout=5) == (2, 0)


def test_another_key_is_refused(monkeypatch):
    monkeypatch.setattr(links, "_MEET_S", 1.0)
    store = Store()
    store.key_value_set("kimi-jax/key/1", f"{zmq.curve_keypair()[0].decode()} elsewhere")  # whose secret nobody has
    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(Links, store, process, 2, "localhost") for process in range(2))
        with pytest.raises(ConnectionRefusedError, match=r"process 0 of 2 \(host .*\) refused process 1"):
            second.result()
        with pytest.raises(ConnectionError, match=r"process 1 of 2 \(host elsewhere\) did not answer within 1 s"):
            first.result()


def test_a_stranger_at_the_port_changes_nothing():
    store = Store()
    with linked(store=store) as ((first, second), losses):
        for port in (int(store.values["kimi-jax/port/1"]),) * 2:
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        late = zmq.curve_keypair()  # even with the port's key: nobody is taken in any more
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.linger, stranger.curve_publickey, stranger.curve_secretkey = 0, *late
            stranger.curve_serverkey = store.values["kimi-jax/key/0"].split()[0].encode()
            stranger.connect(f"tcp://localhost:{port}")
            stranger.send(b"hello")
            time.sleep(0.3)
        second.send(b"mine")
        assert first.receive() == [b"mine"]
        first.send(b"yours")
        assert second.receive() == [b"yours"]
        assert losses.empty()


class Relay(Store):
    """A store that leads process 1 to process 0 through a relay, which can fall silent."""

    def __init__(self):
        super().__init__()
        self.silent = False
        self.door = socket.create_server(("localhost", 0))

    def blocking_key_value_get(self, key, timeout_in_ms):
        value = super().blocking_key_value_get(key, timeout_in_ms)
        if not key.startswith("kimi-jax/port/"):
            return value
        threading.Thread(target=self._relay, args=(int(value),), daemon=True).start()
        return str(self.door.getsockname()[1])

    def _relay(self, port):
        near, _ = self.door.accept()
        with near, socket.create_connection(("localhost", port)) as far:
            other = threading.Thread(target=self._copy, args=(far, near))
            other.start()
            self._copy(near, far)
            other.join()

    def _copy(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if not self.silent:
                    target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_silent_process_is_lost_on_both_sides(monkeypatch):
    monkeypatch.setattr(links, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(links, "SILENCE_S", 1.0)
    relay = Relay()
    with relay.door, linked(store=relay) as (_, losses):
        with pytest.raises(queue.Empty):
            losses.get(timeout=1.3)  # heartbeats keep an idle link
        relay.silent = True
        assert sorted(losses.get(timeout=10) for _ in range(2)) == [(0, 1), (1, 0)]
