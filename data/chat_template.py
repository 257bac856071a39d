"""Turn conversations into the text format that an instruction-tuned model was trained on.

A checkpoint's chat template is a Jinja program. It runs in Jinja's sandbox with the same variables and functions as in
transformers. The text equals that of `tokenizer.apply_chat_template`.
"""

import json
import re
from datetime import datetime
from functools import cache

from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import BadInput
from data.corpus import Conversation
from data.special_tokens import read_templates, special_tokens


class ChatTemplate:
    """text = template(messages): messages [{"role": "system", "user", "assistant" or "tool", "content": text, ...}]."""

    def __init__(self, source, special=None):
        """source: Jinja text, or {"default": Jinja text, "tool_use": Jinja text for conversations with tools, ...}.

        special: variables for it, {"bos_token": "<s>", ...}.
        """
        self.source = source
        self.special = special or {}

    @classmethod
    def from_folder(cls, folder):
        """The template of a model, or None, as for a base model. BadInput if it cannot be read."""
        source = read_templates(folder)
        if source:
            names, _ = special_tokens(folder)
            return cls(source, names)

    def __call__(self, messages, answer=False, tools=None, now=None):
        """The `Conversation`. answer: continue it up to the beginning of the assistant's next message.

        tools: JSON schemas of functions that the model may call; now: a datetime instead of the current one. BadInput
        if the template refuses the conversation.
        """
        source = self.source
        try:
            if isinstance(source, dict):
                source = source["tool_use" if tools is not None and "tool_use" in source else "default"]
            for tool in tools or []:
                if not isinstance(tool, dict):
                    raise TypeError("its tools are no list of JSON objects")
            text = program(source).render(
                messages=[prepared(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=answer,
                strftime_now=(now or datetime.now()).strftime,  # some templates mention today's date
                raise_exception=raise_exception,
                **self.special,
            )
            return Conversation(text)
        except Exception as error:  # a foreign program may fail in any way
            raise BadInput(
                f"the model's chat template refuses this conversation: {str(error).rstrip('.') or repr(error)}."
            ) from None


def prepared(message):
    """A message for templates: without null values, and with any reasoning under the usual names."""
    # A content of null, as in a tool call, would become the text "None".
    message = {key: value for key, value in message.items() if value is not None}
    for name in "reasoning_content", "thinking", "reasoning":  # data sets differ; the first one counts
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
    # {% generation %} is a tag of transformers that marks the model's own words. {% with %} has no effect here.
    return sandbox.from_string(re.sub(r"({%[-+]?\s*(end)?)generation\b", r"\1with", source))


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as Python writes it. (Jinja's own filter sorts keys, and escapes <, > and & for web pages.)"""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    """Templates call this to refuse a conversation, for example if its roles do not alternate."""
    raise ValueError(message)
