"""A run as a model of lm-evaluation-harness: `eval.py bench RUN TASK --harness [--include FOLDER of task yamls]`.

Any task of the harness, on the unpruned model, the backbone, one module, or the module that the router picks for each
context. The harness writes the prompts and counts; here are the log-likelihoods and the greedy text of the model.
Needs: pip install lm_eval.
"""

import json
from itertools import groupby
from operator import itemgetter

import torch

from data import BadInput
from data.scoring import log_likelihoods, model_of, module_for, open_variants
from data.tables import save
from model import generate

BATCH = 16  # requests that are looked at together


class RunModel:
    """What the harness asks of a model. `harness` joins it with the harness's own TemplateLM, which splits context and
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

    def module(self, ids):
        """The module that reads a context; in the variant routed that depends on it."""
        return module_for(self.run, self.variant, ids)[1]

    def _loglikelihood_tokens(self, requests, **_):
        """[(text, context, continuation)], the last two as ids -> [(log p, would greedy decoding write it?)]."""
        pairs = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-self.max_length - 1 :]  # what is too long loses its beginning, as in `hf`
            pairs.append((ids[: -len(continuation)], continuation))
        answers = []
        for start in range(0, len(pairs), BATCH):
            # The options of a question come one after the other: their context is read once.
            for context, group in groupby(pairs[start : start + BATCH], key=itemgetter(0)):
                options = [option for _, option in group]
                answers += zip(*log_likelihoods(self.model, context, options, self.module(context)), strict=True)
        return answers

    def loglikelihood_rolling(self, requests, **_):
        """[log p of a whole text]: windows as long as the context, which predict each token once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            total = 0.0
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                scores, _ = log_likelihoods(self.model, context, [continuation], self.module(ids))
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
            tokens = torch.tensor([ids], device=self.run.device)
            written = []
            # The harness stops at strings, which may end within a token or begin in an earlier one.
            for token in generate(self.model, tokens, steps, tokenizer.vocab_size, eos, module=self.module(ids)):
                written.append(token.item())
                if written[-1] in eos or any(stop in tokenizer.decode(written) for stop in until):
                    break
            text = tokenizer.decode([token for token in written if token not in eos])
            texts.append(postprocess_generated_text(text, until, None))
        return texts


def harness(args):
    """Measure a run on a task of the harness: its tables on the screen, what it returns in RUN/bench, samples included.

    `args.shots`, `args.limit`: as the harness has them; `args.include`: a folder of further tasks. BadInput without the
    package, or for a task that there is not.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise BadInput("bench --harness needs lm-evaluation-harness: pip install lm_eval.") from None

    class Adapter(RunModel, TemplateLM):
        pass

    run, variants = open_variants(args.run, args.device, args.on)
    tasks = TaskManager(include_path=args.include and str(args.include))
    if args.task not in tasks.all_tasks:
        raise BadInput(f"the harness has no task {args.task!r}; name one of its own, or --include a folder of yamls.")
    for variant in variants:
        results = simple_evaluate(
            Adapter(run, variant), tasks=[args.task], num_fewshot=args.shots, limit=args.limit, task_manager=tasks
        )
        print(make_table(results))
        text = json.dumps(results, indent=1, default=str)
        save(args.out or run.folder / "bench", {f"{args.task}-{variant}-harness.json": text}, show=False)
