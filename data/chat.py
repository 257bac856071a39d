"""Generate text: `python eval.py generate RUN "Der Kernel"` continues a prompt, `python eval.py chat RUN` converses.

--module names the module that answers. Without it the router picks one for the text. If the router is unsure, the
backbone answers alone. The text goes to stdout, and the name of the module to stderr.
"""

import sys
from codecs import getincrementaldecoder

import numpy as np
import torch

from data import BadInput
from data.chat_template import ChatTemplate
from data.corpus import Conversation
from data.run import Run
from model import generate


def check_sampling(args):
    """BadInput for an impossible --temperature, --top-p, --tokens or --seed."""
    if not args.temperature >= 0 or not 0 < args.top_p <= 1 or args.tokens < 1:  # not "< 0": that would accept NaN
        raise BadInput("give a --temperature of at least 0, a --top-p above 0 and up to 1, and --tokens of at least 1.")
    if not 0 <= args.seed < 2**63:
        raise BadInput(f"--seed is {args.seed}; give 0 to {2**63 - 1}.")


def encode(run, text, bos=False):
    """The token ids of a text. bos: with the model's own beginning. BadInput if there are none."""
    ids = run.tokenizer.encode(text, bos=bos)
    if not ids:
        raise BadInput("the prompt is empty; give some text.")
    return ids


def pick_module(run, text, name=None):
    """(the module `name` or the router's choice, a line with the reason).

    The choice is None if the router is unsure, or if the run has no modules. Then the backbone answers alone.
    """
    if name:
        return name, name
    if not run.names:
        return None, "none in this run"
    ids = np.array(encode(run, text))
    [routed] = run.router.route(ids[None])  # a batch of one text
    best, probability = run.router.best(ids)
    if routed is None:
        return None, f"none, the router is unsure ({best} would be the first choice)"
    if routed not in run.names:  # its file is missing in this copy of the run
        return None, f"none, the router's choice is {routed} ({probability:.1%}), which is not here"
    return routed, f"{routed}, the router's choice ({probability:.1%})"


def stream(run, text, model, memories, args):
    """Yield the model's continuation of `text`, piece by piece. args: number of tokens, and options of sampling.

    BadInput for a text without tokens, or with more tokens than the model's context.
    """
    bos = not isinstance(text, Conversation)  # which has its own beginning
    tokens = torch.tensor([encode(run, text, bos)], device=run.device)  # [1, T]
    vocabulary = run.tokenizer.vocab_size  # without padding rows
    eos = model.config.eos_token_ids
    generator = torch.Generator(run.device).manual_seed(args.seed)
    # A character may take several tokens. The decoder collects its bytes until it is complete.
    decoder = getincrementaldecoder("utf-8")("replace")
    try:
        for token in generate(
            model, tokens, args.tokens, vocabulary, eos, args.temperature, args.top_p, memories, generator
        ):
            if token.item() not in eos:
                yield decoder.decode(run.tokenizer.decode_bytes([token.item()]))
    except ValueError as error:
        raise BadInput(str(error)) from None
    # The model may have left a character unfinished.
    yield decoder.decode(b"", final=True)


def show(pieces):
    """Print the pieces of a text as they come. Returns the text."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def note(text):
    """Print a remark to stderr: `eval.py generate ... > file` writes only the model's text."""
    print(f"[{text}]", file=sys.stderr)


def continue_text(args):
    """Print the prompt `args.prompt` and its continuation."""
    check_sampling(args)
    run = Run(args.run, args.device)
    name, why = pick_module(run, args.prompt, args.module)
    pieces = stream(run, args.prompt, *run.attached(name), args)
    note(f"module: {why}")
    print(args.prompt, end="")
    show(pieces)


# A conversation ------------------------------------------------------------------------------------------------------


def chat(args):
    """A conversation on the screen, until /quit or the end of the input.

    For each answer the model reads the whole conversation again. So /domain can change the module at any time.
    """
    check_sampling(args)
    run = Run(args.run, args.device)
    template = ChatTemplate.from_folder(run.folder / "backbone")
    domains = [*run.names, "auto"]
    name = args.module
    if name:
        run.memories(name)  # refuses an unknown name now, before the first question
    messages = []  # [{"role": "user" or "assistant", "content": text}]
    note(f"/domain {'|'.join(domains)}, /reset, /quit")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, domain = line.partition(" ")  # "/domain german"
        domain = domain.strip()
        if line == "/quit":
            return
        if line == "/reset":
            messages = []
        elif command == "/domain" and domain in domains:
            name = None if domain == "auto" else domain
            note(f"{domain}: the {len(messages)} messages so far will be encoded again under it")
        elif line.startswith("/"):
            note(f"{line} is no command, or {run.folder} has no such module")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                text = answer(run, template, messages, name, args)
                messages.append({"role": "assistant", "content": text})
            except BadInput as error:
                # The line makes the conversation too long, or has no tokens. The conversation goes on without it.
                note(f"{error} /reset begins again.")
                messages.pop()


def answer(run, template, messages, name, args):
    """Print and return the answer to a conversation [{"role", "content"}], by the module `name` or a routed one."""
    # The router reads only the user's messages. The model's would confirm the router's last choice.
    said = "\n".join(message["content"] for message in messages if message["role"] == "user")
    name, why = pick_module(run, said, name)
    note(f"module: {why}")
    if template:
        text = template(messages, answer=True)
    else:  # a base model has no template and continues lines of text
        text = "".join(message["content"] + "\n" for message in messages)
    return show(stream(run, text, *run.attached(name), args))
