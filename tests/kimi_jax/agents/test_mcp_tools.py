"""Tools of MCP servers: in this process, of a command, over HTTP; their failures, pictures, names and cancellation."""

import asyncio
import base64
import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from kimi_jax import agents

mcp = pytest.importorskip("mcp", reason="needs mcp")
from mcp.server.mcpserver import Image as McpImage  # noqa: E402
from mcp.server.mcpserver import MCPServer  # noqa: E402

# A server in plain JSON-RPC, which starts in no time; "hang" answers never, and its cancellation is written to a file
SCRIPT = """
import json, pathlib, sys

def answer(request):
    method, asked = request["method"], request.get("params", {})
    if method == "initialize":
        return {"protocolVersion": asked["protocolVersion"], "capabilities": {"tools": {}},
                "serverInfo": {"name": "plain", "version": "1"}}
    if method == "tools/list":
        schema = {"type": "object", "properties": {"file": {"type": "string"}}}
        return {"tools": [{"name": name, "inputSchema": schema} for name in ("echo", "hang")]}
    if method == "tools/call" and asked["name"] == "echo":
        return {"content": [{"type": "text", "text": sys.argv[1]}]}
    if method == "tools/call":
        pathlib.Path(asked["arguments"]["file"]).write_text("begun")
        hanging.append(asked["arguments"]["file"])

hanging = []
for line in sys.stdin:
    request = json.loads(line)
    if request["method"] == "notifications/cancelled":
        pathlib.Path(hanging.pop()).write_text("cancelled")
    elif "id" in request:
        known = request["method"] in ("initialize", "tools/list", "tools/call")
        result = answer(request) if known else None
        reply = {"result": result} if known else {"error": {"code": -32601, "message": "unknown"}}
        if result is not None or not known:
            print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **reply}), flush=True)
"""


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def server_with(*functions, name="test"):
    server = MCPServer(name)
    for one in functions:
        server.tool(structured_output=False)(one)
    return server


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def calls(*made):
    return agents.Reply(None, calls=tuple(agents.Call("", name, json.dumps(values)) for name, values in made))


def results(done):
    return [message["content"] for message in done.messages if message["role"] == "tool"]


async def ask(spec, *made, **settings):
    async with agents.mcp_tools(spec, **settings) as tools:
        model = agents.ScriptedModel([calls(*made), agents.Reply("done")])
        return results(await agents.Agent(model, tools).run("task"))


def test_the_tools_of_a_server_in_this_process_are_declared_and_called():
    async def main():
        async with agents.mcp_tools(server_with(add)) as tools:
            (tool,) = tools
            assert (tool.name, tool.description, tool.asks) == ("add", "Adds two numbers.", True)
            assert set(tool.parameters["properties"]) == {"a", "b"}
        return await ask(server_with(add), ("add", {"a": 2, "b": 3}), ("add", {"a": "x", "b": 3}))

    assert asyncio.run(main()) == ["5", "Error: $.a: 'x' is not of type 'integer'"]


def test_failures_of_a_server_are_told_in_words():
    def fail(text: str) -> str:
        raise OSError("a secret of the server")

    async def slow(text: str) -> str:
        await asyncio.sleep(100)
        return text

    made = [("fail", {"text": ""}), ("slow", {"text": ""})]
    failed, slept = asyncio.run(ask(server_with(fail, slow), *made, timeout=0.05))
    assert failed.startswith("Error: ") and "fail" in failed and slept == "Error: slow took longer than 0.05 s"


def test_pictures_become_parts_of_the_message_and_damaged_ones_a_failure():
    def draw(text: str) -> list:
        return ["a square", McpImage(data=png(), format="png")]

    def damaged(text: str) -> McpImage:
        return McpImage(data=b"no picture", format="png")

    parts, broken = asyncio.run(ask(server_with(draw, damaged), ("draw", {"text": ""}), ("damaged", {"text": ""})))
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    assert parts == [{"type": "text", "text": "a square"}, {"type": "image_url", "image_url": {"url": url}}]
    assert broken.startswith("Error: the result holds a picture that cannot be opened: ")


def test_cancelling_in_the_middle_of_five_calls_reaches_the_server_and_leaves_no_task():
    started, ended = [], []

    async def hang(n: int) -> str:
        started.append(n)
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(n)
        return ""

    async def main():
        before = asyncio.all_tasks()
        async with agents.mcp_tools(server_with(hang)) as tools:
            model = agents.ScriptedModel([calls(*(("hang", {"n": n}) for n in range(5)))])
            task = asyncio.create_task(agents.Agent(model, tools).run("task"))
            while len(started) < 5:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sorted(ended) == list(range(5))
        assert asyncio.all_tasks() == before

    asyncio.run(main())


def test_commands_are_servers_whose_clashing_names_are_told_apart_and_which_end(tmp_path):
    script, settings, file = tmp_path / "plain.py", tmp_path / "servers.json", tmp_path / "file"
    script.write_text(SCRIPT)
    servers = {name: {"command": sys.executable, "args": ["-S", str(script), name]} for name in ("one", "two")}
    settings.write_text(json.dumps({"mcpServers": servers}))

    async def main():
        async with agents.mcp_tools(settings) as tools:
            assert sorted(one.name for one in tools) == ["one_echo", "one_hang", "two_echo", "two_hang"]
            replies = [calls(("one_echo", {}), ("two_echo", {})), calls(("one_hang", {"file": str(file)}))]
            trace = agents.Trace()
            task = asyncio.create_task(agents.Agent(agents.ScriptedModel(replies), tools).run("task", trace=trace))
            while not file.exists():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while file.read_text() != "cancelled":
                await asyncio.sleep(0.01)
        return [event["content"] for event in trace.events if event["event"] == "result"]

    assert sorted(asyncio.run(asyncio.wait_for(main(), 60))) == ["one", "two"]
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(script) not in found


def test_headers_and_environments_reach_the_server_and_not_the_trace():
    uvicorn = pytest.importorskip("uvicorn")
    seen = []

    async def main():
        app = server_with(add).streamable_http_app()

        async def with_headers(scope, receive, send):
            if scope["type"] == "http":
                seen.append(dict(scope["headers"]).get(b"authorization"))
            await app(scope, receive, send)

        config = uvicorn.Config(with_headers, port=0, log_level="error", ws="none")
        web = uvicorn.Server(config)
        serving = asyncio.create_task(web.serve())
        while not web.started:
            await asyncio.sleep(0.01)
        port = web.servers[0].sockets[0].getsockname()[1]
        server = {"url": f"http://127.0.0.1:{port}/mcp", "headers": {"Authorization": "Bearer sesame"}}
        async with agents.mcp_tools({"mcpServers": {"web": server}}) as tools:
            model = agents.ScriptedModel([calls(("add", {"a": 2, "b": 3})), agents.Reply("done")])
            done = await agents.Agent(model, tools).run("task")
        async with agents.mcp_tools(server["url"]) as tools:
            assert [one.name for one in tools] == ["add"]
        web.should_exit = True
        await serving
        return done

    done = asyncio.run(asyncio.wait_for(main(), 60))
    assert results(done) == ["5"] and b"Bearer sesame" in seen and seen[-1] is None
    assert "sesame" not in json.dumps(done.trace.events)


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ({}, ValueError, "the spec: mcpServers is None, expected an object of servers"),
        ({"mcpServers": {"a": {}}}, ValueError, "the spec: mcpServers.a: expected an object with command or url"),
        ({"mcpServers": {"a": {"command": 3}}}, ValueError, "the spec: mcpServers.a.command: Input should be"),
        ({"mcpServers": {"a": {"url": "ftp://x"}}}, ValueError, "mcpServers.a.url is ftp://x, expected an address"),
        ({"mcpServers": {"a": {"url": "http://x", "headers": {"b": 3}}}}, ValueError, "a.headers: expected an object"),
        (
            mcp.StdioServerParameters(command="/no/such"),
            RuntimeError,
            "the MCP server /no/such gives no tools",
        ),
    ],
)
def test_a_wrong_spec_names_the_server_and_the_field(spec, kind, words):
    async def main():
        async with agents.mcp_tools(spec):
            pass

    with pytest.raises(kind, match=words):
        asyncio.run(main())
