"""A pretrained model by its Hub id: `model_folder("Qwen/Qwen3-0.6B")` is a folder of Hugging Face's own cache.

The library `huggingface_hub` does the work: it resumes, verifies, shares the cache between processes, and heeds
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE as all of Hugging Face's tools do.
"""

import re
from pathlib import Path

from data import BadInput

HUB_ID = r"(?a)(?!\.)([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?"  # owner/model or owner/model@revision
CONFIG = ["config.json"]
WEIGHTS = ["*.safetensors", "model.safetensors.index.json"]
TEXT = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def model_folder(name, weights=True):
    """The folder of a model: `name` itself if it reads like a path or like no Hub id, else that id's snapshot.

    Without `weights` the snapshot need not have more than config.json. BadInput if it is neither here nor there.
    """
    hub_id = re.fullmatch(HUB_ID, str(name))
    path = Path(name)
    if path.exists() or hub_id is None or path.parent.is_dir():  # in a folder that is here a name is never asked for
        return path
    where = f"{name} is no folder here"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise BadInput(f"{where}; to get it from the Hub: pip install huggingface_hub.") from None

    repo, revision = hub_id.groups()
    files = CONFIG
    if weights:
        files = CONFIG + TEXT + WEIGHTS
    try:
        others = ["*/*", "consolidated*"]  # sub-folders and these hold the same weights for other libraries
        folder = snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=others)
        return Path(folder)
    except errors.GatedRepoError:
        raise BadInput(f"{where}, and gated on the Hub; ask for access on its page there, and set HF_TOKEN.") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise BadInput(f"{where} and not public on the Hub; check name and revision, or set HF_TOKEN.") from None
    except Exception as error:  # each way of transport has exceptions of its own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{where}, and the Hub did not give it ({reason}); try again, it goes on from there.") from None
