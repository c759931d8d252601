"""Tools of MCP servers (the Model Context Protocol), as an agent takes them."""

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from kimi_jax.agents.mcp_servers import servers_of
from kimi_jax.agents.model import Content, Parts
from kimi_jax.agents.tools import Tool, ToolError
from kimi_jax.printable import printable

START = 60.0  # seconds for a server to start and list its tools


@contextlib.asynccontextmanager
async def mcp_tools(spec: Any, *, timeout: float = 60.0) -> AsyncIterator[list[Tool]]:
    """Connects to servers while the block runs; gives their tools, each of which asks for a person's yes.

    spec: `{"mcpServers": {NAME: SERVER}}`, where SERVER is `{"command": ..., "args": ..., "env": ..., "cwd": ...}` or
        `{"url": ..., "headers": ...}`, or the path of a JSON file with it, the URL of one server,
        `mcp.StdioServerParameters`, or an `MCPServer` of this process. Servers of commands get of this process's
        environment what `mcp` deems harmless, and `env`.
    timeout: seconds that a call may take. A call that takes longer or is cancelled is cancelled on the server.

    A tool whose name two servers have is named SERVER_TOOL on both.

    Raises ModuleNotFoundError where `mcp` is not installed, OSError where a file cannot be read, ValueError naming the
    server and field for another spec, and RuntimeError naming the server for one that does not answer.
    """
    servers = servers_of(spec)
    found: list[tuple[str, Tool]] = []
    async with contextlib.AsyncExitStack() as stack:
        for server, connect in servers.items():
            try:
                async with asyncio.timeout(START):
                    client = await stack.enter_async_context(connect())
                    found += [(server, _tool(client, one, timeout)) for one in await _list(client)]
            except Exception as error:
                raise RuntimeError(f"the MCP server {printable(server)} gives no tools: {_reason(error)}") from error
        names = Counter(one.name for _, one in found)
        yield [
            one if names[one.name] == 1 else replace(one, name=_name(f"{server}_{one.name}")) for server, one in found
        ]


async def _list(client: Any) -> list[Any]:
    """Returns the tools that a server declares, from all pages of its list."""
    page = await client.list_tools()
    tools = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools


def _tool(client: Any, declared: Any, timeout: float) -> Tool:
    async def call(**arguments: Any) -> Content:
        result = await client.call_tool(declared.name, arguments)
        content = _content(result)
        if result.is_error:
            raise ToolError(content if isinstance(content, str) else json.dumps(content))
        return content

    return Tool(
        _name(declared.name), declared.description or "", declared.input_schema, call, timeout=timeout, asks=True
    )


def _name(text: str) -> str:
    """Returns a name in the letters that chat templates and servers take."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[:64]


def _content(result: Any) -> Content:
    """Returns a result's texts, joined, or parts where it has pictures."""
    if not result.content and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    parts = Parts(_part(one) for one in result.content)
    if all(one["type"] == "text" for one in parts):
        return "\n".join(one["text"] for one in parts)
    return parts


def _part(block: Any) -> dict[str, Any]:
    if block.type == "image":
        return {"type": "image_url", "image_url": {"url": f"data:{block.mime_type};base64,{block.data}"}}
    if block.type == "text":
        text = block.text
    elif block.type == "resource":
        text = getattr(block.resource, "text", f"[{block.resource.uri}: data that is no text, not shown]")
    elif block.type == "resource_link":
        text = f"[{block.name}: {block.uri}]"
    else:
        text = f"[{block.type}, not shown]"
    return {"type": "text", "text": text}


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return f"no answer for {START:g} s"
    return printable(f"{type(error).__name__}: {error}")
