"""Register the attention backends with Transformers: at once if it is loaded, otherwise when it is imported.

Importing the models of Transformers takes seconds, which a process that only needs the ring or the planner should not
spend. So a finder at the front of `sys.meta_path` watches for the two modules that hold the tables of attention and
mask functions. It delegates to the finders behind it, and adds our functions after the module was executed. Only then
does it import `backend`, which imports nothing from Transformers and so can load while Transformers does. (Post-import
hooks: PEP 369, as in wrapt.)
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ..attn_names import BACKENDS

# Module of Transformers -> (its table, the function in `backend` that goes there).
_TABLES = {
    "transformers.modeling_utils": ("AttentionInterface", "attention"),
    "transformers.masking_utils": ("AttentionMaskInterface", "mask_2d"),
}


class _Finder(MetaPathFinder):
    """Find the modules of `_TABLES` by the finders behind this one, and fill their tables after each execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        finders = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        # Patch the loader instead of wrapping it: its type and its other methods stay the original's.
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if module.__name__ in _TABLES:
                _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def register_backends() -> None:
    """Register our attention implementations with Transformers, as `import ring_hf` does. Idempotent."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for name in _TABLES:
        if name in sys.modules:
            _register(importlib.import_module(name))  # waits if another thread is loading it


def _register(module: ModuleType) -> None:
    from . import backend

    table_name, function_name = _TABLES[module.__name__]
    for name in BACKENDS:
        # The classmethod: item assignment would be local to one instance.
        getattr(module, table_name).register(name, getattr(backend, function_name))
