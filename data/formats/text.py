"""Text files as people and Windows write them."""

from __future__ import annotations

from pathlib import Path

from utils.errors import DatasetError
from utils.files import refuse_special


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, without the byte order mark that some editors put before it.

    Raises:
        DatasetError: the file cannot be read, or is in another encoding.
    """
    try:
        refuse_special(path)
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: got a byte that is no UTF-8 at {error.start}, expected UTF-8 text. Save the "
            "file as UTF-8."
        ) from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read - got {error.strerror}.") from error
