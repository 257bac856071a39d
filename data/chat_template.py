"""Conversations as the text that an instruction-tuned model was trained on.

A checkpoint's chat template is a program in Jinja. With jinja2 installed it is run, in jinja2's sandbox; without, the
two families that most models follow are written here (with the template's own default date), any other is refused.
"""

import json
import re
from pathlib import Path

from data import BadInput


class ChatTemplate:
    """text = template(messages): messages [{"role": "system", "user" or "assistant", "content": text}]."""

    def __init__(self, source, special=None):
        """`source` is the Jinja text; `special` {"bos_token": ..., "eos_token": ...} are names that it may use."""
        self.source, self.special = source, special or {}

    @classmethod
    def from_folder(cls, folder):
        """That of a model, or None: a base model has none. BadInput if it cannot be read."""
        config, file = Path(folder, "tokenizer_config.json"), Path(folder, "chat_template.jinja")
        try:
            about = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
            source = file.read_text(encoding="utf-8") if file.exists() else about.get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {one["name"]: one["template"] for one in source}["default"]
            special = {name: about.get(name) for name in ("bos_token", "eos_token")}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadInput(f"{config} is not valid ({error!r}); download it again.") from None
        text = {name: x["content"] if isinstance(x, dict) else x for name, x in special.items() if x}
        return cls(source, text) if source else None

    def __call__(self, messages, answer=False):
        """The text of a conversation; with `answer`, up to where the assistant's next message begins."""
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            return self.by_hand(messages, answer)

        def refused(message):
            raise TemplateError(message)

        more = ["jinja2.ext.loopcontrols"]
        room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=more)
        room.globals |= {"raise_exception": refused}
        try:
            given = dict(messages=messages, add_generation_prompt=answer, tools=None, documents=None)
            return room.from_string(self.source).render(**given, **self.special)
        except (TemplateError, TypeError, LookupError, ValueError, AttributeError) as error:
            raise BadInput(f"the model's chat template refuses this conversation: {error}.") from None

    def by_hand(self, messages, answer):
        if "<|im_start|>" in self.source and "<think>" not in self.source:
            # ChatML: Qwen2, SmolLM2, with the system's message that the template has
            usual = re.search(r"<\|im_start\|>system(?:\n|\\n)([^<{}'\"]+)<\|im_end\|>", self.source)
            if usual and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": usual[1].replace("\\n", "\n")}, *messages]
            one, answers, start = "<|im_start|>{}\n{}<|im_end|>\n", "<|im_start|>assistant\n", ""
        elif "<|start_header_id|>" in self.source:  # Llama 3; from 3.1 on the system's message says what day it is
            one = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
            answers = "<|start_header_id|>assistant<|end_header_id|>\n\n"
            start = self.special.get("bos_token", "<|begin_of_text|>")
            messages = [{**m, "content": m["content"].strip()} for m in messages]
            if "Cutting Knowledge Date" in self.source:
                system, rest = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
                dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
                messages = [{"role": "system", "content": dates + "".join(m["content"] for m in system)}, *rest]
        else:
            raise BadInput("the model's chat template is of no family known here; pip install jinja2, which runs it.")
        return start + "".join(one.format(m["role"], m["content"]) for m in messages) + (answers if answer else "")
