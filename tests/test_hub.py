"""Models by their Hub id: what snapshot_download is asked for, its errors in a sentence, and it itself against a server."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

import train
from data import BadInput
from data.checkpoint import load
from data.hub import model_folder
from test_train import flags, world  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What snapshot_download is asked for: [(repository, settings)]. Its answer is the folder tmp_path/base."""
    calls = []

    def answer(repo, **settings):
        calls.append((repo, settings))
        return str(tmp_path / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    return calls


# What is asked of the Hub --------------------------------------------------------------------------------------------


def test_an_id_with_and_without_a_revision(asked, tmp_path):
    assert model_folder("some/model") == model_folder("some/model@v1.0") == tmp_path / "base"
    assert [(repo, settings["revision"]) for repo, settings in asked] == [("some/model", None), ("some/model", "v1.0")]


@pytest.mark.parametrize("weights", [True, False])
def test_only_the_files_that_are_read_are_asked_for(asked, weights):
    model_folder("some/model", weights=weights)
    patterns = {name: asked[0][1][name] for name in ("allow_patterns", "ignore_patterns")}
    there = ["README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin",
             "model.safetensors.index.json", "onnx/config.json", "onnx/model.safetensors", "training_args.bin", "special_tokens_map.json",
             "added_tokens.json", "additional_chat_templates/rag.jinja", "onnx/tokenizer.json"]  # fmt: skip
    others = (".bin", ".md") if weights else (".bin", ".md", ".safetensors", ".index.json")
    wanted = [name for name in there if not name.startswith("onnx/") and not name.endswith(others)]
    assert list(huggingface_hub.utils.filter_repo_objects(there, **patterns)) == wanted


def test_a_folder_comes_first_and_a_path_is_no_id(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my/model").mkdir(parents=True)
    assert model_folder("my/model") == model_folder(Path("my/model")) == Path("my/model")
    for path in "/nowhere/at/all", "../model", "./model", "model", "a/b/c", "données/modèle", "a/b@", "@a/b":
        assert model_folder(path) == Path(path)
        with pytest.raises(BadInput, match=r"config\.json cannot be read"):
            load(model_folder(path))
    assert asked == []


def test_a_run_on_a_hub_id_trains(asked, world, capsys):  # noqa: F811
    assert train.main(flags(world, model="some/model")) == 0
    assert json.loads((world / "runs/one/settings.json").read_text())["model"] == "some/model"
    assert {repo for repo, _ in asked} == {"some/model"}
    asked.clear()
    assert train.main([*flags(world, model="some/model"), "--dry-run"]) == 0
    assert "peak memory" in capsys.readouterr().out
    assert asked and all("*.safetensors" not in settings["allow_patterns"] for _, settings in asked)


# What goes wrong -----------------------------------------------------------------------------------------------------


def http_error(kind, status=404, message="the server's own words\nRequest ID: 1"):
    """An error as the library raises it, with a response of its own HTTP library."""
    library = sys.modules[huggingface_hub.get_session().__module__.partition(".")[0]]
    request = library.Request("GET", "https://hub")
    return kind(message, response=library.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (http_error(errors.RepositoryNotFoundError, 401), "not public on the Hub; check name and revision, or set HF_TOKEN"),
        (http_error(errors.RevisionNotFoundError), "check name and revision"),
        (errors.HFValidationError("-- in the name"), "check name and revision"),
        (http_error(errors.GatedRepoError, 403), "gated on the Hub; ask for access"),
        (http_error(errors.HfHubHTTPError, 503), r"the Hub did not give it \(the server's own words\); try again"),
        (http_error(errors.RemoteEntryNotFoundError), "the Hub did not give it"),
        (errors.LocalEntryNotFoundError("outgoing traffic has been disabled."), "outgoing traffic has been disabled"),
        (errors.OfflineModeIsEnabled("offline mode is enabled"), "offline mode is enabled"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (TimeoutError(), r"\(TimeoutError\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_each_error_is_one_sentence(monkeypatch, capsys, error, sentence):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BadInput, match=f"some/model is no folder here.*{sentence}") as refused:
        model_folder("some/model")
    assert "\n" not in str(refused.value)
    assert train.main(["--model", "some/model", "--dry-run"]) == 2
    assert capsys.readouterr().err == f"train.py: {refused.value}\n"


def test_without_the_library_a_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"pip install huggingface_hub\.$"):
        model_folder("some/model")
    assert model_folder(tmp_path) == tmp_path


# The library itself, against a server that plays the Hub ----------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answers for some/model, whose `files` are {name: bytes}, and gated/model; `log`: [(method, file)]."""

    files, log = {}, []

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if "gated/model" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "some/model" not in path:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/some/model/revision/"):
            if name == "main":
                self.answer(200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode())
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/some/model/tree/"):
            tree = [dict(type="file", path=name, size=len(raw), oid=oid(raw)) for name, raw in self.files.items()]
            self.answer(200, json.dumps(tree).encode())
        else:
            self.log.append((self.command, name))
            raw = self.files[name]
            self.answer(200, raw, {"ETag": f'"{oid(raw)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def oid(raw):
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def in_a_process(names, **environment):
    """What model_folder(name) says in a process of its own, which reads the environment afresh: the folder or the error."""
    code = (
        "import json, sys\nfrom data import BadInput\nfrom data.hub import model_folder\n"
        "for name in sys.argv[1:]:\n    try: print(model_folder(name))\n    except BadInput as error: print(error)\n"
    )
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    inherited = {n: v for n, v in os.environ.items() if n.lower() not in proxies and not n.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True,
                          env=inherited | environment)  # fmt: skip
    return done.stdout.splitlines()


def test_the_library_downloads_and_the_cache_does_when_the_hub_is_gone(world):  # noqa: F811
    Hub.files = {path.name: path.read_bytes() for path in (world / "base").iterdir()} | {"README.md": b"not asked for"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = dict(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(world / "hf"), HF_TOKEN="secret"
    )
    folder, revision, gated, unknown = in_a_process(
        ["some/model", "some/model@other", "gated/model", "no/where"], **environment
    )
    server.shutdown()
    server.server_close()

    assert Path(folder) == world / "hf/hub/models--some--model/snapshots" / COMMIT
    assert {path.name for path in Path(folder).iterdir()} == set(Hub.files) - {"README.md"}
    for path in (world / "base").iterdir():
        assert (Path(folder) / path.name).read_bytes() == path.read_bytes()
    load(Path(folder))
    assert "check name and revision" in revision and "set HF_TOKEN" in unknown and "ask for access" in gated

    # The server is gone: what is in the cache has to do, and what is not there is named.
    cached, missing = in_a_process(["some/model", "other/model"], **environment)
    assert cached == folder and "the Hub did not give it" in missing
    assert in_a_process(["some/model"], **environment, HF_HUB_OFFLINE="1") == [folder]
    shutil.rmtree(world / "hf")
    (line,) = in_a_process(["some/model"], **environment, HF_HUB_OFFLINE="1")
    assert line.startswith("some/model is no folder here, and the Hub did not give it (")
