"""`kimi-jax chat` without a model: on a pipe and in a terminal, with an engine in the process and with a server."""

import asyncio
import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from calls import refused
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len

import checkpoints
import kimi_jax
from kimi_jax import agents
from kimi_jax.cli import main, partner
from kimi_jax.cli.dialogue.conversation import Conversation
from kimi_jax.cli.dialogue.screen import BAR, WrappedText
from kimi_jax.runtime.drafts import PromptLookup
from kimi_jax.text.answers import Parsed

CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{"a": 3, "b": 4}<|tool_call_end|><|tool_calls_section_end|>'
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """Returns a function that puts lines on standard input, which is no terminal then."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return lambda *lines: monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def engine(processor, monkeypatch):
    """Returns the engine that `kimi-jax chat` makes of a folder: a fake one."""
    engine = FakeEngine(processor)
    engine.failure, engine.close = None, lambda: None
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: None)

    def make(model, **options):
        engine.options = options
        return engine

    monkeypatch.setattr("kimi_jax.engine.Engine", make)
    return engine


def prompts(engine):
    return [engine.processor.tokenizer.decode(request.tokens) for request in engine.requests]


# --- the engine in this process -----------------------------------------------------------------------------------


def test_a_piped_conversation_goes_on_with_what_was_said(engine, toy_folder, typed, capsys):
    typed("One?", "", "Two?", "/exit", "never read")
    engine.text = "I think.</think>It is so."
    assert main(["chat", str(toy_folder), "--system", "Be brief.", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == "It is so.\n" * 2  # reasoning goes to a terminal alone
    assert err == ""
    first, second = prompts(engine)
    assert "Be brief." in first and first.endswith("<think>") and "One?" in first
    assert "It is so." in second and "Two?" in second and "One?" in second
    assert [request.seed for request in engine.requests] == [3, 3]
    assert {request.max_new_tokens for request in engine.requests} == {600 - len(r.tokens) for r in engine.requests}


def test_the_mode_chooses_the_prompt_and_how_tokens_are_drawn(engine, toy_folder, typed, capsys):
    typed("One?", "/mode instant", "Two?", "/mode", "Three?")
    engine.text = "Yes."
    assert main(["chat", str(toy_folder)]) == 0
    thinking = [prompt.endswith("<think>") for prompt in prompts(engine)]
    assert thinking == [True, False, True]
    drawn = [(request.sampling.temperature, request.sampling.top_p) for request in engine.requests]
    assert drawn == [(1.0, 0.95), (0.6, 0.95), (1.0, 0.95)]
    assert len({request.seed for request in engine.requests}) == 3
    engine.requests.clear()
    typed("One?")
    assert main(["chat", str(toy_folder), "--greedy", "--no-thinking", "--max-new-tokens", "2"]) == 0
    assert engine.requests[0].sampling.temperature == 0 and engine.requests[0].max_new_tokens == 2


def test_drafts_are_the_engines(engine, toy_folder, typed, tmp_path, monkeypatch, capsys):
    head = object()
    monkeypatch.setattr(checkpoints, "load_head", lambda path, *_, **__: (path, head))
    for draft, made in (("prompt-lookup", PromptLookup), (str(tmp_path), (tmp_path, head)), (None, None)):
        typed("One?")
        flags = ["--draft", draft, "--draft-tokens", "3"] if draft else []
        assert main(["chat", str(toy_folder), *flags]) == 0
        assert (engine.options["draft"], engine.options["draft_tokens"]) == (made, 3 if draft else 4)


def test_a_call_is_shown_and_the_next_line_is_its_result(engine, toy_folder, typed, tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps([ADD]))
    typed("3 + 4?", "7", f"/save {tmp_path / 'saved.json'}", "/reset", "Again?")
    answers = iter(["Easy.</think>I ask." + CALL, "</think>Seven.", "</think>Seven."])

    def answer(request):
        ids = engine.processor.tokenizer.encode(next(answers), allow_special=True)
        return lambda tokens: ids[len(tokens)] if len(tokens) < len(ids) else None

    engine.answer = answer
    assert main(["chat", str(toy_folder), "--tools", str(tmp_path / "tools.json")]) == 0
    assert capsys.readouterr().out == 'I ask.\n→ add {"a": 3, "b": 4}\nSeven.\nSeven.\n'
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert saved["tools"] == [ADD]
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert saved["messages"][1]["reasoning_content"] == "Easy."
    call = saved["messages"][1]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"a": 3, "b": 4}
    assert saved["messages"][2] == {"role": "tool", "tool_call_id": call["id"], "content": "7"}
    assert "Seven" in prompts(engine)[1] or "7" in prompts(engine)[1]
    assert "3 + 4?" not in prompts(engine)[2]


def test_tools_run_between_a_line_and_its_answer(engine, toy_folder, typed, tmp_path, monkeypatch, capsys):
    (tmp_path / "sums.py").write_text("def add(a: int, b: int) -> int:\n    return a + b\n")
    opened = []

    @contextlib.asynccontextmanager
    async def mcp_tools(spec):
        opened.append(asyncio.current_task())
        yield [agents.Tool("look", "Looks.", {"type": "object"}, lambda: "", asks=True)]
        opened.append(asyncio.current_task())

    monkeypatch.setattr("kimi_jax.agents.mcp_tools", mcp_tools)
    (tmp_path / "servers.json").write_text('{"mcpServers": {}}')
    flags = ["--tool", str(tmp_path / "sums.py"), "--mcp", str(tmp_path / "servers.json")]
    for more, result in ((["--yes"], "7"), ([], "Error: add runs only where a person says yes, and nobody can be")):
        typed("3 + 4?", f"/save {tmp_path / 'saved.json'}", "Again?")
        answers = iter(["</think>" + CALL, "</think>" + CALL, "</think>So.", "</think>" + CALL, "</think>So."])

        def answer(request, answers=answers):
            ids = engine.processor.tokenizer.encode(next(answers), allow_special=True)
            return lambda tokens: ids[len(tokens)] if len(tokens) < len(ids) else None

        engine.answer = answer
        assert main(["chat", str(toy_folder), *flags, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line[:1] for line in lines] == ["→", "←", "→", "←", "S", "→", "←", "S"]
        assert all(line.startswith(f"← {result}") for line in lines if line[0] == "←")
        saved = json.loads((tmp_path / "saved.json").read_text())
        assert [one["function"]["name"] for one in saved["tools"]] == ["add", "look"]
        roles = [message["role"] for message in saved["messages"]]
        assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert len(opened) == 4 and opened[0] is opened[1]  # connections are closed by the task that opened them
    assert main(["chat", str(toy_folder), *flags, "--tools", "tools.json"]) == 1
    assert "--tools: results are typed" in capsys.readouterr().err


def test_a_picture_goes_with_the_next_message_alone(engine, toy_folder, typed, tmp_path, capsys):
    Image.new("RGB", (56, 28)).save(tmp_path / "dot.png")
    typed(f"/image {tmp_path / 'dot.png'}", "What?", "And?")
    engine.text = "</think>Black."
    assert main(["chat", str(toy_folder)]) == 0
    assert engine.requests[0].media.grids.tolist() == [[1, 2, 4]] == engine.requests[1].media.grids.tolist()
    assert prompts(engine)[0].count("<|media_begin|>") == prompts(engine)[1].count("<|media_begin|>") == 1
    assert "dot.png, 56 x 28" in capsys.readouterr().err


def test_without_a_folder_the_small_model_of_the_package_answers(engine, toy_folder, typed, monkeypatch, capsys):
    small = SimpleNamespace(NAMES=("k25-digits", "kimi-linear-small"), ADD_TOOL=ADD, path=lambda name: toy_folder)
    monkeypatch.setitem(sys.modules, "kimi_jax.small", small)
    monkeypatch.setattr(kimi_jax, "small", small, raising=False)
    engine.text = "</think>Yes."
    for flags, has_tool in (((), True), (("--model", "digits"), True), (("--model", "kimi-linear-small"), False)):
        typed("Hello")
        assert main(["chat", *flags]) == 0
        assert capsys.readouterr().out == "Yes.\n"
        assert ("tool_declare" in prompts(engine)[-1]) is has_tool
    line = refused(capsys, main(["chat", "--model", "digit"]))
    assert line == "kimi-jax: small model 'digit': did you mean k25-digits? There are k25-digits, kimi-linear-small"


def test_from_a_pipe_what_goes_wrong_ends_the_command(engine, toy_folder, typed, tmp_path, capsys):
    for line, reason in (("/sing", "no command /sing; /help"), ("/sav x", "did you mean /save?")):
        typed(line)
        assert reason in refused(capsys, main(["chat", str(toy_folder)]))
    typed("/image gone.png")
    assert "gone.png: no such file" in refused(capsys, main(["chat", str(toy_folder)]))
    typed("1 " * 700)
    assert "600" in refused(capsys, main(["chat", str(toy_folder)]))
    engine.error = "the logits after 2 new tokens are not finite"
    typed("Hello")
    assert "not finite" in refused(capsys, main(["chat", str(toy_folder)]))
    assert "none: no such folder" in refused(capsys, main(["chat", str(tmp_path / "none")]))
    assert "expected a folder" in refused(capsys, main(["chat", "gs://bucket/model"]))
    assert "--model goes without" in refused(capsys, main(["chat", str(toy_folder), "--model", "digits"]))
    line = refused(capsys, main(["chat", "http://host", "--dtype", "float32", "--draft", "prompt-lookup"]))
    assert "--draft, --dtype: for a model in this process" in line


# --- a server -----------------------------------------------------------------------------------------------------


def test_a_server_is_talked_to(served, typed, tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps([ADD]))
    typed("3 + 4?", "7", "Sure?")
    served.engine.text = "Easy.</think>I ask." + CALL
    tools = ["--tools", str(tmp_path / "tools.json")]
    assert main(["chat", served.listener.url, "--temperature", "0.5", "--top-k", "3", *tools]) == 0
    shown = 'I ask.\n→ add {"a": 3, "b": 4}\n'
    assert capsys.readouterr().out.startswith(shown * 2)
    sampling = served.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.95)
    first, second, *_ = prompts(served.engine)
    assert first.endswith("<think>") and "7" in second
    typed("Hello")
    assert main(["chat", f"{served.listener.url}/v1", "--no-thinking", "--model", "other-name"]) == 0
    assert not prompts(served.engine)[-1].endswith("<think>")
    capsys.readouterr()
    typed("Hello")
    line = refused(capsys, main(["chat", served.listener.url, "--model", "gone"]))
    assert served.listener.url in line and "gone" in line
    typed("Hello")
    assert "onnection" in refused(capsys, main(["chat", "http://127.0.0.1:1"]))


def test_without_the_client_a_server_is_refused_in_one_line(monkeypatch, typed, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    typed("Hello")
    assert "pip install 'kimi-jax[chat]'" in refused(capsys, main(["chat", "http://127.0.0.1:1"]))


def test_a_url_without_a_path_is_that_of_the_api():
    assert (
        partner.server_address("http://host:8000/")
        == partner.server_address("http://host:8000")
        == "http://host:8000/v1"
    )
    assert partner.server_address("https://host/api/v2") == "https://host/api/v2"


# --- the conversation ---------------------------------------------------------------------------------------------


def test_what_was_stopped_or_failed_leaves_a_conversation_that_can_go_on():
    conversation = Conversation()
    conversation.say("One?")
    conversation.add(Parsed("So", None, [{"id": "a", "function": {}}], "stop"))  # stopped amid a call
    assert conversation.waiting_call is None and "tool_calls" not in conversation.messages[-1]
    conversation.say("Two?")
    conversation.take_back()
    assert [message["content"] for message in conversation.messages] == ["One?", ""]
    conversation.command("/system Be brief.")
    conversation.command("/system")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_a_file_that_cannot_be_written_is_not_half_there(tmp_path):
    conversation = Conversation()
    (tmp_path / "chat.json").write_text("kept")
    conversation.messages.append({"role": "user", "content": object()})
    with pytest.raises(TypeError):
        conversation.command(f"/save {tmp_path / 'chat.json'}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        conversation.command(f"/save {tmp_path / 'gone' / 'chat.json'}")


# --- the screen ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from("ab \n漢é"), max_size=80).map("".join),
    st.integers(1, 20),
    st.integers(10, 40),
    st.sampled_from(["", BAR]),
)
def test_lines_break_between_words_however_the_text_comes(text, step, width, margin):
    wrapped = WrappedText(lambda: width, margin)
    shown = "".join(wrapped.push(text[i : i + step]) for i in range(0, len(text), step)) + wrapped.finish()
    whole = WrappedText(lambda: width, margin)
    assert shown == whole.push(text) + whole.finish()
    lines = shown.split("\n")
    assert all(cell_len(line) <= max(width, 10 + len(margin)) for line in lines)
    assert all(line.startswith(margin) for line in lines if line)
    assert "".join("".join(line.removeprefix(margin).split()) for line in lines) == "".join(text.split())


def test_a_short_word_is_never_cut():
    wrapped = WrappedText(lambda: 12, "")
    text = "seven words that are shorter than that"
    shown = wrapped.push(text) + wrapped.finish()
    assert shown.split() == text.split() and max(map(len, shown.split("\n"))) <= 12 and shown.count("\n") == 3


# --- a terminal ---------------------------------------------------------------------------------------------------

CHILD = """
import asyncio, fcntl, pathlib, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C comes to who has the terminal
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
from kimi_jax.cli.dialogue.conversation import Conversation
from kimi_jax.cli.dialogue.keyboard import Keyboard
from kimi_jax.cli.dialogue.loop import take_turns
from kimi_jax.cli.dialogue.screen import Screen
from kimi_jax.cli.console import console
from kimi_jax.text.answers import Delta

class Slow:
    tokens = 7
    async def answer(self, messages, tools, thinking):
        yield Delta(reasoning="some thoughts that take more than one line of a narrow terminal")
        yield Delta(content="word " * 9)
        if messages[-1]["content"] == "slow":
            await asyncio.sleep(60)
        yield Delta(content="end")
        yield Delta(finish_reason="stop")
    async def aclose(self):
        print("closed")

keyboard = Keyboard(pathlib.Path(sys.argv[1]))
try:
    take_turns(Conversation(), Slow(), keyboard, Screen(console(), console(stderr=True)))
finally:
    keyboard.save()
"""


class Terminal:
    """A terminal of `columns` in which a command runs."""

    def __init__(self, columns, *command):
        self.screen = ""
        self.fd, end = pty.openpty()
        environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "INPUTRC": "/dev/null"}
        streams = {"stdin": end, "stdout": end, "stderr": end}
        self.process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
        os.close(end)

    def wait(self, pattern, seconds=60):
        """Returns what comes until `pattern` is there."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.screen)) is None:
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], self.screen
            self.screen += os.read(self.fd, 4096).decode().replace("\r\n", "\n")
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)

    def type(self, text):
        if text == "\x03":
            time.sleep(0.3)  # a prompt is shown a moment before it listens to keys
        os.write(self.fd, text.encode())

    def exit_code(self):
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:  # Linux's answer where the other end is closed
            pass
        os.close(self.fd)
        return self.process.wait(60)


def test_in_a_terminal_ctrl_c_stops_an_answer_and_twice_ends(tmp_path):
    history = tmp_path / "state" / "history"
    terminal = Terminal(30, sys.executable, "-c", CHILD, str(history))
    terminal.wait(">>> ")
    terminal.type("fast\n")
    shown = terminal.wait(">>> ")
    lines = [line for line in shown.splitlines() if line.startswith(BAR)]
    assert len(lines) == 3 and max(map(len, lines)) <= 30
    assert "\n\nword word word word word word\nword word word end\n" in shown  # apart from the reasoning
    assert "7 tokens, " in shown
    terminal.type("/nonsense\n")
    assert "there is no command /nonsense" in terminal.wait(">>> ")
    terminal.type("slow\n")
    terminal.wait("word\nword word ")  # the last word's end is not known yet
    terminal.type("\x03")
    assert "stopped" in terminal.wait(">>> ")
    terminal.type("fast\n")
    assert "end" in terminal.wait(">>> ")
    terminal.type("\x03")
    assert "Ctrl-C again ends" in terminal.wait(">>> ")
    terminal.type("\x03")
    assert terminal.exit_code() != 0
    assert history.read_text().splitlines() == ["fast", "/nonsense", "slow", "fast"]
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_d_and_exit_end_it(tmp_path):
    for last in ("\x04", "/exit\n"):
        terminal = Terminal(80, sys.executable, "-c", CHILD, str(tmp_path / "history"))
        terminal.wait(">>> ")
        terminal.type(last)
        assert terminal.exit_code() == 0
