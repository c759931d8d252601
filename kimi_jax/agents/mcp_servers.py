"""Clients of MCP servers from the forms in which people write down which servers there are."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from kimi_jax import json_reader
from kimi_jax.printable import printable


def servers_of(spec: Any) -> dict[str, Callable[[], Any]]:
    """Returns for each server's name a function that makes a client of it, not connected yet.

    Raises what `mcp_tools` raises for a spec.
    """
    import mcp

    if isinstance(spec, str) and spec.startswith(("http://", "https://")):
        return {spec: lambda: mcp.Client(spec)}
    if isinstance(spec, str | Path):
        return _of_settings(json_reader.read_object(Path(spec)), printable(spec))
    if isinstance(spec, Mapping):
        return _of_settings(spec, "the spec")
    name = str(getattr(spec, "command", None) or getattr(spec, "name", "server"))
    return {name: lambda: mcp.Client(spec)}


def _of_settings(settings: Mapping[str, Any], source: str) -> dict[str, Callable[[], Any]]:
    servers = settings.get("mcpServers")
    if not isinstance(servers, Mapping):
        raise ValueError(f"{source}: mcpServers is {printable(servers)}, expected an object of servers")
    return {name: _of_server(one, f"{source}: mcpServers.{printable(name)}") for name, one in servers.items()}


def _of_server(server: Any, source: str) -> Callable[[], Any]:
    import mcp
    from pydantic import ValidationError

    if not isinstance(server, Mapping) or ("command" in server) == ("url" in server):
        raise ValueError(f"{source}: expected an object with command or url")
    if "command" in server:
        try:
            given = {key: server[key] for key in ("command", "args", "env", "cwd") if key in server}
            parameters = mcp.StdioServerParameters(**given)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{source}.{first['loc'][0]}: {first['msg']}") from None
        return lambda: mcp.Client(parameters)
    url, headers = server["url"], server.get("headers", {})
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ValueError(f"{source}.url is {printable(url)}, expected an address that begins with http:// or https://")
    if not isinstance(headers, Mapping) or not all(isinstance(one, str) for one in headers.values()):
        raise ValueError(f"{source}.headers: expected an object of strings")
    return lambda: _client_with_headers(url, dict(headers))


@contextlib.asynccontextmanager
async def _client_with_headers(url: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    import httpx2  # mcp's own HTTP client, which it asks for where there are headers
    import mcp
    from mcp.client.streamable_http import streamable_http_client

    async with (
        httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(30.0, read=300.0)) as http,
        mcp.Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client
