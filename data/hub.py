"""A pretrained model by its Hub id: `model_folder("Qwen/Qwen3-0.6B")` is a folder in Hugging Face's own cache.

The library `huggingface_hub` downloads. It resumes, verifies, shares the cache between processes, and obeys HF_HOME,
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import re
from pathlib import Path

from data import BadInput
from data.checkpoint import BESIDE, INDEX

HUB_ID = r"(?a)(?!\.)([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?"  # owner/model or owner/model@revision
SMALL = ["config.json", *BESIDE]  # BESIDE: what is saved with a backbone
WEIGHTS = ["*.safetensors", INDEX]


def model_folder(name, weights=True):
    """The folder of a model: `name` itself if it looks like a path, otherwise the snapshot of that Hub id.

    weights=False leaves the weights out. BadInput if the model is neither here nor on the Hub.
    """
    hub_id = re.fullmatch(HUB_ID, str(name))
    path = Path(name)
    if path.exists() or hub_id is None or path.parent.is_dir():  # a/b is a path if the folder a exists
        return path
    where = f"{name} is no folder here"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise BadInput(f"{where}; to get it from the Hub: pip install huggingface_hub.") from None

    repo, revision = hub_id.groups()
    files = SMALL + WEIGHTS if weights else SMALL
    others = ["*/*.safetensors", "consolidated*"]  # the same weights for other libraries
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=others))
    except errors.GatedRepoError:
        raise BadInput(f"{where}, and gated on the Hub; ask for access on its page there, and set HF_TOKEN.") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise BadInput(f"{where} and not public on the Hub; check name and revision, or set HF_TOKEN.") from None
    except Exception as error:  # each way of transport has its own exceptions
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{where}, and the Hub did not give it ({reason}); try again, it goes on from there.") from None
