"""What every test may count on: fixed seeds, skips that give their reason, and a way to cut the network."""

import socket

import pytest

pytest.register_assert_rewrite("anatomy", "opened")


def pytest_collection_modifyitems(items):
    """Skip what this machine cannot run, each with its reason."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if any(item.get_closest_marker("models") for item in items):
        from lecturekit.models import FETCH, available

        absent = [name for name, there in available().items() if not there]
        for item in items:
            if absent and item.get_closest_marker("models"):
                item.add_marker(pytest.mark.skip(reason=f"{', '.join(absent)} not in the cache: run `{FETCH}`"))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whichever tests ran before it."""
    from lecturekit.runtime import seed_everything

    seed_everything(0)
    return 0


@pytest.fixture
def offline(monkeypatch):
    """No network: connecting anywhere but to this machine, and asking for an address, raises."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo
    here = ("127.0.0.1", "::1", "localhost", None)

    def guarded_connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in here:
            raise AssertionError(f"the network was used: connect to {address}")
        return connect(self, address)

    def guarded_lookup(host, *arguments, **options):
        if host not in here:
            raise AssertionError(f"the network was used: look up {host}")
        return lookup(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
