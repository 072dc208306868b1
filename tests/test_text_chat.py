"""Chat messages are refused with every fault named, and rendered as Transformers renders them."""

import json

import pytest

from jaxlora.errors import InvalidRequest, SetupError
from jaxlora.text.chat import ChatTemplate, parse_messages

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}\
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{- ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""

QWEN = """\
{%- if tools %}{{- '<tools>' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}{% generation %}{{- '\\n' + message.content + '<|im_end|>\\n' }}{% endgeneration %}
    {%- endif %}
    {%- if loop.index > 3 %}{%- break %}{%- endif %}
{%- endfor %}
{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be <brief> & \"kind\"."}, {"role": "user", "content": " Grüße 👋 "}],
    [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")],
]


def problem(text) -> str:
    with pytest.raises(InvalidRequest) as error:
        parse_messages(text)
    assert list(error.value.problems) == ["messages"]
    return error.value.problems["messages"]


def test_good_messages_come_back_as_they_are():
    for messages in (*CONVERSATIONS, [{"role": "user", "content": "", "name": "bob"}]):
        assert parse_messages(json.dumps(messages)) == messages
        assert parse_messages(json.dumps(messages, ensure_ascii=False).encode()) == messages


def test_every_fault_of_every_message_is_named():
    messages = [{"role": "user"}, {"role": 1, "content": ["a"]}, "hi", {"content": None}, {"role": "", "content": "x"}]
    said = problem(json.dumps(messages))
    for fault in (
        "[0] has no `content`",
        "[1].role is a number",
        "[1].content is a list",
        "[2] is a string",
        "[3] has no `role`",
        "[3].content is null",
        "[4].role is not",
    ):
        assert fault in said


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not valid JSON"),
        ("hello", "not valid JSON"),
        ('[{"role": "user", "content": "x"}', "not valid JSON"),
        (b'[{"role": "user", "content": "\xff"}]', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "is empty"),
        ("{}", "is an object"),
        ("null", "is null"),
        ("3", "is a number"),
        ('[{"role": "user", "content": "\\ud83d"}]', "[0].content holds half of a surrogate pair"),
        ('[{"role": "user\\nx<|im_end|>", "content": "x"}]', "[0].role is not"),
    ],
)
def test_malformed_messages_are_explained(text, fault):
    assert fault in problem(text)


def test_a_flood_of_faults_stays_short():
    said = problem(json.dumps([{}] * 10_000))
    assert "and 19980 more" in said and len(said) < 1000


@pytest.mark.parametrize("source", [LLAMA_2, QWEN], ids=["llama-2", "qwen"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(source, messages, prompt):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    want = theirs.render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt, **special)
    want = want[0] if isinstance(want, tuple) else want
    assert ChatTemplate(source, special).render(messages, prompt) == want[0]


def test_what_a_template_refuses_is_a_fault_of_the_messages():
    with pytest.raises(InvalidRequest, match="^messages: .*roles must alternate"):
        ChatTemplate(LLAMA_2, {}).render([{"role": "assistant", "content": "x"}], True)
    with pytest.raises(InvalidRequest, match="^messages: .*'bos_token' is undefined"):
        ChatTemplate(LLAMA_2, {}).render([{"role": "user", "content": "x"}], True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_can_not_leave_its_sandbox(source):
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], True)


def test_a_broken_template_is_found_at_start():
    with pytest.raises(SetupError, match="chat template"):
        ChatTemplate("{% if %}", {})
