"""What all tests share: one thread per process, no word from transformers below an error, and a Hub
on loopback.
"""

import gc
import os
import time
import types

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until all is imported: see pytest_collection_finish

# A commit is judged by the same examples every time; look for new ones with
# `scripts/test --hypothesis-profile default`.
hypothesis.settings.register_profile("same-examples", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same-examples")


def pytest_collection_modifyitems(items):
    """The longest tests, and those that one worker must take in turn, first: or one worker waits
    for another at the end.
    """
    first = ["test_real_models.py", "test_pipeline.py"]
    items.sort(key=lambda item: (*first, item.path.name).index(item.path.name))


def pytest_collection_finish():
    """No collection of garbage looks through what was imported: each would take half a second, and
    every Trainer begins with one.
    """
    gc.freeze()
    gc.enable()


TOKEN = "hf_" + "DistinctiveSecret" * 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback that the real client of this process talks to, as HF_ENDPOINT would have
    it; the client does not wait between its attempts, and its cache and token are the test's own.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    from hfprune.publishing.rehearsal import Hub
    from hfprune.publishing.rehearsal_store import User

    resolve = "/{repo_id}/resolve/{revision}/{filename}"
    users = {TOKEN: User("me", organisations={"org": "write", "readers": "read"})}
    with Hub(tmp_path / "hub", users) as made:
        for name, value in {
            "ENDPOINT": made.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.endpoint + resolve,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        waitless = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", waitless)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made
