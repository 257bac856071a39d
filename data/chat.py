"""Text from a run: `python eval.py generate RUN "Der Kernel"` continues a prompt, `python eval.py chat RUN` talks.

Which module answers? The one that --module names, or else the one that the router picks for the text. Where the router
is unsure, the backbone answers alone. The text goes to stdout, and who wrote it to stderr.
"""

import sys
from codecs import getincrementaldecoder

import numpy as np
import torch

from data import BadInput
from data.chat_template import ChatTemplate
from data.run import Run
from model import generate


def check_sampling(args):
    """BadInput for a --temperature, --top-p, --tokens or --seed that means nothing."""
    if not args.temperature >= 0 or not 0 < args.top_p <= 1 or args.tokens < 1:  # "not": NaN is refused too
        raise BadInput("give a --temperature of at least 0, a --top-p above 0 and up to 1, and --tokens of at least 1.")
    if not 0 <= args.seed < 2**63:
        raise BadInput(f"--seed is {args.seed}; give 0 to {2**63 - 1}.")


def encode(run, text, bos=False):
    """The token ids of a text; with `bos` as the model was trained to see its start. BadInput if there are none."""
    ids = run.tokenizer.encode(text, bos=bos)
    if not ids:
        raise BadInput("the prompt is empty; give some text.")
    return ids


def pick_module(run, text, name=None):
    """(memories, a line that names their domain and the reason): the module `name`, or the router's choice.

    The memories are None if the router is unsure, and in a run without modules: then the backbone answers alone.
    """
    if name:
        return run.memories(name), name
    if not run.names:
        return None, "none in this run"
    ids = np.array(encode(run, text))
    [routed] = run.router.route(ids[None])  # a batch of one text
    best, probability = run.router.best(ids)
    if routed is None:  # the text is like that of no domain
        return None, f"none, the router is unsure ({best} would be the first choice)"
    if routed not in run.names:  # its file was left behind
        return None, f"none, the router's choice is {routed} ({probability:.1%}), which is not here"
    return run.memories(routed), f"{routed}, the router's choice ({probability:.1%})"


def stream(run, text, memories, args):
    """Yield the model's continuation of `text`, piece by piece. `args`: number of tokens, and how they are sampled.

    Raises BadInput for a text without tokens, or with more than the model's context has.
    """
    tokens = torch.tensor([encode(run, text, bos=True)], device=run.device)  # [1, T]
    vocabulary = run.tokenizer.vocab_size  # without the padding rows, which no token stands for
    eos = run.backbone.config.eos_token_ids
    generator = torch.Generator(run.device).manual_seed(args.seed)
    # A character may take several tokens. The decoder keeps the bytes of the first ones until it can be shown whole.
    decoder = getincrementaldecoder("utf-8")("replace")
    try:
        for token in generate(
            run.backbone, tokens, args.tokens, vocabulary, eos, args.temperature, args.top_p, memories, generator
        ):
            if token.item() not in eos:
                yield decoder.decode(run.tokenizer.decode_bytes([token.item()]))
    except ValueError as error:
        raise BadInput(str(error)) from None
    # What is left is a character that the model did not finish.
    yield decoder.decode(b"", final=True)


def show(pieces):
    """Print the pieces of a text as they come; returns the text."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def note(text):
    """Tell the user something beside the model's text, so that `eval.py generate ... > file` writes that text only."""
    print(f"[{text}]", file=sys.stderr)


def continue_text(args):
    """Continue the prompt `args.prompt` on the screen."""
    check_sampling(args)
    run = Run(args.run, args.device)
    memories, why = pick_module(run, args.prompt, args.module)
    pieces = stream(run, args.prompt, memories, args)
    note(f"module: {why}")
    print(args.prompt, end="")
    show(pieces)


# A conversation ------------------------------------------------------------------------------------------------------


def chat(args):
    """A conversation on the screen, until /quit or the end of the input.

    Each answer is made of all that was said before, so that /domain can change the module at any time.
    """
    check_sampling(args)
    run = Run(args.run, args.device)
    template = ChatTemplate.from_folder(run.folder / "backbone")
    domains = [*run.names, "auto"]
    name = args.module
    if name:
        run.memories(name)  # an unknown name is refused now, not after the first question
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
                # Too long for the context, or nothing that the vocabulary has: the conversation is as before the line.
                note(f"{error} /reset begins again.")
                messages.pop()


def answer(run, template, messages, name, args):
    """Print the answer to a conversation [{"role", "content"}], by the module `name` or a routed one; returns it."""
    # The router reads what the user wrote. What the model wrote would only confirm the router's last choice.
    said = "\n".join(message["content"] for message in messages if message["role"] == "user")
    memories, why = pick_module(run, said, name)
    note(f"module: {why}")
    if template:
        text = template(messages, answer=True)
    else:  # a base model has no template: it continues lines of text
        text = "".join(message["content"] + "\n" for message in messages)
    return show(stream(run, text, memories, args))
