"""Downloads against a server that plays the Hub and another that plays its CDN: both speak the real protocol."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data import BadInput, download
from data.checkpoint import load, parse_config
from data.tokenizer import Tokenizer
from model import Model

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = dict(
    model_type="llama", vocab_size=4096, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, eos_token_id=0,
    tie_word_embeddings=True,
)  # fmt: skip


class Hub:
    """Two servers. `asked`: [(server, method, path, headers)]; `cut`: {file: bytes after which the next GET breaks off}."""

    def __init__(self, files):
        self.files, self.asked, self.cut, self.ranges, self.status, self.wrong = files, [], {}, True, {}, set()
        self.servers = {name: ThreadingHTTPServer(("127.0.0.1", 0), self.handler(name)) for name in ("hub", "cdn")}
        self.url = {name: f"http://127.0.0.1:{s.server_address[1]}" for name, s in self.servers.items()}
        for server in self.servers.values():
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def close(self):
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def handler(self, name):
        return type("Handler", (Handler,), {"hub": self, "name": name})

    def asked_for(self, method, file):
        return [(n, h) for n, m, path, h in self.asked if m == method and path.endswith("/" + file)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, (_, *path) = self.hub, self.path.split("/")
        hub.asked.append((self.name, self.command, self.path, dict(self.headers)))
        model, file = "/".join(path[:2]), path[-1]
        if model == "old/name":
            return self.answer(307, {"Location": self.path.replace("old/name", "some/model")})
        gated = hub.status.get(self.headers.get("Authorization"), hub.status.get("all"))
        if self.name == "hub" and (gated or model != "some/model"):
            return self.answer(gated or 401, {"X-Error-Code": "GatedRepo" if gated else "RepoNotFound"})
        if file not in hub.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        body = hub.files[file]
        large, about = file.endswith(".safetensors"), {"X-Repo-Commit": COMMIT}
        if self.name == "hub" and large:
            about |= {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": str(len(body))}
            return self.answer(
                302, about | {"Location": f"{hub.url['cdn']}/signed/{file}", "ETag": '"of the redirect"'}
            )
        about["ETag"] = f'"{hashlib.sha1(b"blob %d" % len(body) + bytes(1) + body).hexdigest()}"'
        if file in hub.wrong:
            body = bytes(len(body))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if hub.ranges and self.command == "GET" else 0
        self.answer(
            206 if start else 200, about, body[start:], hub.cut.pop(file, None) if self.command == "GET" else None
        )

    def answer(self, status, headers, body=b"", cut=None):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = self.close_connection or cut is not None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model of two shards on the Hub, with another in a file that is not ours; the cache is in tmp_path/hf."""
    torch.manual_seed(0)
    state = {f"model.{n}": torch.randn_like(p) for n, p in Model(parse_config(CONFIG)).named_parameters()}
    names, files = sorted(state), {}
    parts = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, some in parts.items():
        save_file({n: state[n] for n in some}, tmp_path / file)
        files[file] = (tmp_path / file).read_bytes()
    index = {"weight_map": {n: file for file, some in parts.items() for n in some}}
    files |= {"config.json": json.dumps(CONFIG).encode(), download.INDEX: json.dumps(index).encode()}
    files |= {
        "tokenizer.json": (ROOT / "data/base/tokenizer.json").read_bytes(),
        "original.safetensors": b"not asked for",
    }
    server = Hub(files)
    for name, value in {"HF_ENDPOINT": server.url["hub"], "HF_HOME": tmp_path / "hf", "HF_TOKEN": "secret"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE", 0)
    download.located.cache_clear()
    yield server
    server.close()
    download.located.cache_clear()


def store(tmp_path):
    return tmp_path / "hf/hub/models--some--model"


def again():
    download.located.cache_clear()
    return download.located("some/model")


def test_a_run_on_a_hub_id_trains_and_reads_again_from_the_cache(hub, tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for name in ("german", "french"):
        text = (ROOT / f"data/handbook/{name}.txt").read_text(encoding="utf-8")
        (data / f"{name}.txt").write_text(text[:60_000], encoding="utf-8")
    given = dict(model="some/model", data=data, out=out, blocks=2, steps=4, batch=2, seq_len=16, eval_len=16, rank=2,
                 kv_tokens=3, fisher_sequences=4, sparsity=0.05, dtype="float32")  # fmt: skip
    assert train.main([x for n, v in given.items() for x in ("--" + n.replace("_", "-"), str(v))]) == 0
    assert json.loads((out / "settings.json").read_text())["model"] == "some/model"
    got = [path for _, method, path, _ in hub.asked if method == "GET" and path.startswith("/some")]
    assert sorted(path.rpartition("/")[2] for path in got) == sorted(set(hub.files) - {"original.safetensors"})
    n = len(hub.asked)
    again()
    assert len(hub.asked) == n + 3  # config.json for the commit, and two files that the model has not
    assert not any(method == "GET" for _, method, *_ in hub.asked[n:])


def test_what_arrives_is_what_transformers_tools_find_in_the_cache(hub, tmp_path):
    from huggingface_hub import try_to_load_from_cache

    folder = download.located("some/model")
    assert folder == store(tmp_path) / "snapshots" / COMMIT and (store(tmp_path) / "refs/main").read_text() == COMMIT
    for name in set(hub.files) - {"original.safetensors"}:
        assert (folder / name).read_bytes() == hub.files[name]
        found = try_to_load_from_cache("some/model", name, cache_dir=tmp_path / "hf/hub")
        assert Path(found) == folder / name
    whole = load("some/model")
    shard = load_file(folder / "model-00002-of-00002.safetensors")
    assert torch.equal(whole.state_dict()["norm.weight"], shard["model.norm.weight"])
    assert Tokenizer.from_folder("some/model").encode("Der Kernel")


def test_without_weights_only_the_config_is_asked_for(hub, capsys):
    flags = ["--blocks", "2", "--sparsity", "0.05", "--data", "nowhere"]
    assert train.main(["--dry-run", "--model", "some/model", *flags]) == 0
    assert "peak memory" in capsys.readouterr().out
    assert {path.rpartition("/")[2] for *_, path, _ in hub.asked} == {"config.json"}


def test_the_token_goes_to_the_hub_and_never_to_the_cdn(hub):
    download.located("some/model")
    sent = {name: {h.get("Authorization") for n, _, _, h in hub.asked if n == name} for name in ("hub", "cdn")}
    assert sent == {"hub": {"Bearer secret"}, "cdn": {None}}


def test_a_connection_that_is_cut_goes_on_where_it_was(hub):
    file = "model-00001-of-00002.safetensors"
    hub.cut = {file: 1000}
    assert (download.located("some/model") / file).read_bytes() == hub.files[file]
    ranges = [h.get("Range") for name, h in hub.asked_for("GET", file) if name == "cdn"]
    assert ranges == ["bytes=0-", "bytes=1000-"]


def test_a_download_that_was_killed_goes_on_in_the_next_process(hub, tmp_path):
    file = "model-00001-of-00002.safetensors"
    part = store(tmp_path) / "blobs" / f"{hashlib.sha256(hub.files[file]).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.files[file][:777])
    assert (download.located("some/model") / file).read_bytes() == hub.files[file]
    assert [h.get("Range") for name, h in hub.asked_for("GET", file) if name == "cdn"] == ["bytes=777-"]
    assert not list(store(tmp_path).rglob("*.incomplete")) and not list(store(tmp_path).rglob("*.part"))


def test_a_server_without_ranges_sends_it_all_again(hub):
    file, hub.ranges = "model-00001-of-00002.safetensors", False
    hub.cut = {file: 1000}
    assert (download.located("some/model") / file).read_bytes() == hub.files[file]


def test_a_connection_that_gives_nothing_ends_in_a_sentence_and_keeps_what_is_there(hub, tmp_path, monkeypatch):
    file = "model-00001-of-00002.safetensors"
    hub.cut = {file: 1000}
    real = Handler.answer

    def stalled(self, status, headers, body=b"", cut=None):
        dead = self.name == "cdn" and self.headers.get("Range") == "bytes=1000-"
        real(self, status, headers, body, 0 if dead else cut)

    monkeypatch.setattr(Handler, "answer", stalled)
    with pytest.raises(BadInput, match=r"broke off .* goes on from there"):
        download.located("some/model")
    assert (
        len([1 for n, h in hub.asked_for("GET", file) if n == "cdn" and h["Range"] == "bytes=1000-"]) == download.TRIES
    )
    assert [path.stat().st_size for path in store(tmp_path).rglob("*.incomplete")] == [1000]
    assert not (store(tmp_path) / "snapshots" / COMMIT / file).exists()
    monkeypatch.undo()


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_what_arrives_damaged_is_refused_and_deleted(hub, tmp_path, file):
    hub.wrong.add(file)
    with pytest.raises(BadInput, match=f"{file} did not arrive as it is on the Hub"):
        download.located("some/model")
    assert not (store(tmp_path) / "snapshots" / COMMIT / file).exists()
    assert not list(store(tmp_path).rglob("*.incomplete"))
    hub.wrong.clear()
    assert (again() / file).read_bytes() == hub.files[file]


def test_401_and_403_say_what_to_do(hub, monkeypatch, capsys):
    hub.status = {"all": 401, "Bearer secret": 403, "Bearer member": None}
    train_it = ["--model", "some/model", "--dry-run"]
    assert train.main(train_it) == 2 and "ask for access on that page" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert train.main(train_it) == 2 and "set HF_TOKEN" in capsys.readouterr().err
    assert train.main(["--model", "no/where", "--dry-run"]) == 2 and "check the name" in capsys.readouterr().err
    download.home().mkdir()
    (download.home() / "token").write_text("member\n")  # what `hf auth login` leaves
    assert (download.located("some/model") / "config.json").exists()


def test_a_model_that_was_renamed_and_a_revision_are_followed(hub):
    assert json.loads((download.located("old/name") / "config.json").read_text()) == CONFIG
    assert download.located(f"some/model@{COMMIT}").name == COMMIT
    assert all(h.get("Authorization") == "Bearer secret" for name, *_, h in hub.asked if name == "hub")


def test_a_redirect_to_another_server_or_in_a_circle_gets_no_token_and_ends(hub, monkeypatch):
    for to in f"//{hub.url['cdn'][7:]}/some/model/resolve/main/config.json", "/old/name/resolve/main/config.json":
        monkeypatch.setattr(Handler, "do_GET", lambda self, to=to: (
            self.hub.asked.append((self.name, self.command, self.path, dict(self.headers))),
            self.answer(307, {"Location": to})))  # fmt: skip
        with pytest.raises(BadInput):
            download.located(f"old/name@{len(to)}")
    assert len(hub.asked) < 15 and all(name == "hub" for name, *_ in hub.asked)


def test_a_server_in_trouble_leaves_what_is_in_the_cache(hub):
    folder = download.located("some/model")
    hub.status = {"all": 503, "Bearer secret": 503}
    assert again() == folder
    with pytest.raises(BadInput, match="it answers 503"):
        download.located("some/model@other")


def test_a_token_with_a_line_end_and_a_wrong_endpoint(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    assert download.located("some/model").exists()
    monkeypatch.setenv("HF_ENDPOINT", "localhost")
    with pytest.raises(BadInput, match="has to begin with https"):
        again()


def test_without_a_network_the_cache_has_to_do(hub, monkeypatch):
    folder = download.located("some/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert again() == folder
    with pytest.raises(BadInput, match="the Hub does not answer"):
        download.located("other/model")


def test_a_folder_of_that_name_comes_first_and_a_path_is_no_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(download.located("some/model"), tmp_path / "my/model")
    hub.asked.clear()
    assert download.located("my/model") == Path("my/model")
    for path in "/nowhere/at/all", "../model", "données/modèle":
        with pytest.raises(BadInput, match=r"config\.json does not exist"):
            load(path)
    assert hub.asked == []
