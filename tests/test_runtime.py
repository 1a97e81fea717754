"""One device, one seed, one profile, whole files."""

import os
import random
import stat

import numpy
import pytest
import torch

from lecturekit import runtime


def draws():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def test_the_same_seed_gives_the_same_numbers_in_all_three_generators():
    runtime.seed_everything(7)
    first = draws()
    runtime.seed_everything(7)
    assert draws() == first
    runtime.seed_everything(8)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_a_seed_larger_than_numpys_is_taken():
    runtime.seed_everything(2**40 + 5)
    first = draws()
    runtime.seed_everything(2**40 + 5)
    assert draws() == first


@pytest.mark.parametrize("seed", ["0", 1.0, True, None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        runtime.seed_everything(seed)


def test_the_device_can_be_named(monkeypatch):
    monkeypatch.delenv("LECTUREKIT_DEVICE", raising=False)
    assert runtime.device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("LECTUREKIT_DEVICE", "cuda:1")
    assert runtime.device() == torch.device("cuda", 1)


def test_the_profile_is_full_unless_named(monkeypatch):
    monkeypatch.delenv("LECTUREKIT_PROFILE", raising=False)
    assert runtime.profile() == "full"
    monkeypatch.setenv("LECTUREKIT_PROFILE", "smoke")
    assert runtime.profile() == "smoke"
    monkeypatch.setenv("LECTUREKIT_PROFILE", "quick")
    with pytest.raises(ValueError, match="smoke, full, got 'quick'"):
        runtime.profile()


def test_the_cache_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("LECTUREKIT_CACHE", str(tmp_path))
    assert runtime.cache_dir() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LECTUREKIT_CACHE", "~/models")
    assert runtime.cache_dir() == tmp_path / "models"
    monkeypatch.delenv("LECTUREKIT_CACHE")
    assert runtime.cache_dir().name == "lecturekit"


def test_progress_gives_every_item_once():
    assert list(runtime.progress(range(5), "counting")) == [0, 1, 2, 3, 4]


def test_threads_are_put_back_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), runtime.threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_a_file_is_written_whole_with_the_usual_rights(tmp_path):
    path = runtime.atomic_write(tmp_path / "new" / "file.txt", "naïve")
    assert path.read_bytes() == "naïve".encode()
    runtime.atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    usual = tmp_path / "usual"
    usual.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = runtime.atomic_write(tmp_path / "file.txt", "old")

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runtime.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_lab_starts_from_the_seed_of_the_environment(monkeypatch):
    monkeypatch.delenv("LECTUREKIT_SEED", raising=False)
    assert runtime.base_seed() == 0
    monkeypatch.setenv("LECTUREKIT_SEED", "3")
    assert runtime.base_seed() == 3
    monkeypatch.setenv("LECTUREKIT_SEED", "-1")
    with pytest.raises(ValueError, match="LECTUREKIT_SEED must be a whole number from 0 on, got '-1'"):
        runtime.base_seed()
