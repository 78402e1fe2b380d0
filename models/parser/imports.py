"""`imports:` of a model YAML: Python files and packages of a user's, found beside it."""

from __future__ import annotations

from pathlib import Path

from models import modules
from models.parser.advice import advice_for
from models.parser.rows import ModelSpec
from utils.errors import ConfigError, ForeignError

HOME = "imports_from"
"""Key of a config: the folder that the files of `imports` were found from when the model was built."""


def import_code(spec: ModelSpec, allowed: bool) -> set[str]:
    """Run what `imports:` names, if that is allowed; the names of its modules in this process.

    Raises:
        ConfigError: it is not, nothing of that name is found, or its code failed.
    """
    seen: set[str] = set()
    for name in spec.imports:
        if not allowed:
            raise ConfigError(
                f"{spec.file} imports: {name} would run code. Read it, then give --allow-code if you trust it."
            )
        folders = [Path(spec.file).parent, Path(spec.config.get(HOME) or ""), Path()]
        home = next((folder for folder in folders if _is_code(folder / name)), None)
        if home is None:
            places = dict.fromkeys(str(folder.resolve()) for folder in folders)
            raise ConfigError(
                f"{spec.file} imports: got {name}, expected a file beside the YAML, or a folder with an __init__.py; it is "
                f"not in {', '.join(places)}. Put it into one of them."
            )
        spec.config[HOME] = str(home.resolve())
        try:
            seen |= modules.import_outside(home / name)
        except ForeignError as error:
            said = f"{str(error).rstrip('.')}.{advice_for(error)}"
            raise ConfigError(f"{spec.file} imports: {name} cannot be imported - {said}") from error
    return seen


def _is_code(path: Path) -> bool:
    return path.is_file() or (path / modules.PACKAGE).is_file()
