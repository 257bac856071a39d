"""Text from a run: continue a prompt, or a conversation whose module can change in the middle."""

import json
import sys
from codecs import getincrementaldecoder
from pathlib import Path

import numpy as np
import torch

from data import BadInput, benchmarks
from data.chat_template import ChatTemplate
from data.corpus import read_text
from data.run import Run
from model import generate


def picked(run, text, name=None):
    """(module, its name and why): the one of that name, or the router's choice for the text, None if unsure."""
    if name:
        return run.module(name), name
    if not run.names:
        return None, "none in this run"
    if not (ids := np.array(run.tokenizer.encode(text))).size:
        raise BadInput("the prompt is empty; give some text.")
    (sure,), (best, p) = run.router.route(ids[None]), run.router.best(ids)
    if sure not in run.names:
        return None, f"none, the router is unsure ({best} would be the first choice)"
    return run.module(sure), f"{sure}, the router's choice ({p:.1%})"


def check_sampling(args):
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.tokens < 1:
        raise BadInput("give a --temperature of at least 0, a --top-p above 0 and up to 1, and --tokens of at least 1.")


def stream(run, text, memory, args):
    """Yield what the model writes after `text`, whole characters as they come."""
    ids, eos = run.tokenizer.encode(text, bos=True), run.backbone.config.eos_token_ids
    if not ids:
        raise BadInput("the prompt is empty; give some text.")
    generator, tokens = torch.Generator(run.device).manual_seed(args.seed), torch.tensor([ids], device=run.device)
    how = dict(eos=eos, temperature=args.temperature, top_p=args.top_p, memory=memory, generator=generator)
    decoder = getincrementaldecoder("utf-8")("replace")
    try:
        for token in generate(run.backbone, tokens, args.tokens, run.tokenizer.vocab_size, **how):
            if token.item() not in eos:
                yield decoder.decode(run.tokenizer.decode_bytes([token.item()]))
    except ValueError as error:
        raise BadInput(str(error)) from None
    yield decoder.decode(b"", final=True)


def continue_text(args):
    """Continue a prompt on the screen, or every prompt of a file as a line of JSON."""
    check_sampling(args)
    run, file = Run(args.run, args.device), args.prompt.startswith("@")
    for prompt in read_prompts(Path(args.prompt[1:])) if file else [args.prompt]:
        memory, why = picked(run, prompt, args.module)
        pieces = stream(run, prompt, memory, args)
        if file:
            line = dict(prompt=prompt, module=why, text="".join(pieces))
            print(json.dumps(line, ensure_ascii=False), flush=True)
            continue
        print(f"[module: {why}]", file=sys.stderr)
        print(prompt, end="")
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def read_prompts(path):
    """The prompts of a file: its lines, or the "prompt" of each line of a .jsonl."""
    if path.suffix != ".jsonl":
        return [line for line in read_text(path).split("\n") if line.strip()]
    return [benchmarks.columns(row, where, prompt=str)[0] for where, row in benchmarks.rows_of(path)]


def chat(args):
    """A conversation. Each answer is made of all that was said, so that the module can change at any time."""
    check_sampling(args)
    run = Run(args.run, args.device)
    template, messages, name = ChatTemplate.from_folder(run.folder / "backbone"), [], args.module
    if name:
        run.module(name)
    print(f"/domain {'|'.join([*run.names, 'auto'])}, /reset, /quit", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, *rest = line.split() or [""]
        if command == "/quit":
            return
        if command == "/reset":
            messages = []
        elif command == "/domain" and rest in [["auto"], *([other] for other in run.names)]:
            name = None if rest == ["auto"] else rest[0]
            print(f"[{rest[0]}: the {len(messages)} messages so far will be encoded again under it]", file=sys.stderr)
        elif command.startswith("/"):
            print(f"[{line} is no command, or {run.folder} has no such module]", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            said, answer = "\n".join(m["content"] for m in messages if m["role"] == "user"), ""
            # A base model has no template: it gets lines of text.
            text = template(messages, answer=True) if template else "".join(m["content"] + "\n" for m in messages)
            try:
                memory, why = picked(run, said, name)
                print(f"[module: {why}]", file=sys.stderr)
                for piece in stream(run, text, memory, args):
                    print(piece, end="", flush=True)
                    answer += piece
            except BadInput as error:  # longer than the context, or nothing that the vocabulary has
                print(f"[{error} /reset begins again.]", file=sys.stderr)
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": answer})
