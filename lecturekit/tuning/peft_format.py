"""PEFT's adapter format: a folder with adapter_config.json and adapter_model.safetensors.

A key is "base_model.model." + the layer's name + ".lora_A.weight" or ".lora_B.weight". Read and written here are
plain LoRA adapters only; what the branches compute is in lora.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT wraps the model twice, and its key names show it
Branches = dict[str, tuple[Tensor, Tensor]]  # layer name -> (A, B)

# Switches of PEFT's LoraConfig that change what the branch computes, with the one value that LoRALinear computes.
PLAIN_LORA: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_rslora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "velora_config": None,
    "alpha_pattern": {},
    "rank_pattern": {},
}
# Ways to initialise A and B that leave the base weights alone (PiSSA, OLoRA, LoftQ and others change them).
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


def write(
    directory: Path,
    branches: Mapping[str, tuple[Tensor, Tensor]],
    r: int,
    alpha: float,
    dropout: float,
    targets: list[str],
) -> None:
    """Write an adapter so that no reader ever sees half of one.

    Both files are first written whole to a temporary folder. Then the old config goes, the weights are replaced,
    and the new config comes last: a folder that has a config always holds one complete save.
    """
    from safetensors.torch import save

    tensors = {}
    for name, (A, B) in branches.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.detach().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        weights_file, config_file = (Path(temporary, WEIGHTS_FILE), Path(temporary, CONFIG_FILE))
        # Not save_file, whose files only their owner can read: a shared course folder must stay readable.
        weights_file.write_bytes(save(tensors, metadata={"format": "pt"}))
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        os.replace(weights_file, directory / WEIGHTS_FILE)
        os.replace(config_file, directory / CONFIG_FILE)


def read(directory: Path) -> tuple[dict[str, Any], Branches]:
    """The config, with at least r and lora_alpha, and the branches (A, B) by layer name, their ranks checked.

    Raises FileNotFoundError when a file is missing, ValueError when one is damaged or is not plain LoRA.
    """
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory} holds no complete LoRA adapter: {file} is missing")
    config = _read_config(directory / CONFIG_FILE)
    return config, _read_branches(directory / WEIGHTS_FILE, config["r"])


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except ValueError as error:  # broken JSON, or bytes that are no text
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f'{file} must describe a LoRA adapter, with "peft_type": "LORA"')
    for key, plain in PLAIN_LORA.items():
        if (config.get(key, plain) or None) != (plain or None):
            raise ValueError(f"{file} sets {key} to {config[key]!r}; only {plain!r} can be loaded")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise ValueError(
            f"{file} sets init_lora_weights to {config['init_lora_weights']!r}, which changes the base model"
        )
    missing = [key for key in ("r", "lora_alpha") if config.get(key) is None]
    if missing:
        raise ValueError(f"{file} must set {missing[0]}")
    return config


def _read_branches(file: Path, r: int) -> Branches:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    endings = (".lora_A.weight", ".lora_B.weight")
    strange = [key for key in tensors if not (key.startswith(PREFIX) and key.endswith(endings))]
    if strange or not tensors:
        found = repr(strange[0]) if strange else "no tensor at all"
        raise ValueError(f"{file} must hold only lora_A and lora_B weights, got {found}")
    branches = {}
    for name in sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}):
        A = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        B = tensors.get(f"{PREFIX}{name}.lora_B.weight")
        if A is None or B is None:
            raise ValueError(f"{file} must hold lora_A and lora_B of {name}, got only one of them")
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != r or B.shape[1] != r:
            came = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"{file} must hold A (r, in) and B (out, r) of {name} with r = {r}, got {came}")
        branches[name] = (A, B)
    return branches
