"""A pretrained model by its Hub id: the few files that are read here, in the cache that Hugging Face's own tools share.

The environment says where and who, as it does to those tools: HF_ENDPOINT, HF_HOME or HF_HUB_CACHE, HF_TOKEN.
"""

import hashlib
import json
import os
import re
import time
from functools import cache
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from data import BadInput, atomic

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ID = r"(?a)(?!\.)([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?"
BROKEN = (URLError, HTTPException, ConnectionError, TimeoutError)  # what a bad connection ends in
TRIES, PAUSE = 5, 1.0  # in a row without a new byte; seconds after the first of them, more after each


class Stay(HTTPRedirectHandler):
    """A redirect is an answer: what the Hub knows of a file stands in its own headers, not in those of the CDN."""

    def redirect_request(self, *_):
        return None


def home():
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HOME") or usual).expanduser()


def request(url, method="GET", **headers):
    """The token goes into a header that urllib does not repeat where it is redirected to: a CDN must not see it."""
    found, stored = Request(url, method=method, headers={"User-Agent": "koff", **headers}), home() / "token"
    if token := (os.environ.get("HF_TOKEN") or (stored.read_text() if stored.exists() else "")).strip():
        found.add_unredirected_header("Authorization", f"Bearer {token}")
    return found


def look(repo, revision, file):
    """(commit, etag, size, url) of a file on the Hub; None if the model has no such file."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not re.match("https?://", endpoint):
        raise BadInput(f"HF_ENDPOINT is {endpoint!r}; it has to begin with https://.")
    page = f"{endpoint.rstrip('/')}/{repo}"
    url, opener = f"{page}/resolve/{revision}/{file}", build_opener(Stay)
    for _ in range(5):
        try:
            reply = opener.open(request(url, "HEAD"), timeout=30)
        except HTTPError as error:
            reply = error
        head = reply.headers
        if reply.status // 100 != 3 or not re.match("/[^/]", head.get("Location", "")):
            break
        url = urljoin(url, head["Location"])  # the model was renamed; another server would not get the token
    if head.get("X-Error-Code") == "EntryNotFound":
        return None
    if reply.status == 401:
        raise BadInput(f"no folder {repo} here, and {page} is not public (401); check the name, or set HF_TOKEN.")
    if reply.status == 403:
        raise BadInput(f"{page} is gated, and HF_TOKEN's account may not read it (403); ask for access on that page.")
    if reply.status == 429 or reply.status >= 500:
        raise URLError(f"it answers {reply.status}")
    size = head.get("X-Linked-Size") or head.get("Content-Length")
    if reply.status >= 400 or size is None:
        raise BadInput(f"{url} cannot be read ({reply.status}); check the name and the revision.")
    etag = (head.get("X-Linked-Etag") or head.get("ETag", "")).removeprefix("W/").strip('"')
    return head.get("X-Repo-Commit", revision), etag, int(size), url


def digest(path, etag):
    """What the Hub's etag of this file would be: the SHA-256 of a large file, git's SHA-1 of a small one."""
    found = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def download(url, path, etag, size):
    """Get the file at `url` into `path`. What an earlier try left in `path`.incomplete is not asked for again."""
    part, opener, failures = path.with_name(f"{path.name}.incomplete"), build_opener(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with tqdm(total=size, desc=url.rpartition("/")[2], unit="B", unit_scale=True, leave=False, disable=None) as bar:
        while (have := part.stat().st_size) < size:
            reason = "no bytes came"
            try:
                with opener.open(request(url, Range=f"bytes={have}-"), timeout=30) as reply:
                    rest = reply.status == 206  # else it sends the whole file, whatever was asked
                    bar.update((have if rest else 0) - bar.n)
                    with open(part, "ab" if rest else "wb") as out:
                        while piece := reply.read(2**20):
                            out.write(piece)
                            bar.update(len(piece))
            except BROKEN as error:
                reason = error
            failures = 0 if part.stat().st_size > have else failures + 1
            time.sleep(PAUSE * failures)
            if failures == TRIES:
                raise BadInput(f"{url} broke off ({reason}); the same command goes on from there.")
    if part.stat().st_size != size or digest(part, etag) != etag:
        part.unlink()
        raise BadInput(f"{url} did not arrive as it is on the Hub; what came was deleted, try again.")
    os.replace(part, path)


def fetch(store, repo, revision, file):
    """The path of a model's file in its cache `store`, downloaded if need be; None if the model has no such file."""
    if (path := store / "snapshots" / revision / file).exists():
        return path
    if (found := look(repo, revision, file)) is None:
        return None
    commit, etag, size, url = found
    path, blob = store / "snapshots" / commit / file, store / "blobs" / etag
    if not blob.exists():
        download(url, blob, etag, size)
    if not path.exists():
        with atomic(path) as partial:
            partial.symlink_to(os.path.relpath(blob, path.parent))
    return path


@cache
def located(name, weights=True):
    """The folder of a model: `name` itself, unless it is none and reads like the Hub's owner/model[@revision].

    Then it is the snapshot in the cache, brought up to date; without `weights`, the config.json only. Where the Hub
    does not answer, what is in the cache has to do.
    """
    if Path(name).exists() or not (id := re.fullmatch(ID, str(name))):
        return Path(name)
    repo, revision = id[1], id[2] or "main"
    store = Path(os.environ.get("HF_HUB_CACHE") or home() / "hub", f"models--{repo.replace('/', '--')}")
    ref = store / "refs" / revision
    try:
        if (config := fetch(store, repo, revision, "config.json")) is None:
            raise BadInput(f"{name} has no config.json on the Hub; name a model that has.")
        folder = config.parent
        if not ref.exists() or ref.read_text() != folder.name:
            with atomic(ref) as partial:
                partial.write_text(folder.name)
        if weights:
            *_, index = [fetch(store, repo, folder.name, file) for file in (*BESIDE, INDEX)]
            for file in checkpoint_names(index) if index else [SINGLE]:
                fetch(store, repo, folder.name, file)
    except BROKEN as error:
        folder = store / "snapshots" / (ref.read_text() if ref.exists() else revision)
        if not (folder / "config.json").exists():
            raise BadInput(f"{name} is no folder here, and the Hub does not answer ({error}).") from None
    return folder


def checkpoint_names(index):
    """The files that an index of shards names, plain names only: they are untrusted."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise BadInput(f"{index} names the file {name!r}, not a plain .safetensors name; do not trust it.")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BadInput(f"{index} has no valid weight_map; download it again.") from None
    return names
