"""Find the domain of a text: naive Bayes on a hashed bag of token n-grams, trained in seconds."""

import numpy as np
import torch

from data import MALFORMED, BadInput, read_tensors, write_tensors
from data.corpus import windows

HALF = 2**15  # buckets for unigrams; bigrams have as many
PRIOR = 10_000  # n-grams of the background in each domain's counts (measured)


def hashed(number):
    """int64 array -> buckets 0 .. HALF - 1, by multiplication with 2^32 / golden ratio (Knuth, TAOCP 6.4).

    A product may overflow 64 bits. That does not change its lowest 32 bits, which are used.
    """
    return number * 2_654_435_761 % 2**32 % HALF


class Router:
    """Routes a text to the most likely domain, or to None if it is unsure.

    weight     [domains, 2 HALF]: log-probability of each n-gram bucket
    threshold  [domains]: the lowest score that counts as sure
    keys       {domain: key of its training text (`Split.key`)}
    paths      {domain: path of its text}, for domains that were added later
    background [2 HALF]: counts that are added to each domain's. A domain of little text would otherwise lose to one of
               much text, in which fewer n-grams are unseen.

    The score of a text under a domain is its mean log-probability per n-gram. A text unlike every domain has low scores
    under all of them, and the router is unsure.
    """

    WINDOW = 50  # length in tokens of the texts for which the thresholds are chosen

    def __init__(self, texts=()):
        """texts: the ids of several domains, for the background; `add` then adds each domain."""
        self.background = np.zeros(2 * HALF)
        for ids in texts:
            counts = self.counts(ids)
            self.background += counts / np.sqrt(counts.sum())  # between equal shares and shares by length
        self.background *= PRIOR / max(1, self.background.sum())
        self.keys = {}
        self.paths = {}
        self.weight = np.zeros((0, 2 * HALF), np.float32)
        self.threshold = np.zeros(0)

    @property
    def domains(self):
        """All names, in the order of the rows of `weight`."""
        return list(self.keys)

    @staticmethod
    def buckets(ids):
        """ids [n, T] -> hashed buckets of all unigrams and bigrams [n, 2 T - 1]."""
        ids = np.asarray(ids, dtype=np.int64)
        pairs = ids[:, :-1] * 1_000_003 + ids[:, 1:]  # a prime above any vocabulary size: pairs do not collide
        return np.concatenate([hashed(ids), HALF + hashed(pairs)], axis=1)

    @classmethod
    def counts(cls, ids):
        """How often each bucket occurs in a text."""
        return np.bincount(cls.buckets(ids[None])[0], minlength=2 * HALF)

    def add(self, name, ids, key, keep=0.98):
        """Add a domain; the others do not change. The share `keep` of its windows reaches the threshold, each scored
        as if it were not in the text."""
        smoothing = self.background + 0.1  # an unseen n-gram is rare, not impossible
        counts = self.counts(ids)
        total = counts.sum() + smoothing.sum()
        self.keys[name] = key
        self.weight = np.vstack([self.weight, np.log((counts + smoothing) / total).astype(np.float32)])
        x = self.buckets(windows(ids, self.WINDOW, 5000))
        left = np.maximum(counts[x] - 1, 0) + smoothing[x]
        scores = np.log(left / total).mean(axis=1)
        threshold = np.quantile(scores, 1 - keep)
        if len(scores) < 50:  # so short a text is about few things
            threshold -= scores.mean() - threshold
        self.threshold = np.append(self.threshold, threshold)

    def knows(self, name):
        """Whether a domain has this name, in any case: some disks do not distinguish French from french."""
        return name.lower() in [domain.lower() for domain in self.domains]

    def remove(self, name):
        """Forget a domain; the others do not change."""
        at = self.domains.index(name)
        del self.keys[name]
        self.paths.pop(name, None)
        self.weight = np.delete(self.weight, at, axis=0)
        self.threshold = np.delete(self.threshold, at)

    def scores(self, ids):
        """ids [n, T] -> [n, domains]."""
        return self.weight[:, self.buckets(ids)].mean(axis=2).T

    def route(self, ids):
        """ids [n, T] -> n domain names, None if unsure. Texts shorter than WINDOW are more often unsure."""
        names = []
        for scores in self.scores(ids):  # [domains]
            best = scores.argmax()
            sure = scores[best] >= self.threshold[best]
            names.append(self.domains[best] if sure else None)
        return names

    def best(self, ids):
        """ids [T] -> the most likely domain and its posterior probability. (Naive Bayes is overconfident.)"""
        ngrams = 2 * len(ids) - 1
        total = self.scores(ids[None])[0] * ngrams  # log-probability of the whole text under each domain
        return self.domains[total.argmax()], float(1 / np.exp(total - total.max()).sum())

    def save(self, path):
        domains = [[name, key, self.paths.get(name)] for name, key in self.keys.items()]
        arrays = {"weight": self.weight, "threshold": self.threshold, "background": self.background}
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        write_tensors(path, tensors, domains=domains)

    @classmethod
    def load(cls, path):
        """The router of a run. BadInput if the file is unreadable or from an earlier version."""
        tensors, about = read_tensors(path)
        router = cls()
        try:
            router.weight = tensors["weight"].numpy()
            router.threshold = tensors["threshold"].numpy()
            if "background" in tensors:  # earlier versions had none
                router.background = tensors["background"].numpy()
            for name, key, text in about["domains"]:
                router.keys[name] = key
                if text:
                    router.paths[name] = text
        except MALFORMED:
            raise BadInput(f"{path} is not a router of this version; train the run again.") from None
        return router
