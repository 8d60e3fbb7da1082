"""The verdicts of `model_families` in the installed Transformers, and the page and the names that are made of them.

The tables of `model_families` hold every family that any supported release of Transformers has. A release lacks those
that are younger, and those of `REFUSED_BEFORE` bypass the attention interface in older ones.
`scripts/update_model_table.py` writes `markdown()` to docs/models.md and `exact_classes()` to
`ring_hf/hf/runtime/proven_classes.py`.
"""

from collections.abc import Iterable

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..hf.runtime.proven_classes import PROVEN_CLASSES, PROVEN_RELEASES, installed_release
from ..text import markdown_table
from .model_families import (
    EXACT,
    REASONS,
    REFUSED,
    REFUSED_BEFORE,
    ROUTED,
    ROUTER_LOSS_FAILS,
    UNTESTED,
    model_class,
)


def exact_families() -> set[str]:
    """Return the families of `EXACT`, without those of which only a variant is exact."""
    return {name.split("/")[0] for name in EXACT} - set(refused_families())


def refused_families() -> dict[str, str]:
    """Return the key of the reason by family, in the newest release."""
    return {family: reason for reason, families in REFUSED.items() for family in families.split()}


def installed_exact(names: Iterable[str] = EXACT) -> list[str]:
    """Return those names that the installed Transformers has and that are exact in it.

    Args:
        names: families of `EXACT`, and their variants.
    """
    refused, differing = installed_refused(), installed_differing()
    return [
        name
        for name in names
        if _is_installed(name) and ("/" in name or name not in refused) and name not in differing
    ]


def installed_differing() -> list[str]:
    """Return the names of `EXACT` that are not exact in the installed release, which only the trial step shows."""
    classes = PROVEN_RELEASES.get(installed_release(), frozenset())
    return [name for name in EXACT if _is_installed(name) and _class_name(name) in classes]


def installed_routed() -> list[str]:
    """Return the names of `ROUTED` that are exact in the installed Transformers and able to compute that loss."""
    failing = ROUTER_LOSS_FAILS.get(installed_release(), "").split()
    return [name for name in installed_exact(ROUTED) if name not in failing]


def installed_refused() -> dict[str, str]:
    """Return the key of the reason by family, for the families that the installed Transformers has."""
    installed_release = Version(transformers.__version__).release
    before = {
        family: reason
        for family, (release, reason) in REFUSED_BEFORE.items()
        if installed_release < Version(release).release
    }
    return {family: reason for family, reason in (refused_families() | before).items() if _is_installed(family)}


def _is_installed(name: str) -> bool:
    return name.split("/")[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _class_name(name: str) -> str:
    return model_class(CONFIG_MAPPING[name.split("/")[0]]).__name__


def exact_classes() -> set[str]:
    """Return the names of the model classes of the families of `EXACT`, in all releases.

    Those of other releases are the listed ones that the installed Transformers lacks. Classes of `REFUSED_BEFORE` are
    among the names: a release in which they are refused checks the rules about models before it looks up names.
    """
    classes = {_class_name(name) for name in EXACT if _is_installed(name)}
    return classes | {name for name in PROVEN_CLASSES if not hasattr(transformers, name)}


def markdown() -> str:
    """Return the table of docs/models.md: of all releases, with the verdict of the newest."""
    rows = [("exact", list(EXACT))]
    rows += [(f"refused: {reason.title}", REFUSED[key].split()) for key, reason in REASONS.items()]
    cells = [["", "", "families of Transformers, by `model_type`"]]
    for title, families in rows:
        cells.append([title, str(len(families)), ", ".join(families)])
    untested = "; ".join(f"`{family}` ({why})" for family, why in UNTESTED.items())
    before = ", ".join(f"`{family}` before Transformers {release}" for family, (release, _) in REFUSED_BEFORE.items())
    count = f"{len(exact_families())} families exact ({len(EXACT)} configurations), {len(refused_families())} refused"
    compared = "Compared is an optimizer step of an unmodified Trainer, in two processes and in one."
    table = markdown_table(cells, align="lrl", padded=False)
    text = f"{count} before anything is computed; not tested: {untested}. Also refused: {before}. {compared}"
    return f"{text}\n\n{table}"
