"""The chat page in a real browser, against the server with a faked engine."""

import base64
import io
import json
import re
import time

import numpy as np
import pytest
from chat_page import CALL, FOUR, SEVEN, TO_GET_ONE, answer_with, browser, draw, find_browser
from PIL import Image

from kimi_jax.server import Limits
from kimi_jax.server import page as page_files

needs_browser = pytest.mark.skipif(find_browser() is None, reason=TO_GET_ONE)


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def shared(chromium):
    """Returns a page, which the tests share."""
    context = chromium.new_context(viewport={"width": 1000, "height": 800}, color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    yield opened
    context.close()


@pytest.fixture
def page(shared, served):
    """Returns the page, opened anew. `page.sent` has the bodies of its requests, `page.faults` the browser's errors."""
    served.engine.sizes.max_length = served.service.backend.max_length = 4_000
    sent, faults = [], []

    def note(request):
        if request.method == "POST":
            sent.append(json.loads(request.post_data))

    def complain(message):
        if message.type == "error":
            faults.append(message.text)

    listeners = {"request": note, "console": complain, "pageerror": lambda error: faults.append(str(error))}
    for name, listener in listeners.items():
        shared.on(name, listener)
    open_page(shared, served)
    shared.sent, shared.faults = sent, faults
    yield shared
    for name, listener in listeners.items():
        shared.remove_listener(name, listener)
    assert not faults


def open_page(page, served):
    page.goto(served.listener.url)
    page.locator("#model", has_text="kimi-toy").wait_for()


def ask(page, text):
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")


def ended(page, count=1):
    """Waits until so many answers are complete, and returns the last."""
    answer = page.locator("article.answer").nth(count - 1)
    answer.locator(".retry").wait_for()
    return answer


def findings(page):
    """Returns what axe-core calls serious or critical on the page as it is."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{one['id']}: {one['nodes'][0]['html']}"
        for one in Axe().run(page).response["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def picture_of(message):
    (url,) = (part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url")
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))


def test_the_page_comes_without_a_key_and_nothing_else_does(serve):
    served = serve(Limits(api_key="secret", hosts=None))
    for path in page_files.PATHS:
        answer = served.http.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and answer.headers["x-content-type-options"] == "nosniff"
        assert not any(name.startswith("access-control") for name in answer.headers)
    for path in ("/v1/models", "/page/", "/page/../app.py", "/page/__init__.py", "/page/%2e%2e/app.py"):
        assert served.http.get(path).status_code == 401
    assert served.http.post("/").status_code == 405


def test_the_page_needs_nothing_from_elsewhere_and_has_no_script_of_its_own():
    folder = page_files.__path__[0]
    for name in page_files.PATHS.values():
        with open(f"{folder}/{name}") as file:
            text = file.read()
        used = re.findall(r'(?:src="|from "|import\("|url\("|<link[^>]*href=")(?!data:)([^"]+)', text)
        assert {one.rsplit("/", 1)[-1] for one in used} <= set(page_files.PATHS.values())
        assert all(one.startswith(("page/", "./")) for one in used)
        for banned in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            'setTimeout("',
        ):
            assert banned not in text, (name, banned)
        assert not re.search(r"<script(?! type=\"module\" src=)|<[a-z][^>]* (?:on\w+|style)=", text)


@needs_browser
def test_an_answer_is_streamed_with_its_thinking_folded(page, served):
    served.engine.text = "Let me *see*.</think># Yes\n\nIt **rains** in `Oslo`:\n\n- one\n- two\n\n```py\nx = 1\n```"
    ask(page, "Is it raining?")
    answer = ended(page)
    assert answer.locator(".thought").text_content() == "Let me *see*." and not answer.locator(".thought").is_visible()
    assert answer.locator("summary").text_content().startswith("Thought for ")
    assert answer.locator("h3").text_content() == "Yes" and answer.locator("li").all_text_contents() == ["one", "two"]
    assert answer.locator("strong").text_content() == "rains" and answer.locator("pre").text_content() == "x = 1"
    assert page.locator("#status").text_content() == "The answer is complete."
    for part, copied in ((".code", "x = 1"), (".actions", served.engine.text.split("</think>")[1])):
        answer.locator(part).get_by_role("button", name="Copy").click()
        answer.locator(part).get_by_text("Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == copied
    assert page.sent[0]["thinking"] == {"type": "enabled"} and page.sent[0]["stream"] is True

    served.engine.text = "Instantly."
    page.get_by_text("Instant", exact=True).click()
    ask(page, "And now?")
    assert ended(page, 2).locator(".markdown").text_content() == "Instantly."
    assert page.sent[1]["thinking"] == {"type": "disabled"} and "tools" not in page.sent[1]
    assert [one["role"] for one in page.sent[1]["messages"]] == ["user", "assistant", "user"]
    assert page.sent[1]["messages"][1]["reasoning_content"] == "Let me *see*."

    page.get_by_role("button", name="Retry").click()
    ended(page, 2)
    assert page.sent[2] == page.sent[1]
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0 and page.locator("#welcome").is_visible()


@needs_browser
def test_stop_ends_the_answer_and_its_row(page, served):
    served.engine.answer, served.engine.pause = lambda request: lambda tokens: 40, 0.005
    page.get_by_text("Instant", exact=True).click()
    ask(page, "Go on for ever")
    page.locator(".markdown").wait_for()
    page.get_by_role("button", name="Stop").click()
    assert ended(page).locator(".mark").text_content() == "Stopped."
    end = time.monotonic() + 5
    while not served.engine.closed_streams:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(served.engine.closed_streams[0].tokens) < 3_000
    served.engine.answer, served.engine.pause, served.engine.text = None, 0.0, "Well"
    ask(page, "Enough")
    ended(page, 2)
    assert page.sent[1]["messages"][1]["content"].startswith(served.engine.processor.tokenizer.decode([40]))


@needs_browser
def test_a_call_is_run_by_the_page_and_its_result_goes_back(page, served):
    call = CALL.format(name="add", arguments='{"a": 17, "b": 25}')
    answer_with(served.engine, f"I add.</think>{call}", "I know.</think>The sum is 42.")
    page.get_by_role("button", name="What is 17 + 25?").click()
    answer = ended(page)
    card = answer.locator(".call")
    assert card.locator("b").text_content() == "add" and card.locator("output").text_content() == "42"
    assert answer.locator(".markdown").text_content() == "The sum is 42."
    asked, result = page.sent[1]["messages"][1:]
    assert asked["tool_calls"][0]["id"] == "functions.add:0" and asked["reasoning_content"] == "I add."
    assert result == {"role": "tool", "tool_call_id": "functions.add:0", "content": "42"}
    results = page.evaluate(
        """() => import("/page/tools.js").then(({result}) => [["add", "{"], ["add", '{"a": "1", "b": 2}'], ["x", "{}"],
        ["add", "null"], ["add", '{"a": 9007199254740991, "b": 9007199254740991}']].map((call) => result(...call)))"""
    )
    assert all(one.startswith("error: ") for one in results[:4]) and results[4] == "18014398509481982"


@needs_browser
def test_pictures_are_sent_as_they_are_chosen_pasted_or_dropped(page, served):
    data = io.BytesIO()
    Image.new("RGB", (56, 28), "red").save(data, "PNG")
    served.engine.text = "</think>Red."
    page.locator("#file").set_input_files([{"name": "red.png", "mimeType": "image/png", "buffer": data.getvalue()}])
    page.locator("#pictures img").wait_for()
    give = """([kind, bytes]) => {
        const transfer = new DataTransfer();
        const data = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0));
        transfer.items.add(new File([data], "p.png", {type: "image/png"}));
        const options = {bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer};
        const Kind = kind === "drop" ? DragEvent : ClipboardEvent;
        document.getElementById("question").dispatchEvent(new Kind(kind, options));
    }"""
    for count, kind in enumerate(("paste", "drop"), start=2):
        page.evaluate(give, [kind, base64.b64encode(data.getvalue()).decode()])
        page.locator("#pictures li").nth(count - 1).wait_for()
    for _ in range(2):
        page.get_by_role("button", name="Remove p.png").first.click()
    page.locator("#file").set_input_files([{"name": "no.png", "mimeType": "image/png", "buffer": b"no picture"}])
    page.get_by_text("no.png is no picture that can be sent").wait_for()
    ask(page, "Which colour?")
    ended(page)
    assert page.locator(".question img").count() == 1 and len(served.engine.requests) == 1
    assert picture_of(page.sent[0]["messages"][0]).getpixel((3, 3)) == (255, 0, 0)


@needs_browser
def test_a_drawing_becomes_digits_of_the_kind_that_the_small_model_reads(page, served):
    served.engine.text = "</think>47"
    page.get_by_role("button", name="Draw a number").click()
    draw(page, 0, FOUR)
    draw(page, 2, SEVEN)
    page.get_by_role("button", name="Add drawing").click()
    page.locator("#pictures img").wait_for()  # the dialog closes a moment after the click
    page.locator("#question").press("Enter")
    ended(page)
    grey = np.asarray(picture_of(page.sent[0]["messages"][0]).convert("L"))
    assert grey.shape == (28, 84)
    four, nothing, seven = np.split(grey, 3, axis=1)
    assert (nothing == 255).all() and four.min() < 60 and seven.min() < 60
    edge = np.ones((28, 28), bool)
    edge[2:-2, 2:-2] = False
    assert (four[edge] == 255).all() and (four[2:6] < 128).any() and (four[-6:-2] < 128).any()
    assert (four[2:10, 2:8] > 200).all() and (seven[-8:-2, 18:] > 200).all()  # where no stroke is

    levels = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    enlarged = page.evaluate(
        "(levels) => import('/page/drawing.js').then((m) => [...m.enlarge(levels, 24)])", levels.ravel().tolist()
    )
    expected = np.clip(np.asarray(Image.fromarray(levels).resize((24, 24), Image.Resampling.BICUBIC)), 0, 1)
    np.testing.assert_allclose(np.reshape(enlarged, (24, 24)), expected, atol=1e-5)


HOSTILE = """<script>window.ran = 1</script><img src=x onerror="window.ran = 2">

# <svg onload="window.ran = 3">

[a](javascript:window.ran=4) [b](data:text/html,x) [c](https://u:p@x.org) [ok **d**](https://example.org/?q=<b>)

![leak](https://example.org/secret.png)

| <b>x</b> | y |
| --- | --- |
| <iframe srcdoc="<script>top.ran=5</script>"> | `<i>` |

```"><script>window.ran = 6</script>
<script>window.ran = 7</script>
```
"""


@needs_browser
def test_nothing_that_a_model_writes_runs_or_loads(page, served):
    fetched = []
    page.on("request", lambda request: fetched.append(request.url))
    call = CALL.format(name="<img src=x onerror=ran=8>", arguments='{"a": "<script>ran = 9</script>"}')
    answer_with(served.engine, f"<script>ran = 10</script></think>{HOSTILE}{call}", "</think>" + HOSTILE)
    ask(page, "<script>window.ran = 11</script>")
    answer = ended(page)
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert page.locator("#messages").locator("script, img, iframe, svg, b:not(.call b), i").count() == 0
    links = answer.locator(".markdown").first.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org/?q=%3Cb%3E",
        "https://example.org/secret.png",
    ]
    assert all("noopener" in link.get_attribute("rel") for link in links.all())
    assert "<script>window.ran = 7</script>" in answer.locator("pre").first.text_content()
    assert all(url.startswith(served.listener.url) for url in fetched)
    assert page.evaluate("() => { try { document.body.innerHTML = '<b>x</b>'; return 0 } catch { return 1 } }") == 1
    page.faults.clear()  # the browser reports that attempt
    seconds = page.evaluate(
        """() => import("/page/markdown.js").then(({showMarkdown}) => { const start = performance.now();
        const pieces = ["[", "*a ", "**", "_a", "`", "> ", "- ", "|", "[](", "http://", "#", "h.", "a](", "~~", " # "];
        for (const one of pieces)
            showMarkdown(document.createElement("div"), one.repeat(20000));
        return (performance.now() - start) / 1000; })"""
    )
    assert seconds < 10  # each takes milliseconds, where time grows with the square it takes minutes


@needs_browser
def test_what_goes_wrong_is_said_in_words(page, served):
    engine = served.engine
    engine.text = "</think>" + "long " * 50
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=shorter(route.request)), times=1)
    ask(page, "Hello")
    assert "limit of its length" in ended(page).locator(".mark").text_content()

    def retried(said):
        page.get_by_role("button", name="Retry").click()
        page.locator(".mark", has_text=said).wait_for()

    engine.full = True
    retried("Too many requests at the moment")
    engine.full = False
    engine.error = "out of memory at /secret"
    retried("The server failed to answer this request")
    engine.error = None
    served.service.stopping = True
    retried("The server cannot answer now: The server is stopping. Try again in 5 seconds.")
    served.service.stopping = False
    page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    retried("The server cannot be reached")
    cut = 'data: {"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": null}]}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=cut), times=1)
    retried("The connection was lost before the answer was complete")
    assert page.locator(".markdown").text_content() == "Half"
    engine.text = "</think>Well."
    page.get_by_role("button", name="Retry").click()
    page.locator(".markdown", has_text="Well.").wait_for()
    page.faults[:] = [fault for fault in page.faults if not fault.startswith("Failed to load resource")]


def shorter(request):
    return json.dumps(json.loads(request.post_data) | {"max_tokens": 20})


@needs_browser
def test_a_key_is_asked_for_and_kept_in_the_tab_alone(chromium, serve):
    served = serve(Limits(api_key="secret", hosts=None))
    served.engine.text = "</think>Hello."
    page = chromium.new_page()
    page.goto(served.listener.url)
    field = page.get_by_label("Key", exact=True)
    field.fill("secret")
    page.keyboard.press("Enter")
    page.locator("#model", has_text="kimi-toy").wait_for()
    ask(page, "Hi")
    assert ended(page).locator(".markdown").text_content() == "Hello."
    assert page.evaluate("[document.cookie, localStorage.length, sessionStorage.getItem('key')]") == ["", 0, "secret"]
    page.close()


@needs_browser
def test_it_is_used_by_keyboard_alone(page, served):
    served.engine.text = "</think>Hello."
    page.keyboard.type("First line")  # the message has the focus from the start
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    ended(page)
    assert page.sent[0]["messages"] == [{"role": "user", "content": "First line\nsecond line"}]
    assert page.evaluate("document.activeElement.id") == "question"
    served.engine.answer, served.engine.pause = lambda request: lambda tokens: 40, 0.005
    page.keyboard.type("Again")
    for _ in range(5):  # the modes are one stop
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Enter")
    page.locator("article.answer").nth(1).wait_for()
    page.keyboard.press("Escape")
    assert ended(page, 2).locator(".mark").text_content() == "Stopped."
    page.reload()
    page.locator(".skip").focus()
    assert page.locator(".skip").bounding_box()["y"] >= 0


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1200, "light")])
def test_axe_finds_nothing_serious(page, served, width, scheme):
    page.set_viewport_size({"width": width, "height": 740})
    page.emulate_media(color_scheme=scheme)
    page.locator(f'html[data-theme="{scheme}"]').wait_for(state="attached")  # it is told a moment later
    found = findings(page)
    answer_with(
        served.engine,
        "I add.</think>" + CALL.format(name="add", arguments='{"a": 1, "b": 2}'),
        "See.</think># Sum\n\n[link](https://example.org) `x`\n\n> quote\n\n```py\nx = 1\n```\n\n|a|b|\n|-|-|\n|1|2|\n",
    )
    page.locator("#calculator").check()
    ask(page, "What is 1 + 2?")
    answer = ended(page)
    answer.locator("summary").first.click()
    found += findings(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Draw a picture").click()
    found += findings(page)
    assert page.locator("#drawing").bounding_box()["width"] <= width
    page.keyboard.press("Escape")
    page.get_by_role("button", name="API key").click()
    found += findings(page)
    page.keyboard.press("Escape")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Dark colours").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.get_by_role("button", name="Dark colours").click()
    page.evaluate("sessionStorage.clear()")
    assert found == []
