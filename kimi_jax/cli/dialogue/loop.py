"""Takes turns: reads a line, lets the model answer, and again, until the person ends it."""

import asyncio
import contextlib
import time

from kimi_jax.cli.dialogue.calls import STOPPED, Calls
from kimi_jax.cli.dialogue.conversation import Conversation
from kimi_jax.cli.dialogue.keyboard import Keyboard
from kimi_jax.cli.dialogue.screen import Screen
from kimi_jax.cli.dialogue.speakers import Speaker
from kimi_jax.printable import printable
from kimi_jax.text import chat
from kimi_jax.text.answers import Delta

PROMPT = ">>> "


def take_turns(
    conversation: Conversation, speaker: Speaker, keyboard: Keyboard, screen: Screen, calls: Calls | None = None
) -> None:
    """Holds the conversation until /exit or the end of the input.

    calls: runs the calls of tools; without it, a line that is typed is the result of each.

    A person sees what went wrong and goes on; from a pipe it is raised, a ValueError or OSError. Ctrl-C stops an
    answer. Raises KeyboardInterrupt for a second Ctrl-C without a line between.
    """
    with asyncio.Runner() as runner:
        try:
            if calls is not None:
                conversation.tools = runner.run(calls.open())
            _take_turns(conversation, speaker, keyboard, screen, calls, runner)
        finally:
            if calls is not None:
                runner.run(calls.close())
            runner.run(speaker.aclose())


def _take_turns(
    conversation: Conversation,
    speaker: Speaker,
    keyboard: Keyboard,
    screen: Screen,
    calls: Calls | None,
    runner: asyncio.Runner,
) -> None:
    interrupted = False
    while not conversation.ended:
        call = conversation.waiting_call
        try:
            line = keyboard.read(PROMPT if call is None else f"result of {printable(call, 40)}> ")
        except KeyboardInterrupt:
            if interrupted or not keyboard.is_terminal:
                raise
            interrupted = True
            screen.note("\nCtrl-C again ends, and so do /exit and Ctrl-D")
            continue
        interrupted = False
        if line is None:
            if keyboard.is_terminal:
                screen.note("")
            return
        if not line.strip() and call is None:
            continue
        try:
            if line.startswith("/") and (said := conversation.command(line)):
                screen.note(said)
            elif not line.startswith("/") and conversation.say(line):
                # (the first Ctrl-C cancels what runs, the second raises KeyboardInterrupt)
                interrupted = not runner.run(_reply(conversation, speaker, screen, calls))
        except (ValueError, OSError) as error:
            if not keyboard.is_terminal:
                raise
            screen.note(printable(error, 400))


async def _reply(conversation: Conversation, speaker: Speaker, screen: Screen, calls: Calls | None) -> bool:
    """Lets the model answer, and again after the calls of each answer. Returns False where it was stopped."""
    turn = None if calls is None else calls.of_a_turn()
    while await _answer(conversation, speaker, screen):
        waiting = conversation.waiting_calls
        if turn is None or not waiting:
            return True
        stopped = False
        try:
            results = await turn.results(waiting)
        except asyncio.CancelledError:
            results, stopped = [STOPPED] * len(waiting), True
        for result in results:
            screen.result(result)
            conversation.say(result)
        if stopped:
            break
    return False


async def _answer(conversation: Conversation, speaker: Speaker, screen: Screen) -> bool:
    """Shows the model's answer, and adds it to the conversation. Returns False where it was stopped."""
    deltas: list[Delta] = []
    stopped, began = False, time.perf_counter()
    try:
        async with contextlib.aclosing(
            speaker.answer(conversation.messages, conversation.tools, conversation.thinking)
        ) as answer:
            async for delta in answer:
                if not deltas:
                    began = time.perf_counter()
                deltas.append(delta)
                screen.show(delta)
    except asyncio.CancelledError:
        stopped = True
    except (ValueError, OSError):
        screen.end()
        conversation.take_back()
        raise
    screen.end()
    if not deltas and stopped:
        conversation.take_back()
    else:
        conversation.add(chat.join(deltas))
    rate = ""
    if speaker.tokens and speaker.tokens > 1:
        rate = f"{speaker.tokens} tokens, {(speaker.tokens - 1) / (time.perf_counter() - began):.1f} a second"
    length = deltas and deltas[-1].finish_reason == "length"
    notes = [text for text in ("stopped" * stopped, rate, "cut at --max-new-tokens" * bool(length)) if text]
    if screen.log.is_terminal:
        screen.note("; ".join(notes) + "\n")
    return not stopped
