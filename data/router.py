"""Which domain is this text? Naive Bayes on a hashed bag of token n-grams: linear in the bag, seconds to train."""

import json

import numpy as np
from safetensors.numpy import save_file

from data import BadInput, atomic, read_tensors
from data.corpus import windows


class Router:
    """weight [domains, buckets]: log-probability of each n-gram bucket; threshold [domains]: lowest score trusted.

    The score of a text is its mean log-probability per n-gram under a domain. It is a likelihood, so that text unlike
    every domain scores low under all of them: the router then answers "unsure" (None).
    """

    BUCKETS, WINDOW = 2**16, 50

    def __init__(self, domains=(), weight=None, threshold=(), paths=None):
        """`paths` {domain: its text}: of domains that came later, or under another name than their text has."""
        self.domains, self.threshold, self.paths = list(domains), np.asarray(threshold, np.float64), dict(paths or {})
        self.weight = np.zeros((0, self.BUCKETS), np.float32) if weight is None else weight

    @classmethod
    def buckets(cls, ids):
        """ids [n, T] -> hashed buckets of all unigrams and bigrams [n, 2 T - 1]."""
        ids = np.asarray(ids, dtype=np.int64)
        pair = (ids[:, :-1] * 1_000_003 + ids[:, 1:]) * 2_654_435_761 % 2**32 % (cls.BUCKETS // 2) + cls.BUCKETS // 2
        return np.concatenate([ids * 2_654_435_761 % 2**32 % (cls.BUCKETS // 2), pair], axis=1)

    @classmethod
    def fit(cls, train):
        """The router of {domain: ids}."""
        router = cls()
        for name, ids in train.items():
            router.add(name, ids)
        return router

    def add(self, name, ids, keep=0.98):
        """One more domain; the others stay as they are. Counts come from the first 90% of its `ids`, and the threshold
        keeps the share `keep` of windows of the rest."""
        cut = len(ids) * 9 // 10
        counts = np.bincount(self.buckets(ids[None, :cut])[0], minlength=self.BUCKETS) + 0.1  # smoothed
        self.domains.append(name)
        self.weight = np.concatenate([self.weight, np.log(counts / counts.sum())[None].astype(np.float32)])
        own = self.scores(windows(ids[cut:], self.WINDOW))[:, -1]
        self.threshold = np.append(self.threshold, np.quantile(own, 1 - keep))

    def remove(self, name):
        at = self.domains.index(name)
        self.domains.remove(name)
        self.paths.pop(name, None)
        self.weight, self.threshold = np.delete(self.weight, at, axis=0), np.delete(self.threshold, at)

    def scores(self, ids):
        """ids [n, T] -> [n, domains]."""
        return self.weight[:, self.buckets(ids)].mean(axis=2).T

    def best(self, ids):
        """ids [T] -> the most probable domain and its posterior probability, of which Naive Bayes is too sure."""
        total = self.scores(ids[None])[0] * (2 * len(ids) - 1)  # unigrams and bigrams
        return self.domains[total.argmax()], float(1 / np.exp(total - total.max()).sum())

    def route(self, ids):
        """ids [n, T] -> list of n domain names, None where unsure. Shorter than WINDOW, texts are unsure more often."""
        scores = self.scores(ids)
        best = scores.argmax(axis=1)
        sure = scores.max(axis=1) >= self.threshold[best]
        return [self.domains[b] if s else None for b, s in zip(best, sure, strict=True)]

    def save(self, path):
        with atomic(path) as partial:
            about = [[name, self.paths.get(name)] for name in self.domains]
            save_file({"weight": self.weight, "threshold": self.threshold}, partial, {"domains": json.dumps(about)})

    @classmethod
    def load(cls, path):
        tensors, metadata = read_tensors(path, "np")
        try:
            paths = dict(json.loads(metadata["domains"]))
        except (LookupError, ValueError):
            raise BadInput(f"{path} is not a router of this version; train the run again.") from None
        return cls(paths, tensors["weight"], tensors["threshold"], {name: path for name, path in paths.items() if path})
