"""Files of a data set: what lies in its folders, and texts as people and Windows write them."""

from __future__ import annotations

import os
from pathlib import Path

from data.images import is_image_path
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


def files_below(folder: str | Path) -> list[str]:
    """All files below a folder, sorted; links are followed, each folder is read once."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        folders.sort()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += [os.path.join(root, name) for name in names]
    return sorted(found)


def files_in(folder: str | Path, is_deep: bool = False) -> list[str]:
    """Files of a folder, of those below too if `is_deep`; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    if is_deep:
        return files_below(folder)
    return [entry.path for entry in os.scandir(folder) if entry.is_file()]


def image_files(folder: Path) -> list[str]:
    """All image files below a folder, sorted."""
    return [path for path in files_below(folder) if is_image_path(path)]
