"""Pascal VOC XML: one file per image.

A split is a folder of XML files, or a list of image ids (`ImageSets/Main/train.txt`) whose
annotations lie in `Annotations` beside `ImageSets`. Corners are taken as they stand; the key
`one_based: true` of the data YAML moves the upper left corner by one pixel, for files that count
pixels from 1 as the original challenge does. `difficult` objects are not trained on and count as
crowds in the evaluation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from data.formats.description import DataConfig, Listing
from data.formats.faults import Fault, repeated_images
from data.formats.files import files_below, read_text
from data.formats.table import Row, Table, build_table, read_headers, size_faults
from data.images import is_image_path
from utils.errors import DatasetError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find(config: DataConfig, split: str) -> Listing:
    """The XML files of a split and the images that they describe."""
    files: list[str] = []
    for entry in config.entries(split):
        found = xml_files(entry)
        if not found:
            raise DatasetError(f"{config.file}: {split} - got no .xml in {entry}, expected some.")
        files += found
    by_folder: dict[str, list[str]] = {}
    for file in files:
        by_folder.setdefault(os.path.dirname(file), []).append(file)
    remarks: list[Fault] = []
    images: dict[str, str] = {}
    for parent, own in by_folder.items():
        folders = _image_folders(config, split, Path(parent))
        images.update(_match_images(own, folders, config, remarks))
    paths = [images[file] for file in files]
    return Listing(files, paths, (*remarks, *repeated_images(paths)))


def xml_files(entry: Path) -> list[str]:
    """The annotation files behind one entry of a split."""
    if entry.is_dir():
        return [path for path in files_below(entry) if path.lower().endswith(".xml")]
    annotations = entry.parent
    for parent in entry.parents:
        if (parent / "Annotations").is_dir():
            annotations = parent / "Annotations"
            break
    names = [_chosen_name(line.strip()) for line in read_text(entry).splitlines()]
    return [str(annotations / f"{name.removesuffix('.xml')}.xml") for name in names if name]


def _chosen_name(line: str) -> str:
    """The image id of a line, which may hold spaces; empty if the line leaves the image out.

    Per-class lists have a last column: -1 means that the class is not in the image.
    """
    fields = line.rsplit(None, 1)
    if len(fields) < 2 or fields[1] not in ("-1", "0", "1"):
        return line
    return "" if fields[1] == "-1" else fields[0]


def names_of(entries: Iterable[Path]) -> tuple[str, ...]:
    """Class names that occur in the annotations, sorted."""
    names = set()
    for entry in entries:
        for file in xml_files(entry):
            root = _parse(file)
            if isinstance(root, ET.Element):
                names |= {(node.findtext("name") or "").strip() for node in root.iter("object")}
    return tuple(sorted(names - {""}))


def _image_folders(config: DataConfig, split: str, folder: Path) -> list[Path]:
    if split in config.images:
        return [config.images[split]]
    root = config.path
    beside = [folder, folder.parent / "JPEGImages", folder.parent / "images"]
    return [*beside, root / "images" / split, root / "images" / folder.name, root / "images"]


def _match_images(
    files: Sequence[str], folders: Sequence[Path], config: DataConfig, remarks: list[Fault]
) -> dict[str, str]:
    """The image of each annotation: the same name in the first folder that has one of them."""
    stems = {Path(file).stem for file in files}
    for folder in folders:
        by_stem = _images_by_stem(folder)
        if stems & by_stem.keys():
            break
    else:
        looked = ", ".join(map(str, folders))
        raise DatasetError(
            f"{files[0]}: no image named {Path(files[0]).stem!r} in {looked}. Name the folder in "
            f"the data YAML, `images: ...`. {config.advice()}"
        )
    images = {}
    for file in files:
        *others, used = by_stem.get(Path(file).stem) or [_stated_image(file, folder)]
        told = f"has {file} together with {used}, which is taken"
        remarks += [Fault(other, "", told, "shared") for other in others]
        images[file] = used
    return images


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in filter(is_image_path, names):
        found.setdefault(os.path.splitext(name)[0], []).append(str(folder / name))
    return found


def _stated_image(file: str, folder: Path) -> str:
    """The image that an annotation names in its text."""
    root = _parse(file)
    stated = root.findtext("filename") if isinstance(root, ET.Element) else None
    return str(folder / (stated or Path(file).with_suffix(".jpg").name).strip())


def _parse(file: str) -> ET.Element | Fault:
    try:
        return ET.parse(file).getroot()
    except ET.ParseError as error:
        return Fault(file, "", f"got no XML ({error}), expected a VOC annotation")
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read - got {error.strerror}.") from error


def read(config: DataConfig, split: str, listing: Listing) -> Table:
    """Read the annotations of a split."""
    images = listing.images
    assert images is not None
    faults: list[Fault] = []
    headers = read_headers(images, faults)

    def rows_of(k: int, size: tuple[int, int]) -> Iterator[Row | Fault]:
        return _rows(listing.annotations[k], images[k], size, config)

    return build_table(images, headers, rows_of, faults)


def _rows(
    file: str, image: str, size: tuple[int, int], config: DataConfig
) -> Iterator[Row | Fault]:
    root = _parse(file)
    if isinstance(root, Fault):
        yield root
        return
    texts = (root.findtext("size/height") or "", root.findtext("size/width") or "")
    height, width = (int(text) if text.strip().isdecimal() else 0 for text in texts)
    if height and width:  # zero is what some labelling tools write for "not known"
        yield from size_faults(image, size, (height, width))
    for number, node in enumerate(root.iter("object"), 1):
        place, found = f"object {number}", _read_object(node, config)
        if isinstance(found, str):
            yield Fault(file, place, found)
        else:
            is_difficult = (node.findtext("difficult") or "0").strip() == "1"
            yield Row(file, place, *found, is_difficult)


def _read_object(node: ET.Element, config: DataConfig) -> tuple[int, tuple[float, ...]] | str:
    """Class and xyxy pixels, or what is wrong with the object."""
    name = (node.findtext("name") or "").strip()
    if name not in config.names:
        shown = ", ".join(config.names[:20])
        return f"name - got {name!r}, expected one of {shown}"
    corners = []
    for key in CORNERS:
        text = node.findtext(f"bndbox/{key}")
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            return f"{key} - got {text!r}, expected a number"
        corners.append(value)
    if config.one_based:
        corners[0] -= 1
        corners[1] -= 1
    return config.names.index(name), tuple(corners)
