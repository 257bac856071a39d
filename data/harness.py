"""Benchmarks with lm-evaluation-harness: `eval.py bench RUN TASK`, for any of its tasks or one of ours in data/tasks/.

It measures the unpruned model, the backbone, the backbone with one module, or with the module that the router picks for
each context. The harness makes the prompts and the scores; this file computes log-likelihoods and greedy text.
Needs: pip install lm_eval.
"""

import json
import logging
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import BadInput
from data.run import Run, unpruned_model
from data.settings import ROOT
from data.special_tokens import special_tokens
from data.tables import save
from model import Cache, Memory, generate

BATCH = 16  # options of a question that are read at once

# Log-likelihoods -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def remember(model, ids, memories=None):
    """Memories {block: Memory} that hold the keys and values of `ids`, after those of the given memories.

    With them, the model continues as if it had just read `ids`: many texts with a common beginning read it once.
    """
    if not ids:
        return memories
    cache = Cache(0)
    model.hidden(torch.tensor([ids], device=model.head.device), memories=memories, cache=cache)
    after = {}
    for i, (keys, values) in cache.layers.items():  # each [1, G, M + T, hd]
        memory = (memories or {}).get(i) or Memory()
        after[i] = replace(memory, keys=keys[0], values=values[0])
    return after


@torch.inference_mode()
def log_likelihoods(model, context, continuations, memories=None):
    """Two lists with one entry per continuation (ids) of the context (ids): its log p, and whether it is greedy."""
    # The context is read once. Each row begins with its last token, which predicts the first of the continuation. No
    # token attends to the padding on the right.
    memories = remember(model, context[:-1], memories)
    rows = [torch.tensor([context[-1], *ids[:-1]]) for ids in continuations]
    rows = pad_sequence(rows, batch_first=True).to(model.head.device)  # [N, longest]
    scores = []
    greedy = []
    for ids, hidden in zip(continuations, model.hidden(rows, memories=memories), strict=True):
        log_p = model.logits(hidden[: len(ids)]).log_softmax(-1)  # [len(ids), V]
        targets = torch.tensor(ids, device=log_p.device)
        scores.append(log_p.gather(1, targets[:, None]).double().sum().item())
        greedy.append(torch.equal(log_p.argmax(-1), targets))
    return scores, greedy


# Variants of a run ---------------------------------------------------------------------------------------------------


def variants_on(run, wanted=None):
    """The variants to be measured: `wanted`, or the first three of all. BadInput for an unknown one.

    unpruned; backbone (no module); routed (the router picks a module for each context); the name of a module.
    """
    variants = ["unpruned", "backbone"]
    if run.names:
        variants += ["routed", *run.names]
    for variant in wanted or ():
        if variant not in variants:
            raise BadInput(f"--on cannot be {variant!r}; {run.folder} has {', '.join(variants)}.")
    return wanted or variants[:3]


# The harness ---------------------------------------------------------------------------------------------------------


class RunModel:
    """A variant of a run, with the methods that the harness calls.

    `bench` combines this class with the harness's TemplateLM, which turns context and continuation into ids.
    """

    def __init__(self, run, variant):
        super().__init__()
        self.run = run
        self.variant = variant
        self.model = unpruned_model(run) if variant == "unpruned" else run.backbone
        # The context must have room for a module's keys and values.
        self.max_length = self.model.config.max_position_embeddings - run.settings.kv_tokens

    def attached(self, ids):
        """(model, memories) with which the variant reads the text `ids`."""
        name = self.variant
        if name == "routed":
            name = self.run.router.route(np.array([ids]))[0]
        return self.run.attached(name) if name in self.run.names else (self.model, None)

    @cached_property
    def eot_token_id(self):
        """The token before a text without context: the tokenizer's BOS, otherwise EOS, as in the harness's `hf`."""
        names, _ = special_tokens(self.run.folder / "backbone")
        named = [names[name] for name in ("bos_token", "eos_token") if name in names]
        first = self.run.tokenizer.encode(named[0]) if named else self.run.tokenizer.bos
        return [*first, *self.model.config.eos_token_ids, 0][0]

    def tok_encode(self, string, add_special_tokens=True, **_):
        """The ids of a text, with the model's bos unless the harness says no."""
        return self.run.tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, **_):
        """[(text, context, continuation)], the latter two as ids -> [(log p, whether greedy decoding gives it)]."""
        pairs = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:  # `hf` fails, too
                fault = f"an answer of {len(continuation)} tokens, and the context has {self.max_length}"
                raise BadInput(f"this task has {fault}; name another task.")
            ids = (context + continuation)[-self.max_length - 1 :]  # too long: cut at the beginning, as in `hf`
            pairs.append((ids[: -len(continuation)], continuation))
        answers = []
        # The options of a question are neighbours. Their context is read once.
        for context, group in groupby(pairs, key=itemgetter(0)):
            options = [option for _, option in group]
            model, memories = self.attached(context)
            for start in range(0, len(options), BATCH):
                part = options[start : start + BATCH]
                answers += zip(*log_likelihoods(model, context, part, memories), strict=True)
        return answers

    def loglikelihood_rolling(self, requests, **_):
        """[log p of a whole text], in windows of the context's length. Each token is predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            model, memories = self.attached(ids)
            total = 0.0
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                scores, _ = log_likelihoods(model, context, [continuation], memories)
                total += scores[0]
            totals.append(total)
        return totals

    def generate_until(self, requests, **_):
        """[greedy continuation of a context, up to the first of the strings in `until`]."""
        from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

        tokenizer = self.run.tokenizer
        eos = self.model.config.eos_token_ids
        texts = []
        for request in requests:
            context, settings = request.args
            settings = normalize_gen_kwargs(settings)  # tasks name the same setting differently
            if settings.get("do_sample"):
                raise BadInput("this task asks for sampled text, which is not implemented; name another.")
            until = settings["until"]
            steps = min(settings["max_gen_toks"], self.max_length - 1)
            ids = self.tok_encode(context)[steps - self.max_length :]  # keep its end, with room for the answer
            ids = ids or [self.eot_token_id]
            model, memories = self.attached(ids)
            tokens = torch.tensor([ids], device=self.run.device)
            written = []
            # A stop string may end within a token, or begin in an earlier one. So we compare text.
            for token in generate(model, tokens, steps, tokenizer.vocab_size, eos, memories=memories):
                written.append(token.item())
                if written[-1] in eos or any(stop in tokenizer.decode(written) for stop in until):
                    break
            text = tokenizer.decode([token for token in written if token not in eos])
            texts.append(postprocess_generated_text(text, until, None))
        return texts


def bench(args):
    """Measure a run on a task. The screen shows the harness's tables; RUN/bench gets everything that it returns.

    BadInput without the package, for an unknown task, and for options without effect.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except Exception as error:  # an old one may not fit the transformers beside it
        raise BadInput(f"bench needs lm-evaluation-harness: pip install -U lm_eval ({error}).") from None

    class Adapter(RunModel, TemplateLM):
        pass

    if (args.limit is not None and args.limit < 1) or (args.shots or 0) < 0:
        raise BadInput("give a --limit of at least 1 and --shots of at least 0.")
    ours = args.task.startswith("koff_")
    if ours != bool(args.rows):
        raise BadInput("--rows is where a koff_ task has its questions, and no other task; give both or neither.")
    if ours and args.task != "koff_mmlu" and args.shots is not None:
        raise BadInput(f"{args.task} has no examples; leave out --shots.")
    run = Run(args.run, args.device)
    variants = variants_on(run, args.on)
    folders = [str(ROOT / "data/tasks")]
    if args.include:
        folders.append(str(args.include))
    settings = None  # for our tasks: arguments of the functions in data/tasks/rows.py
    if ours:
        settings = {"rows": args.rows}
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it would explain where such arguments come from
        if args.shots is not None:
            settings["shots"] = args.shots
    tasks = TaskManager(include_path=folders, include_defaults=not ours, metadata=settings)
    if args.task not in tasks.all_tasks:
        raise BadInput(f"the harness has no task {args.task!r}; name one of its own, or --include a folder of yamls.")
    for variant in variants:
        results = simple_evaluate(
            Adapter(run, variant), tasks=[args.task], num_fewshot=args.shots, limit=args.limit, task_manager=tasks
        )
        print(make_table(results))
        text = json.dumps(results, indent=1, default=str)
        save(args.out or run.folder / "bench", {result_name(args, run, variant): text}, show=False)


def result_name(args, run, variant):
    """The name of a result's file, another one for each run, variant, task and setting."""
    settings = {
        "rows": args.rows and Path(args.rows).resolve().stem,
        "shots": args.shots,
        "limit": args.limit,
        "run": args.out and run.config.raw["koff_fingerprint"],  # several may share the folder
    }
    given = [f"{name}-{value}" for name, value in settings.items() if value is not None]
    return "-".join([args.task, variant, *given]) + ".json"
