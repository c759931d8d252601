"""Bodies with any JSON in any field: an answer, or a refusal in words, and never a fault of the server."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAME = "kimi-toy"
WORDS = [
    "user",
    "assistant",
    "tool",
    "text",
    "image_url",
    "function",
    "tool_use",
    "json_schema",
    "f",
    "enabled",
    "auto",
]
KEYS = [
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "url",
    "name",
    "id",
    "tool_calls",
    "function",
    "arguments",
    "tool_call_id",
    "partial",
    "reasoning_content",
    "parameters",
    "strict",
    "properties",
    "schema",
    "json_schema",
    "thinking",
    "keep",
    "input_schema",
    "input",
    "source",
    "data",
    "media_type",
    "tool_use_id",
    "budget_tokens",
    "format",
    "choice",
    "regex",
]
PLAIN = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-3, 3) | st.sampled_from(WORDS) | st.text(max_size=5)
)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": JSON},
    optional=dict.fromkeys(("tool_calls", "tool_call_id", "name", "partial", "reasoning_content"), JSON),
)
FUNCTION = st.fixed_dictionaries({"name": PLAIN}, optional={"parameters": JSON, "strict": PLAIN, "description": PLAIN})
TOOL = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}) | JSON
BOTH = {"temperature": PLAIN, "top_p": PLAIN, "top_k": PLAIN, "tool_choice": JSON, "thinking": JSON}
BODIES = {
    "/v1/chat/completions": {
        **BOTH,
        **{"tools": st.lists(TOOL, max_size=2), "response_format": JSON, "structured_outputs": JSON, "seed": PLAIN},
        **{"chat_template_kwargs": JSON, "stop": JSON, "n": PLAIN, "top_logprobs": PLAIN, "logprobs": PLAIN},
    },
    "/v1/messages": {
        **BOTH,
        **{"tools": st.lists(JSON, max_size=2), "system": JSON, "stop_sequences": JSON, "output_config": JSON},
    },
    "/v1/completions": {"temperature": PLAIN, "stop": JSON, "n": PLAIN, "logprobs": PLAIN, "echo": PLAIN},
}


@pytest.mark.filterwarnings("ignore:tools cannot be declared")
@pytest.mark.parametrize("path", BODIES)
def test_any_json_is_answered_or_refused_in_words(served, path):
    served.engine.text = "</think>Hi"

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(MESSAGE, max_size=3),
        st.fixed_dictionaries({}, optional=BODIES[path]),
        st.lists(PLAIN, max_size=3) | PLAIN,
        st.booleans(),
    )
    def check(messages, fields, prompt, stream):
        body = {"model": NAME, "max_tokens": 5, "messages": messages, "prompt": prompt, "stream": stream} | fields
        answer = served.http.post(path, json=body)
        assert answer.status_code in (200, 400), answer.text
        assert "the server failed" not in answer.text
        if answer.status_code == 400:
            assert answer.json()["error"]["message"]

    check()
