"""Public names that load their module on first use (PEP 562), so that a part of the package costs only itself.

Python runs `ring_hf/__init__.py` before any submodule. If it imported the Transformers side, a process that only wants
the geometry would wait seconds for the Trainer.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def export_lazily(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the functions `__getattr__` and `__dir__` of a package.

    Args:
        package: its full name, `__name__`.
        names: by module below the package, the names it provides. A module without a dot is itself an attribute.

    The returned `__getattr__` raises `AttributeError` for any other name.
    """
    providers = {name: module for module, provided in names.items() for name in provided}
    modules = {module for module in names if "." not in module}
    assert not modules & set(providers), f"{package}: {modules & set(providers)} would be a module and a name of one"

    def load(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in providers:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{providers[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *providers, *modules})

    return load, list_names
