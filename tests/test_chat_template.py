"""Chat templates: the text against transformers' own rendering, tools and tool calls included.

The templates in chat_templates/ are ours, each in the manner of a family of models.
"""

import datetime
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import BadInput
from data.chat_template import ChatTemplate
from test_train import ROOT

FILES = sorted(Path(__file__).parent.glob("chat_templates/*.jinja"))
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in FILES}
SMOLLM2 = TEMPLATES["smollm2"]
SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "unk_token": "<unk>", "pad_token": "<pad>"}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


def calls(*functions):
    return [{"id": f"call{i:05}", "type": "function", "function": function} for i, function in enumerate(functions)]


WEATHER = {"name": "weather", "arguments": {"place": "Köln <Dom> & 'Zoo' \"1\"", "days": 2, "exact": True, "at": None}}
AS_TEXT = {"name": "weather", "arguments": '{"place": "Köln <Dom> & \'Zoo\'", "days": 2.50}'}
NO_ARGUMENTS = {"name": "now", "arguments": {}}
PARTS = [{"type": "text", "text": "one\n"}, {"type": "text", "text": " zwei"}]
SYSTEM = {"role": "system", "content": " Be brief. <b>&</b> 'quoted' \"so\" \n"}
ASKED = user("Wetter?")
TALK = [user(" Was ist ein Kernel?"), assistant("Der Kern.\n"), user("Und {{ 7 * 7 }}?")]

CONVERSATIONS = {
    "talk": TALK,
    "system": [SYSTEM, *TALK],
    "one": [ASKED],
    "system-only": [SYSTEM],
    "long": [SYSTEM, *[user("ja 🙂\r\n\t "), assistant("  e\u0301 ü \u2028 漢字 \n\n")] * 4],
    "two-of-the-user": [user("a"), user("b"), assistant("c")],
    "answer-first": [assistant("Hallo."), user("Ja?")],
    "late-system": [user("a"), assistant("b"), SYSTEM, user("c")],
    "call": [ASKED, assistant(None, tool_calls=calls(WEATHER)), tool('{"sky": "grau"}', name="weather", tool_call_id="call00000"), assistant("Grau.")],
    "call-as-text": [SYSTEM, ASKED, assistant("Moment. ", tool_calls=calls(AS_TEXT)), tool("grau"), tool("kalt"), user("Danke")],
    "call-without-content": [ASKED, {"role": "assistant", "tool_calls": [{"function": NO_ARGUMENTS}]}, {"role": "ipython", "content": {"sky": ["grau"]}}],
    "two-calls": [ASKED, assistant("", tool_calls=calls(WEATHER, NO_ARGUMENTS)), tool("1"), tool("2"), assistant("Na.\n"), user("?")],
    "bare-call": [ASKED, assistant("", tool_calls=[WEATHER])],
    "no-calls": [ASKED, assistant("x", tool_calls=[]), user("y", name=None), assistant(None, tool_calls=None)],
    "parts": [{"role": "system", "content": PARTS}, user(PARTS), assistant(PARTS[:1]), user([])],
    "thought": [ASKED, assistant("<think>\nhm\n</think>\n\nJa."), user("?"), assistant("<think>\n\nhm, hm </think>\n\n Nein.\n")],
    "reasoning": [*TALK, assistant("Ja.", reasoning_content="\nhm\n"), user("?"), assistant("So.", reasoning_content=None)],
    "reasoning-elsewhere": [ASKED, assistant("a", reasoning="hm", thinking=None), user("?"), assistant("b", reasoning="so", thinking="na")],
    "steps": [{"role": "system", "content": "Kurz. /no_think"}, ASKED, assistant("", reasoning_content="erst", tool_calls=calls(WEATHER)), tool("grau"), assistant("", tool_calls=calls(NO_ARGUMENTS)), tool("12:00"), assistant("Ja.", reasoning_content="dann")],
    "others": [{"role": "developer", "content": "x"}, ASKED, {"role": "critic", "content": "y", "name": "Ü", "weight": 0.5}, {"role": "user"}, user("")],
}  # fmt: skip
NESTED = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather <in> a place & more: 'Wetter' für \"Köln\" 🌧",
        "parameters": {
            "type": "object", "required": ["place"],
            "properties": {
                "place": {"type": "string", "enum": ["Köln", "<b>"], "description": None},
                "days": {"type": ["integer", "null"], "default": 1.0, "minimum": -1e-7},
                "more": {"type": "array", "items": {"type": "object", "properties": {"z": {"type": "boolean"}, "a": {}}}},
            },
        },
        "return": {"type": "string", "description": "sky"},
    },
}  # fmt: skip
SMALL = {"type": "function", "function": {"name": "now", "description": "Time", "parameters": {"type": "object", "properties": {}}}}  # fmt: skip


# The text ------------------------------------------------------------------------------------------------------------


def tokenizer_of_transformers(**settings):
    return PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "data/base/tokenizer.json"), **SPECIAL, **settings)


def theirs(tokenizer, messages, **more):
    """The text of transformers, None where its template fails."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **more)
    except Exception:
        return None


# How many of the 160 cases each template refuses.
REFUSED = {"llama31": 30, "llama32": 16, "mistral": 64, "odd": 0, "qwen25": 24, "qwen3": 8, "smollm2": 40, "smollm3": 32}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_is_that_of_transformers_or_a_refusal_where_it_fails(template):
    tokenizer = tokenizer_of_transformers(chat_template=TEMPLATES[template])
    ours = ChatTemplate(TEMPLATES[template], SPECIAL)
    refused = 0
    for name, messages in CONVERSATIONS.items():
        for tools in None, [], [NESTED], [NESTED, SMALL]:
            for answer in False, True:
                expected = theirs(tokenizer, messages, tools=tools, add_generation_prompt=answer)
                if expected is None:
                    refused += 1
                    with pytest.raises(BadInput, match="refuses this conversation"):
                        ours(messages, answer, tools)
                else:
                    assert ours(messages, answer, tools) == expected, name
    assert refused == REFUSED[template]


@pytest.mark.parametrize("tools", ["x", json.dumps([SMALL]), 5, True, {"a": 1}, ["a"], [None], [[]]])
def test_tools_that_are_no_list_of_objects_are_refused(tools):
    tokenizer = tokenizer_of_transformers(chat_template=SMOLLM2)
    assert theirs(tokenizer, TALK, tools=tools) is None
    with pytest.raises(BadInput, match=r"refuses this conversation: .*(no list of JSON objects|not iterable)"):
        ChatTemplate(SMOLLM2)(TALK, tools=tools)


def test_a_template_can_do_no_harm_and_its_failures_are_sentences():
    for source, why in [
        ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ lipsum.__globals__.os }}", "unsafe"),
        ("{{ raise_exception.__globals__.json }}", "unsafe"),
        ("{{ strftime_now.__self__.year }}", "unsafe"),
        ("{{ ['']|map(attribute='__class__')|map(attribute='mro')|first }}", "unsafe"),
        ("{% include '/etc/hosts' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ messages[0].update(role='x') }}", "not safely callable|unsafe"),
        ("{{ raise_exception('No system here.') }}", r"No system here\.$"),
        ("{{ raise_exception('') }}", r"ValueError\(''\)\.$"),
        ("{% nonsense %}", "unknown tag 'nonsense'"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "[Rr]ange too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ]:
        with pytest.raises(BadInput, match=f"refuses this conversation: .*({why})"):
            ChatTemplate(source)(TALK)
    with pytest.raises(BadInput, match="refuses this conversation"):
        ChatTemplate(SMOLLM2)(["no message"])


def test_the_messages_stay_as_they_are():
    messages = json.loads(json.dumps(CONVERSATIONS["steps"]))
    ChatTemplate(TEMPLATES["qwen3"])(messages, tools=[NESTED])
    assert messages == CONVERSATIONS["steps"]


def test_today_is_what_the_clock_says():
    shown = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}")(TALK)
    assert abs(datetime.date.fromisoformat(shown) - datetime.date.today()) <= datetime.timedelta(days=1)


# Where it is ---------------------------------------------------------------------------------------------------------


def test_where_a_template_is_found(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None,
              "pad_token": "<pad>", "add_bos_token": True, "extra_special_tokens": ["<x>"], "chat_template": "one"}  # fmt: skip
    tokens = [{"content": text} for text in ("<s>", "</s>", "<pad>", "<x>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.from_folder(tmp_path)
    assert found.source == "one" and found.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "chat_template.jinja").write_text("new {{ bos_token }}")
    assert ChatTemplate.from_folder(tmp_path)(TALK) == "new <s>"
    (tmp_path / "tokenizer_config.json").unlink()
    assert ChatTemplate.from_folder(tmp_path)(TALK) == "new "


@pytest.mark.parametrize("damaged", [b"[", b"[]", b'{"chat_template": [1]}', b'{"chat_template": [{"name": "a"}]}'])
def test_what_cannot_be_read_is_refused(tmp_path, damaged):
    (tmp_path / "tokenizer_config.json").write_bytes(damaged)
    with pytest.raises(BadInput, match=r"tokenizer_config\.json is not valid"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"chat_template\.jinja is not UTF-8"):
        ChatTemplate.from_folder(tmp_path)


NAMED = {"default": SMOLLM2, "tool_use": TEMPLATES["qwen25"], "rag": TEMPLATES["odd"]}


@pytest.mark.parametrize("templates", [TEMPLATES["odd"], NAMED, {"rag": SMOLLM2}, {"default": SMOLLM2, "rag": "x"}])
@pytest.mark.parametrize("tools", [None, [], [SMALL]])
@pytest.mark.parametrize("in_files", [False, True])
def test_a_folder_that_transformers_saved(tmp_path, templates, tools, in_files):
    # In tokenizer_config.json several are a list of {"name", "template"}; otherwise each has a file.
    tokenizer_of_transformers(chat_template=templates).save_pretrained(tmp_path, save_jinja_files=in_files)
    assert in_files == bool([*tmp_path.rglob("*.jinja")])
    expected = theirs(AutoTokenizer.from_pretrained(tmp_path), TALK, tools=tools)
    ours = ChatTemplate.from_folder(tmp_path)
    if expected is None:  # several, and none of them fits
        with pytest.raises(BadInput, match="refuses this conversation: 'default'"):
            ours(TALK, tools=tools)
    else:
        assert ours(TALK, tools=tools) == expected
