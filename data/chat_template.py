"""Conversations as the text that an instruction-tuned model was trained on.

A checkpoint's chat template is a program in Jinja. It runs in Jinja's sandbox, with what transformers gives it, so that
the text is that of `tokenizer.apply_chat_template` there.
"""

import json
import re
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import BadInput
from data.corpus import read_text


class ChatTemplate:
    """text = template(messages): messages [{"role": "system", "user", "assistant" or "tool", "content": text, ...}]."""

    def __init__(self, source, special=None):
        """`source` is the Jinja text, or several {"default": text, "tool_use": text for conversations with tools, ...}.

        `special` {"bos_token": "<s>", ...} are names that it may use.
        """
        self.source = source
        self.special = special or {}

    @classmethod
    def from_folder(cls, folder):
        """That of a model, or None: a base model has none. BadInput if it cannot be read."""
        config = Path(folder, "tokenizer_config.json")
        file = Path(folder, "chat_template.jinja")
        settings = {}
        special = {}
        try:
            if config.exists():
                settings = json.loads(read_text(config))
            source = settings.get("chat_template")
            if file.exists():  # where there are both, it counts
                source = read_text(file)
            elif isinstance(source, list):  # several, by name
                source = {one["name"]: one["template"] for one in source}
            for name, token in settings.items():
                if isinstance(token, dict):  # {"content": "<s>", and its flags}
                    token = token.get("content")
                if name.endswith("_token") and isinstance(token, str):
                    special[name] = token
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{config} is not valid ({error!r}); download it again.") from None
        if source:
            return cls(source, special)

    def __call__(self, messages, answer=False, tools=None, now=None):
        """The text of a conversation; with `answer`, up to where the assistant's next message begins.

        tools: JSON schemas of the functions that the model may call; now: a datetime, what day it is (default: today).
        BadInput where the template refuses.
        """
        source = self.source
        try:
            if isinstance(source, dict):
                source = source["tool_use" if tools is not None and "tool_use" in source else "default"]
            for tool in tools or []:
                if not isinstance(tool, dict):
                    raise TypeError("its tools are no list of JSON objects")
            return program(source).render(
                messages=[prepared(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=answer,
                strftime_now=(now or datetime.now()).strftime,  # some templates tell the model what day it is
                raise_exception=raise_exception,
                **self.special,
            )
        except Exception as error:  # somebody else's program may fail in any way
            raise BadInput(
                f"the model's chat template refuses this conversation: {str(error).rstrip('.') or repr(error)}."
            ) from None


def prepared(message):
    """A message as templates read it: without what is null, its reasoning (if there is one) under the usual names."""
    # Beside a tool call, a template would write a content of null as "None".
    message = {key: value for key, value in message.items() if value is not None}
    for name in "reasoning_content", "thinking", "reasoning":  # data sets differ; the first that is there counts
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


@cache
def program(source):
    """The compiled template."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = tojson
    # {% generation %} is transformers' own and marks what the model writes: a block without effect replaces it.
    return sandbox.from_string(re.sub(r"({%[-+]?\s*(end)?)generation\b", r"\1with", source))


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Python's JSON. (Jinja's own filter sorts the keys, and escapes <, > and & for web pages.)"""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    """A template calls this to refuse a conversation, for instance one whose roles do not alternate."""
    raise ValueError(message)
