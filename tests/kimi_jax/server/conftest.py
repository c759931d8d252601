"""Serves a fake engine on a port, and makes the clients of both APIs for it."""

from types import SimpleNamespace

import anthropic
import httpx
import openai
import pytest
from fake_engine import FakeEngine

from checkpoints.toy import toy_config, write_toy
from kimi_jax.processor import Processor
from kimi_jax.server import Listener, Service
from kimi_jax.serving import EngineBackend

NAME = "kimi-toy"


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """Returns the folder of a K2.5 of two layers."""
    config = toy_config("k2.5", hidden_size=64, num_hidden_layers=2, n_routed_experts=8, quantization_config=None)
    return write_toy(tmp_path_factory.mktemp("served") / "toy", config)


@pytest.fixture(scope="session")
def processor(toy_folder):
    return Processor.from_folder(toy_folder)


@pytest.fixture(scope="session")
def serve(processor):
    """Returns a function from limits and a mode of sampling to a server with its engine and clients."""
    started = []

    def start(limits=None, sampling="open", engine=None):
        engine = engine or FakeEngine(processor)
        service = Service([NAME, "other-name"], limits, sampling)
        listener = Listener(service.app(), "127.0.0.1", 0).start()
        service.ready(EngineBackend(engine, processor))
        key = service.limits.api_key or "none"
        server = SimpleNamespace(
            engine=engine,
            service=service,
            listener=listener,
            openai=openai.OpenAI(base_url=f"{listener.url}/v1", api_key=key, max_retries=0),
            anthropic=anthropic.Anthropic(base_url=listener.url, api_key=key, max_retries=0),
            http=httpx.Client(base_url=listener.url),
        )
        started.append(server)
        return server

    yield start
    for server in started:
        for client in (server.openai, server.anthropic, server.http):
            client.close()
        server.listener.stop(2.0)


@pytest.fixture(scope="session")
def _shared(serve):
    return serve()


@pytest.fixture
def served(_shared, processor):
    """Returns the server that tests share, its engine as new."""
    _shared.engine.__init__(processor)
    _shared.service.backend.max_length = _shared.engine.sizes.max_length
    return _shared
