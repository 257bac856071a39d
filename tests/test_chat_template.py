"""Chat templates: the text against transformers' own rendering, tools and tool calls included."""

import datetime
import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import BadInput
from data.chat_template import ChatTemplate
from test_train import ROOT

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# As Qwen2.5 and Qwen3 are built: the tools in the system's message, calls and results of tools, thoughts.
QWEN = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call functions, listed within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\nAnswer with {\"name\": <function-name>, \"arguments\": <args-json-object>}.<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = r"""{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# As Llama 3.1 and 3.2 are built: the date, the tools in the first user's message, one call of a tool at a time.
LLAMA31 = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    {{- "Given the following functions, please respond with a JSON for a function call.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# What the others do not use: generation, loop controls, contents as lists of parts, every special token, documents.
ODD = r"""{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token is defined }}{{ cls_token is defined }}
{{- documents is none }}{{ tools is none }}{{ add_bos_token is defined }}
{% for message in messages %}
  {% if message.role == 'developer' %}{% continue %}{% endif %}
  {% if message.content is string %}{% set text = message.content %}
  {% else %}{% set text = message.content | map(attribute='text') | join('|') %}
  {% endif %}
  {% set shown = 'outside' %}
  {% if message.role == 'assistant' %}
    {%- generation -%}
      {% set shown = 'inside' %}{{ text }} {{ shown }}
    {%- endgeneration %}
    {% generation %}{{ {'text': text, 'b': '<é>'} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}{% endgeneration %}
  {% else %}
    {{ message.role }}: {{ text | trim }} {{ message.name | default('nobody') }}
  {% endif %}
  {{ shown }} {{ [message.role, text, message.tool_calls | default([]), {'z': 1, 'a': '<é>'}] | tojson(indent=1) }}
  {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
"""

TEMPLATES = {"smollm2": SMOLLM2, "qwen": QWEN, "llama3": LLAMA3, "llama3.1": LLAMA31, "odd": ODD}
SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "unk_token": "<unk>", "pad_token": "<pad>"}

TALK = [{"role": "user", "content": " Was ist ein Kernel?"}, {"role": "assistant", "content": "Der Kern.\n"},
        {"role": "user", "content": "Und {{ 7 * 7 }}?"}]  # fmt: skip
SYSTEM = [{"role": "system", "content": "Be brief. <b>&</b> 'quoted'"}]
CALL = {"name": "weather", "arguments": {"place": "Köln <Dom> & 'Zoo'", "days": 2, "exact": True, "at": None}}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "zwei"}]
CONVERSATIONS = {
    "talk": TALK,
    "system": SYSTEM + TALK,
    "one": TALK[:1],
    "call": [*TALK[:1], {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
             {"role": "tool", "name": "weather", "content": '{"sky": "grau"}'}, {"role": "assistant", "content": "Grau."}],
    "call-and-text": [*SYSTEM, *TALK[:1], {"role": "assistant", "content": "Moment.", "tool_calls": [{"function": CALL}]},
                      {"role": "tool", "content": "grau"}, {"role": "tool", "content": "kalt"}, *TALK[2:]],
    "calls": [*TALK[:1], {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}, {"function": CALL}]}],
    "call-without-content": [*TALK[:1], {"role": "assistant", "tool_calls": [{"function": CALL}]}, *TALK[2:]],
    "nothing": [*TALK[:1], {"role": "assistant", "content": None, "tool_calls": None}],
    "parts": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}],
    "thought": [*TALK[:1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nJa.", "reasoning_content": None}],
    "reasoning": [*TALK, {"role": "assistant", "content": "Ja.", "reasoning_content": "hm"}],
    "developer": [{"role": "developer", "content": "x"}, *TALK * 3],
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather <in> a place & more: Wetter für Köln",
                 "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                                "required": ["place"]}},
}  # fmt: skip


def theirs(source, messages, **more):
    """The text of transformers, None where its template fails."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "data/base/tokenizer.json"), **SPECIAL)
    try:
        return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **more)
    except Exception:
        return None


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]], ids=["", "tool", "tools"])
def test_the_text_is_that_of_transformers_or_a_refusal_where_it_fails(template, conversation, tools):
    source, messages = TEMPLATES[template], CONVERSATIONS[conversation]
    for answer in (False, True):
        expected = theirs(source, messages, tools=tools, add_generation_prompt=answer)
        if expected is None:
            with pytest.raises(BadInput, match="refuses this conversation"):
                ChatTemplate(source, SPECIAL)(messages, answer, tools)
        else:
            assert ChatTemplate(source, SPECIAL)(messages, answer, tools) == expected


def test_most_of_these_conversations_are_rendered():
    rendered = {name: [c for c, m in CONVERSATIONS.items() if theirs(t, m)] for name, t in TEMPLATES.items()}
    assert {name: len(some) for name, some in rendered.items()} == {
        "smollm2": 8, "qwen": 12, "llama3": 12, "llama3.1": 11, "odd": 12,
    }  # fmt: skip


def test_a_template_can_do_no_harm_and_its_failures_are_sentences():
    for source, why in [
        ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ raise_exception('no system here') }}", r"no system here\.$"),
        ("{% nonsense %}", "unknown tag 'nonsense'"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) | list }}", "[Rr]ange too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ]:
        with pytest.raises(BadInput, match=f"refuses this conversation: .*({why})"):
            ChatTemplate(source)(TALK)
    with pytest.raises(BadInput, match="refuses this conversation"):
        ChatTemplate(SMOLLM2)(["no message"])


def test_the_messages_stay_as_they_are():
    messages = json.loads(json.dumps(CONVERSATIONS["call"]))
    ChatTemplate(QWEN)(messages, tools=[TOOL])
    assert messages == CONVERSATIONS["call"]


def test_today_is_what_the_clock_says():
    shown = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}")(TALK)
    assert abs(datetime.date.fromisoformat(shown) - datetime.date.today()) <= datetime.timedelta(days=1)


def test_where_a_template_is_found(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None,
              "pad_token": "<pad>", "add_bos_token": True, "extra_special_tokens": ["<x>"],
              "chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "old"}]}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.from_folder(tmp_path)
    assert found.source == "old" and found.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "one"}))
    assert ChatTemplate.from_folder(tmp_path).source == "one"
    (tmp_path / "chat_template.jinja").write_text("new {{ bos_token }}")
    assert ChatTemplate.from_folder(tmp_path)(TALK) == "new <s>"
    (tmp_path / "tokenizer_config.json").unlink()
    assert ChatTemplate.from_folder(tmp_path)(TALK) == "new "


@pytest.mark.parametrize(
    "damaged", ["[", "[]", '{"chat_template": [{"name": "a", "template": "b"}]}', '{"chat_template": [1]}']
)
def test_what_cannot_be_read_is_refused(tmp_path, damaged):
    (tmp_path / "tokenizer_config.json").write_text(damaged)
    with pytest.raises(BadInput, match=r"tokenizer_config\.json is not valid"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_folder_that_transformers_saved(tmp_path, template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "data/base/tokenizer.json"), **SPECIAL)
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, tokenize=False)
    assert ChatTemplate.from_folder(tmp_path)(TALK) == expected
