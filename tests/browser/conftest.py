"""A real JupyterLab and a real headless Chromium, as the student has them."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from opened import opened

ROOT = Path(__file__).resolve().parents[2]
PORT_WAIT = 90


def find_chromium():
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    assert path, "the browser tests need Chromium: install your system's package `chromium`, or name it in CHROMIUM"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*quiet, "--disable-sync", "--no-first-run"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def jupyterlab(tmp_path_factory):
    """JupyterLab on a copy of labs/, in the smoke profile. Gives the address of a notebook by its lab's name."""
    folder = tmp_path_factory.mktemp("labs")
    shutil.copytree(ROOT / "labs", folder, dirs_exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    settings = tmp_path_factory.mktemp("settings")
    quiet = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    config = tmp_path_factory.mktemp("config")  # a student's environment has no nbgrader in it
    page = config / "labconfig" / "page_config.json"
    page.parent.mkdir()
    page.write_text(json.dumps({"disabledExtensions": {"@jupyter/nbgrader": True}}))
    log = tmp_path_factory.mktemp("log") / "jupyter.log"
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True",
        f"--LabApp.user_settings_dir={settings}", "--ServerApp.allow_root=True", "--ServerApp.port_retries=0",
    ]  # fmt: skip
    environment = {**os.environ, "LECTUREKIT_PROFILE": "smoke", "OMP_WAIT_POLICY": "passive"}
    environment["JUPYTER_CONFIG_PATH"] = str(config)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/api?token={token}", server, log)
        # a workspace for each lab: JupyterLab would put the notebook used before back in front of the new one
        yield lambda lab: f"http://127.0.0.1:{port}/lab/workspaces/{lab}/tree/{lab}/{lab}.ipynb?token={token}"
    finally:
        os.killpg(server.pid, signal.SIGINT)  # twice within five seconds means yes
        time.sleep(1)
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture(scope="module")
def lab(request, chromium, jupyterlab):
    """The notebook of the module's LAB, open for all its tests in turn."""
    with opened(chromium, jupyterlab(request.module.LAB)) as notebook:
        yield notebook


def _wait(address, server, log):
    for _ in range(PORT_WAIT * 2):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
