"""Run anyone's script or module with this package's encoders registered.

For programs that build models by name and cannot be told to import anything::

    python -m lk_backbones.run train.py --model replknet_31n …
    python -m lk_backbones.run -m package.train --model replknet_31n …
    torchrun --nproc-per-node 2 -m lk_backbones.run train.py --model replknet_31n …

The program sees what it would see otherwise: its arguments, import path and ``__main__``. The processes that it starts
through multiprocessing, by any start method, and those that Lightning starts for it know the encoders too.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, NoReturn

import lk_backbones  # registers the encoders

USAGE = "usage: python -m lk_backbones.run (SCRIPT | -m MODULE) [ARGUMENT ...]"
# What is run, as JSON: processes that are started for it find it here, as their command lines do not say it.
VARIABLE = "LK_BACKBONES_RUN"


class _MainSpec(ModuleSpec):
    """Spec of the program's ``__main__``.

    multiprocessing and Lightning have a new process run what the spec names: this module, which then runs the program.
    Relative imports go by the parent, which is the program's own.
    """

    def __init__(self, loader: Any, origin: str, parent: str) -> None:
        super().__init__("lk_backbones.run", loader, origin=origin)
        self._parent = parent

    @property
    def parent(self) -> str:
        """Package of the program, empty for a script."""
        return self._parent


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def _parse(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into what names the program, ``[script]`` or ``["-m", module]``, and its arguments."""
    recorded = json.loads(os.environ.get(VARIABLE, "null"))
    if recorded is not None and recorded["arguments"] == arguments:
        return recorded["program"], arguments  # Lightning starts further processes with the program's arguments alone
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        sys.exit()
    words = 2 if arguments[:1] == ["-m"] else 1
    if len(arguments) < words or (words == 1 and arguments[0].startswith("-")):
        _refuse(USAGE)
    return arguments[:words], arguments[words:]


def _load_script(name: str) -> tuple[CodeType, _MainSpec]:
    file = os.path.abspath(name)
    if not os.path.isfile(file):
        _refuse(f"no script {name!r} in {os.getcwd()}; -m goes before the name of a module")
    with io.open_code(file) as source:
        code = compile(source.read(), file, "exec", dont_inherit=True)
    return code, _MainSpec(SourceFileLoader("__main__", file), file, "")


def _load_module(name: str) -> tuple[CodeType, _MainSpec]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:
        _refuse(f"no module {name!r} to run: {error}")
    code = getattr(spec.loader, "get_code", lambda name: None)(spec.name) if spec is not None else None
    if spec is None or spec.origin is None or code is None:
        _refuse(f"no module {name!r} to run")
    return code, _MainSpec(spec.loader, spec.origin, spec.parent or "")


def _run(program: list[str], name: str) -> dict[str, Any]:
    """Execute a program as the module ``name``; return what it defines."""
    is_script = len(program) == 1
    code, spec = _load_script(program[0]) if is_script else _load_module(program[1])
    if name == "__main__":  # else multiprocessing has brought arguments and path from the process that did this
        sys.argv[0] = program[0] if is_script else str(spec.origin)
        if not getattr(sys.flags, "safe_path", False) and is_script:
            sys.path[0] = os.path.dirname(os.path.realpath(program[0]))
        root = os.path.dirname(os.path.dirname(os.path.abspath(lk_backbones.__file__)))
        if root not in map(os.path.abspath, sys.path):  # found in the working directory, which the path had so far
            sys.path.append(root)
    module = ModuleType(name)
    vars(module).update(
        __file__=spec.origin, __spec__=spec, __loader__=spec.loader, __package__=None if is_script else spec.parent
    )
    sys.modules[name] = sys.modules["__mp_main__"] = module  # the latter is what multiprocessing calls the former
    exec(code, vars(module))
    return vars(module)


if __name__ == "__main__":
    _program, sys.argv[1:] = _parse(sys.argv[1:])
    _found_anywhere = [os.path.abspath(_program[0])] if len(_program) == 1 else _program
    os.environ[VARIABLE] = json.dumps({"program": _found_anywhere, "arguments": sys.argv[1:]})
    _run(_program, "__main__")
elif __name__ == "__mp_main__":  # a process of multiprocessing, which takes its __main__ from here
    globals().update(_run(json.loads(os.environ[VARIABLE])["program"], "__mp_main__"))
