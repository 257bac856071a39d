"""Benchmarks, through lm-evaluation-harness: `eval.py bench RUN TASK`, any of its tasks or one of ours in data/tasks/.

On the unpruned model, the backbone, one module, or the module that the router picks for each context. The harness
writes the prompts and counts; here are the log-likelihoods and the greedy text of the model.
Needs: pip install lm_eval.
"""

import json
import logging
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import BadInput
from data.checkpoint import digest
from data.hub import model_folder
from data.run import Run, pick_device, pick_dtype, unpruned_model
from data.settings import ROOT, Settings
from data.tables import save
from data.tokenizer import Tokenizer
from model import Cache, Memory, generate

BATCH = 16  # options of a question that are read together

# How likely is a text? -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def remember(model, ids, module=None):
    """The module {block: Memory} with which text goes on after `ids`: what they leave in the cache is a KV memory.

    So whatever many texts begin with is read once. The cache begins with the keys and values of `module`.
    """
    if not ids:
        return module
    cache = Cache(0)
    model.hidden(torch.tensor([ids], device=model.head.device), module=module, cache=cache)
    after = {}
    for i, (keys, values) in cache.layers.items():  # each [1, G, M + T, hd]
        memory = (module or {}).get(i) or Memory()
        after[i] = replace(memory, keys=keys[0], values=values[0])
    return after


@torch.inference_mode()
def log_likelihoods(model, context, continuations, module=None):
    """Two lists, with one entry for each of the continuations (ids) behind the context (ids):
    log p, and whether greedy decoding would write it.
    """
    # The context is read once. Each continuation is a row behind it: the last token of the context, which predicts the
    # first of the continuation, and so on. Nothing sees the padding on the right.
    memory = remember(model, context[:-1], module)
    rows = [torch.tensor([context[-1], *ids[:-1]]) for ids in continuations]
    rows = pad_sequence(rows, batch_first=True).to(model.head.device)  # [N, longest]
    scores = []
    greedy = []
    for ids, hidden in zip(continuations, model.hidden(rows, module=memory), strict=True):
        log_p = model.logits(hidden[: len(ids)]).log_softmax(-1)  # [len(ids), V]
        targets = torch.tensor(ids, device=log_p.device)
        scores.append(log_p.gather(1, targets[:, None]).double().sum().item())
        greedy.append(torch.equal(log_p.argmax(-1), targets))
    return scores, greedy


# What is measured ----------------------------------------------------------------------------------------------------


class Pretrained:
    """A pretrained model, seen as a `Run` that has neither backbone nor modules. Its folder is out/pretrained/NAME."""

    def __init__(self, name, folder, device):
        self.folder = Path("out/pretrained", Path(name).resolve().name)
        self.settings = Settings(model=str(folder), kv_tokens=0)
        self.device = pick_device(device)
        self.dtype = pick_dtype("auto", self.device)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.config = SimpleNamespace(raw={"koff_model": digest(folder)})  # as a run's backbone has it
        self.names = []


def open_variants(name, device, wanted=None):
    """(run, variants of it that are to be measured). `name`: of a run's folder, or of a pretrained model.

    A variant is unpruned, backbone (no module), routed (the router picks one for each context) or a module's name (it
    reads everything). Without `wanted` it is the first three. BadInput for one that is not there.
    """
    folder = model_folder(name)
    variants = ["unpruned"]
    if (folder / "config.json").exists():
        run = Pretrained(name, folder, device)
    else:
        run = Run(folder, device)
        variants.append("backbone")
    if run.names:
        variants += ["routed", *run.names]
    for variant in wanted or ():
        if variant not in variants:
            raise BadInput(f"--on cannot be {variant!r}; {name} has {', '.join(variants)}.")
    return run, wanted or variants[:3]


def model_of(run, variant):
    """The `Model` of a variant; what its module adds comes from `module_for`."""
    return unpruned_model(run) if variant == "unpruned" else run.backbone


def module_for(run, variant, ids):
    """The module with which a variant reads the text `ids`, or None."""
    name = variant
    if variant == "routed":
        name = run.router.route(np.array([ids]))[0]
    return run.module(name) if name in run.names else None


# The harness ---------------------------------------------------------------------------------------------------------


class RunModel:
    """What the harness asks of a model. `bench` joins it with the harness's own TemplateLM, which splits context and
    continuation into ids, and makes our methods those of a model that the harness accepts.
    """

    def __init__(self, run, variant):
        super().__init__()
        self.run = run
        self.variant = variant
        self.model = model_of(run, variant)
        # As many tokens as fit beside a module's keys and values.
        self.max_length = self.model.config.max_position_embeddings - run.settings.kv_tokens

    @property
    def eot_token_id(self):
        """What stands before a text that has no context."""
        return [*self.run.tokenizer.bos, *self.model.config.eos_token_ids, 0][0]

    def tok_encode(self, string, add_special_tokens=True, **_):
        """The ids of a text, with the model's first token unless the harness says no."""
        return self.run.tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, **_):
        """[(text, context, continuation)], the last two as ids -> [(log p, would greedy decoding write it?)]."""
        pairs = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-self.max_length - 1 :]  # what is too long loses its beginning, as in `hf`
            pairs.append((ids[: -len(continuation)], continuation))
        answers = []
        # The options of a question come one after the other: their context is read once.
        for context, group in groupby(pairs, key=itemgetter(0)):
            options = [option for _, option in group]
            module = module_for(self.run, self.variant, context)
            for start in range(0, len(options), BATCH):
                part = options[start : start + BATCH]
                answers += zip(*log_likelihoods(self.model, context, part, module), strict=True)
        return answers

    def loglikelihood_rolling(self, requests, **_):
        """[log p of a whole text]: windows as long as the context, which predict each token once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            module = module_for(self.run, self.variant, ids)
            total = 0.0
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                scores, _ = log_likelihoods(self.model, context, [continuation], module)
                total += scores[0]
            totals.append(total)
        return totals

    def generate_until(self, requests, **_):
        """[greedy text after a context, up to the first of the strings `until`]."""
        from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

        tokenizer = self.run.tokenizer
        eos = self.model.config.eos_token_ids
        texts = []
        for request in requests:
            context, settings = request.args
            settings = normalize_gen_kwargs(settings)  # tasks have several names for the same
            if settings.get("do_sample"):
                raise BadInput("this task asks for sampled text, which is not implemented; name another.")
            until = settings["until"]
            steps = min(settings["max_gen_toks"], self.max_length - 1)
            ids = self.tok_encode(context)[steps - self.max_length :]  # its end, with room for what is written
            module = module_for(self.run, self.variant, ids)
            tokens = torch.tensor([ids], device=self.run.device)
            written = []
            # The harness stops at strings, which may end within a token or begin in an earlier one.
            for token in generate(self.model, tokens, steps, tokenizer.vocab_size, eos, module=module):
                written.append(token.item())
                if written[-1] in eos or any(stop in tokenizer.decode(written) for stop in until):
                    break
            text = tokenizer.decode([token for token in written if token not in eos])
            texts.append(postprocess_generated_text(text, until, None))
        return texts


def bench(args):
    """Measure a run, or a pretrained model, on a task: the harness's tables on the screen, all that it returns, samples
    included, in RUN/bench. BadInput without the package, for a task that there is not, and for options that do nothing.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise BadInput("bench needs lm-evaluation-harness: pip install lm_eval.") from None

    class Adapter(RunModel, TemplateLM):
        pass

    if (args.limit is not None and args.limit < 1) or (args.shots or 0) < 0:
        raise BadInput("give a --limit of at least 1 and --shots of at least 0.")
    ours = args.task.startswith("koff_")
    if ours != bool(args.rows):
        raise BadInput("--rows is where a koff_ task has its questions, and no other task; give both or neither.")
    if ours and args.task != "koff_mmlu" and args.shots is not None:
        raise BadInput(f"{args.task} has no examples; leave out --shots.")
    run, variants = open_variants(args.run, args.device, args.on)
    folders = [str(ROOT / "data/tasks")]
    if args.include:
        folders.append(str(args.include))
    settings = None  # of our tasks: arguments of the functions in data/tasks/rows.py
    if ours:
        settings = {"rows": args.rows}
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it explains where such arguments come from
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
        save(args.out or run.folder / "bench", {f"{args.task}-{variant}.json": text}, show=False)
