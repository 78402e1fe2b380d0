"""A study in words and Markdown: its table, what to choose, how it was made, the card of the chosen model."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from study.children import ROOT
from study.plan import Study
from study.results import Row, best_of, choice_of, front_of, load_of, main_rows
from utils.device import describe_device, select_device

MISSING = "–"
LEAST = 0.01  # mAP50-95 of a detector that finds anything at all


def number(value: float | None, layout: str) -> str:
    """A number as `format` shows it, a dash where there is none."""
    return MISSING if value is None else format(value, layout)


def spread(middle: float | None, low: float | None, high: float | None, layout: str) -> str:
    """`0.572 (0.541 to 0.603)`."""
    if middle is None or low is None or high is None:
        return number(middle, layout)
    return f"{middle:{layout}} ({low:{layout}} to {high:{layout}})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others stand to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *cells])


def verdict(rows: Sequence[Row]) -> str:
    """What to choose, and why, in a few sentences."""
    best, choice = best_of(rows), choice_of(rows)
    if best is None or choice is None:
        return "Nothing was measured, so there is nothing to choose from."
    if (best.map50_95 or 0.0) < LEAST:
        return f"Nothing to choose by: the best mAP50-95 is {number(best.map50_95, '.4f')}. Train longer, or from weights."
    told = (
        f"{choice.name}: mAP50-95 {spread(choice.map50_95, choice.map_low, choice.map_high, '.3f')}, "
        f"{number(choice.latency, '.1f')} ms an image."
    )
    if choice is best:
        return (
            f"{told} It has the highest mAP, and no faster model comes so near that the images could not tell them "
            "apart."
        )
    ahead = spread(choice.behind, choice.behind_low, choice.behind_high, ".3f")
    return (
        f"{told} {best.name} has the highest mAP, {number(best.map50_95, '.3f')}, and takes "
        f"{number(best.latency, '.1f')} ms; how far it is ahead, {ahead}, these images cannot tell from nothing. Of all "
        "such models the choice is the fastest."
    )


def setting(study: Study) -> dict[str, str]:
    """What the entries of a study have in common, and where they were measured."""
    options, device = study.options, select_device(study.options.device)
    size = " x ".join(map(str, options.imgsz)) if options.imgsz else "train.py's, or that of the weights"  # fmt: skip
    trained = f"{options.epochs} epochs, {options.seeds} seed{'s' * (options.seeds > 1)}"
    trained += f", {shlex.join(options.train)}" if options.train else ""
    return {
        "data": f"{options.data}, its validation split",
        "image size": size,
        "training": trained if options.epochs else "none, the weights are those that were given",
        "budget": f"{options.budget:g} minutes, by successive halving" if options.budget is not None else "none",
        "runtime": ", ".join(options.runtime),
        "hardware": f"{_processor()}, {os.cpu_count()} cores; {describe_device(device)}",
        "load": _busy(load_of(study)),
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}",
        "commit": _commit(),
        "date": date.today().isoformat(),
    }  # fmt: skip


def _busy(load: float | None) -> str:
    """How busy the machine was while models were timed."""
    cores = os.cpu_count() or 1
    if load is None:
        return "not known"
    told = f"{load:.1f} processes on {cores} cores while models were timed"
    return f"{told}: too many, latencies are too long" if load > cores + 1 else told


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Of this tree; with a word where files were changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)  # fmt: skip
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown, this tree is no git checkout"
    return found.stdout.strip() + (", with changes" if changed else "")


NOTES = (
    "mAP is COCO's, with its 95 % interval over the images of the split (half-sample bootstrap); AP of small, medium and "
    "large objects by COCO's areas (32 x 32 and 96 x 96 pixels). Params, GFLOPs (2 x GMACs) of the training form and the deployed "
    "one; MiB of weights and maps at a time, deployed, for one image. Milliseconds: median and quartiles of one image through "
    "network and decoding, without NMS, all models in turn in one process; the file that is timed is the one whose mAP is told."
)
HEAD = (
    "model", "epochs", "mAP50-95", "mAP50", "ms", "params, M", "GFLOPs", "MiB", "AP small", "medium", "large", "s an epoch",
    "training, GiB",
)  # fmt: skip


def table_of(study: Study, rows: Sequence[Row]) -> str:
    """The table as Markdown, best mAP first; what failed stands last."""
    front, with_runtime = (
        {id(row) for row in front_of(main_rows(study, rows))},
        len(study.options.runtime) > 1,
    )
    ordered = sorted(rows, key=lambda row: -1.0 if row.map50_95 is None else row.map50_95, reverse=True)  # fmt: skip
    cells = [
        [
            ("**{}**" if id(row) in front else "{}").format(row.name)
            + (f", {row.runtime}" if with_runtime and row.runtime else "")
            + ("" if row.is_whole else f" ({row.state})"),
            number(row.epochs, "d"),
            spread(row.map50_95, row.map_low, row.map_high, ".3f"),
            number(row.map50, ".3f"),
            spread(row.latency, row.latency_low, row.latency_high, ".1f"),
            arrow(_millions(row.params), _millions(row.params_deployed), ".2f"),
            arrow(row.gflops, row.gflops_deployed, ".2f"),
            number(row.memory, ".0f"),
            *(number(value, ".3f") for value in (row.small, row.medium, row.large)),
            number(row.seconds_per_epoch, ".1f"),
            number(row.train_memory, ".2f"),
        ]
        for row in ordered
    ]
    return markdown_table(HEAD, cells)


def arrow(before: float | None, after: float | None, layout: str) -> str:
    """`2.62 → 2.61`."""
    return MISSING if before is None else f"{before:{layout}} → {number(after, layout)}"


def _millions(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def markdown(study: Study, rows: Sequence[Row], title: str) -> str:
    """The whole study as a document."""
    facts = "\n".join(f"- {name}: {value}" for name, value in setting(study).items())
    commands = "\n".join(f"    {command}" for command in study.commands)
    runtime = f", in {study.options.runtime[0]}" if len(study.options.runtime) > 1 else ""
    return f"""# {title}

**{verdict(main_rows(study, rows))}**

{table_of(study, rows)}

Bold: no other is both faster and better{runtime}. {extent(study, rows)} {NOTES}

## How it was made

{commands}

{facts}
"""


def extent(study: Study, rows: Sequence[Row]) -> str:
    """On how much all this stands."""
    images, seeds = max((row.images or 0 for row in rows), default=0), study.options.seeds
    return (
        f"This is one data set, {images} validation images and {seeds} training{'s' * (seeds > 1)} of each: another one may "
        "order them otherwise."
    )


def model_card(study: Study, row: Row, names: Sequence[str]) -> str:
    """What somebody should know who is handed the chosen model."""
    facts = setting(study)
    used = ("data", "image size", "training", "hardware", "versions", "commit", "date")
    told = "\n".join(f"- {name}: {facts[name]}" for name in used)
    return f"""# {row.name}

An object detector: `{row.model}`{f" over `{row.backbone}`" if row.backbone not in ("", "own") else ""}. {row.state.capitalize()}.

- classes: {", ".join(names)}
- runtime measured: {row.runtime}

{told}

## Measured

{table_of(study, [row])}

{NOTES}

## Use

    python detect.py --weights WEIGHTS --source IMAGES

It was measured on one data set. What it does on other cameras, lights, sizes and objects than these is not known; scores are no
probabilities. It was chosen from {len(study.entries)} models on the same images that measure it, which flatters it a little.

Made by:

{chr(10).join(f"    {command}" for command in study.commands)}
"""
