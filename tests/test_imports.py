"""An import is quiet: it asks nobody, starts nothing and prints nothing."""

from __future__ import annotations

import os
import subprocess
import sys

# The hook sees every connection, also of threads and of libraries that catch the error.
SCRIPT = """
import importlib, os, pkgutil, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        os.write(1, f"{event}{arguments}\\n".encode())
        raise OSError("the network is not to be used")

sys.addaudithook(watch)
package = importlib.import_module("lk_backbones")
for module in pkgutil.walk_packages(package.__path__, "lk_backbones."):
    importlib.import_module(module.name)
assert {"lk_backbones.cli.training", "lk_backbones.data.coco", "albumentations"} <= sys.modules.keys()
"""


def test_no_module_uses_the_network_or_prints() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout + run.stderr == ""
