"""Import statements of pasted files, and what is said of those that lead nowhere."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from models.pasted.families import CUDA_ONLY, Family
from utils.errors import UserError, nearest


class PastedImportError(UserError, ModuleNotFoundError):
    """A pasted file imports what is not known here; it may catch that as it would catch Python's own error."""


class Statement(NamedTuple):
    """An import statement of a user's file; `full` is "" where a relative name has no package to start from."""

    name: str
    names: tuple[str, ...]
    level: int
    full: str
    place: str

    @property
    def path(self) -> list[str]:
        """Packages and the module, as far as they are known."""
        return (self.full or self.name).split(".")

    @property
    def needs_cuda(self) -> bool:
        """Whether it asks for a CUDA extension that nothing stands for."""
        return not CUDA_ONLY.isdisjoint(self.path)

    def text(self, names: Sequence[str] = ()) -> str:
        """`from models.common import Foo`."""
        module = "." * self.level + self.name
        names = names or self.names
        return f"from {module} import {', '.join(names)}" if names else f"import {module}"


def without_cuda(statement: Statement) -> PastedImportError:
    """What to do about a CUDA extension that is not there."""
    missing = next(part for part in statement.path if part in CUDA_ONLY)
    return PastedImportError(
        f"{statement.place}: {statement.text()} - {missing} is not installed, needs a CUDA extension and has no equivalent "
        "here, expected layers of torch alone. Install it, or take a block without it"
    )


def alone(statement: Statement) -> PastedImportError:
    """What to say of a relative import that leads nowhere."""
    told = f"{statement.place}: {statement.text()}"
    if statement.level == 1 and statement.name.isidentifier():
        own = statement.place.split(" ")[0]
        return PastedImportError(
            f"{told} - no {statement.name}.py lies beside {own}, and {_not_known(statement.names)}. Put the file there, or "
            "paste what is missing"
        )
    return PastedImportError(
        f"{told} - got a relative import in a file that stands alone, expected a name of its package. Name the package's "
        "folder, with an __init__.py, by `imports:`, or paste what is missing"
    )


def _not_known(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not known here"


def unknown(statement: Statement, family: Family) -> PastedImportError:
    """What to say of names that neither a module nor the table has."""
    if statement.needs_cuda:
        return without_cuda(statement)
    known = family.public()
    missing = [name for name in statement.names if name not in known and name != "*"]
    is_class = missing[0][0].isupper()
    alike = [name for name in known if name[0].isupper() == is_class]
    meant = nearest(missing[0], alike)
    if statement.level == 1 and not meant:
        return alone(statement._replace(names=tuple(missing)))
    reason = _not_known(missing)
    if family.cuda:
        reason = f"{', '.join(missing)} needs a CUDA extension and has no equivalent here"
    some = ", ".join(difflib.get_close_matches(missing[0], alike, n=5, cutoff=0.0))
    return PastedImportError(
        f"{statement.place}: {statement.text(missing)} - {reason}, expected one of {some}, ... "
        f"({len(alike)} {'classes' if is_class else 'functions'}).{meant} Paste its "
        f"{'class' if is_class else 'code'} into the file"
    )
