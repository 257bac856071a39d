"""Which domain is this text? Naive Bayes on a hashed bag of token n-grams: linear in the bag, seconds to train."""

import json

import numpy as np
from safetensors.numpy import save_file

from data import BadInput, atomic, read_tensors
from data.corpus import windows


class Router:
    """weight [domains, buckets]: log-probability of each n-gram bucket; threshold [domains]: lowest score still trusted.

    The score of a text is its mean log-probability per n-gram under a domain. It is a likelihood, so that text unlike
    every domain scores low under all of them: the router then answers "unsure" (None).
    """

    BUCKETS, WINDOW = 2**16, 50

    def __init__(self, domains, weight, threshold):
        self.domains, self.weight, self.threshold = list(domains), weight, threshold

    @classmethod
    def buckets(cls, ids):
        """ids [n, T] -> hashed buckets of all unigrams and bigrams [n, 2 T - 1]."""
        ids = np.asarray(ids, dtype=np.int64)
        pair = (ids[:, :-1] * 1_000_003 + ids[:, 1:]) * 2_654_435_761 % 2**32 % (cls.BUCKETS // 2) + cls.BUCKETS // 2
        return np.concatenate([ids * 2_654_435_761 % 2**32 % (cls.BUCKETS // 2), pair], axis=1)

    @classmethod
    def fit(cls, train, keep=0.98):
        """train {domain: ids}. Counts come from the first 90%; thresholds keep the share `keep` of windows of the rest."""
        cut = {name: len(ids) * 9 // 10 for name, ids in train.items()}
        bags = [cls.buckets(ids[None, : cut[name]])[0] for name, ids in train.items()]
        counts = np.stack([np.bincount(bag, minlength=cls.BUCKETS) for bag in bags]) + 0.1  # smoothed
        weight = np.log(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
        router = cls(train, weight, np.zeros(len(train)))
        for d, (name, ids) in enumerate(train.items()):
            tail = windows(ids[cut[name] :], cls.WINDOW)
            router.threshold[d] = np.quantile(router.scores(tail)[:, d], 1 - keep)
        return router

    def scores(self, ids):
        """ids [n, T] -> [n, domains]."""
        return self.weight[:, self.buckets(ids)].mean(axis=2).T

    def route(self, ids):
        """ids [n, T] -> list of n domain names, None where unsure. Shorter than WINDOW, texts are unsure more often."""
        scores = self.scores(ids)
        best = scores.argmax(axis=1)
        sure = scores.max(axis=1) >= self.threshold[best]
        return [self.domains[b] if s else None for b, s in zip(best, sure, strict=True)]

    def save(self, path):
        with atomic(path) as partial:
            metadata = {"domains": json.dumps(self.domains)}
            save_file({"weight": self.weight, "threshold": self.threshold}, partial, metadata)

    @classmethod
    def load(cls, path):
        tensors, metadata = read_tensors(path, "np")
        if "domains" not in metadata:
            raise BadInput(f"{path} is not a router; name a run that train.py has finished.")
        return cls(json.loads(metadata["domains"]), tensors["weight"], tensors["threshold"])
