"""Which domain is this text? Naive Bayes on a hashed bag of token n-grams: linear in the bag, seconds to train."""

import numpy as np
import torch

from data import BadInput, read_tensors, write_tensors
from data.corpus import windows

HALF = 2**15  # buckets: so many for unigrams, as many for bigrams


def hashed(number):
    """int64 array -> buckets 0 .. HALF - 1, by multiplication with 2^32 / golden ratio (Knuth, TAOCP 6.4).

    A product beyond 64 bits loses its highest ones, which the 32 that are used do not depend on.
    """
    return number * 2_654_435_761 % 2**32 % HALF


class Router:
    """Domains by name, and for each what its text looks like. "unsure" is the name None.

    weight     [domains, 2 HALF]: log-probability of each n-gram bucket
    threshold  [domains]: the lowest score that is trusted
    keys       {domain: key of the text (`Split.key`) that it was trained on}
    paths      {domain: its text}, of domains that came later

    The score of a text is its mean log-probability per n-gram under a domain. It is a likelihood, so that text unlike
    every domain scores low under all of them: the router is then unsure.
    """

    WINDOW = 50  # tokens of the texts that thresholds are made for

    def __init__(self):
        self.domains = []
        self.keys = {}
        self.paths = {}
        self.weight = np.zeros((0, 2 * HALF), np.float32)
        self.threshold = np.zeros(0)

    @staticmethod
    def buckets(ids):
        """ids [n, T] -> hashed buckets of all unigrams and bigrams [n, 2 T - 1]."""
        ids = np.asarray(ids, dtype=np.int64)
        pairs = ids[:, :-1] * 1_000_003 + ids[:, 1:]  # a prime above every vocabulary: each pair is its own number
        return np.concatenate([hashed(ids), HALF + hashed(pairs)], axis=1)

    def add(self, name, ids, key, keep=0.98):
        """One more domain; the others stay as they are. Counts come from the first 90% of its `ids`, and the threshold
        keeps the share `keep` of windows of the rest."""
        cut = len(ids) * 9 // 10
        counts = np.bincount(self.buckets(ids[None, :cut])[0], minlength=2 * HALF)
        counts = counts + 0.1  # smoothed: what was never seen is rare, not impossible
        log_p = np.log(counts / counts.sum()).astype(np.float32)
        self.domains.append(name)
        self.keys[name] = key
        self.weight = np.vstack([self.weight, log_p])
        own = self.scores(windows(ids[cut:], self.WINDOW))[:, -1]
        self.threshold = np.append(self.threshold, np.quantile(own, 1 - keep))

    def knows(self, name):
        """Is there a domain of this name? For some disks French is french."""
        return name.lower() in [domain.lower() for domain in self.domains]

    def remove(self, name):
        """Forget a domain; the others stay as they are."""
        at = self.domains.index(name)
        self.domains.remove(name)
        del self.keys[name]
        self.paths.pop(name, None)
        self.weight = np.delete(self.weight, at, axis=0)
        self.threshold = np.delete(self.threshold, at)

    def scores(self, ids):
        """ids [n, T] -> [n, domains]."""
        return self.weight[:, self.buckets(ids)].mean(axis=2).T

    def route(self, ids):
        """ids [n, T] -> list of n domain names, None where unsure. Shorter than WINDOW, texts are unsure more often."""
        names = []
        for scores in self.scores(ids):  # [domains]
            best = scores.argmax()
            sure = scores[best] >= self.threshold[best]
            names.append(self.domains[best] if sure else None)
        return names

    def best(self, ids):
        """ids [T] -> the most probable domain and its posterior probability, of which Naive Bayes is too sure."""
        ngrams = 2 * len(ids) - 1
        total = self.scores(ids[None])[0] * ngrams  # log-probability of the whole text under each domain
        return self.domains[total.argmax()], float(1 / np.exp(total - total.max()).sum())

    def save(self, path):
        domains = [[name, self.keys[name], self.paths.get(name)] for name in self.domains]
        tensors = {"weight": torch.from_numpy(self.weight), "threshold": torch.from_numpy(self.threshold)}
        write_tensors(path, tensors, domains=domains)

    @classmethod
    def load(cls, path):
        """The router of a run. BadInput for a file that cannot be read, or of an earlier version."""
        tensors, about = read_tensors(path)
        router = cls()
        try:
            router.weight = tensors["weight"].numpy()
            router.threshold = tensors["threshold"].numpy()
            for name, key, text in about["domains"]:
                router.domains.append(name)
                router.keys[name] = key
                if text:
                    router.paths[name] = text
        except (LookupError, ValueError, TypeError):
            raise BadInput(f"{path} is not a router of this version; train the run again.") from None
        return router
