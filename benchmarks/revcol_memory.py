"""RevCol's training: memory kept for the backward pass, time of a step, error of its gradients.

    python benchmarks/revcol_memory.py [--imgsz 320] [--steps 3] [--part memory|time|error]

Three tables, each column beside plain autograd in the same run:

* memory: storages alive between forward and backward, parameters left out, found by following the
  graph's saved tensors; at the end the growth from column to column against a column's outputs.
* time: CPU seconds of one training step, best of `--steps` (not wall-clock: others may be busy).
* error: largest relative difference of a parameter's gradient from plain autograd in float32, for
  networks of 4, 8 and 16 columns, at initialisation and with layer scales near one; "last only"
  keeps the last column alone, as the paper's memory count does.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.modules.revcol import SIZES, RevCol, Size

MIB = 2**20
MODES: dict[str, bool | str] = {"plain": False, "columns": True, "sparse": "sparse"}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description="memory, time and error of RevCol's training")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--part", choices=["memory", "time", "error"])
    options = parser.parse_args()
    if options.part in (None, "memory"):
        memory_table(options.imgsz)
    if options.part in (None, "time"):
        time_table(options.imgsz, options.steps)
    if options.part in (None, "error"):
        error_table()


def kept_bytes(model: RevCol, images: Tensor) -> int:
    """Bytes of the unique storages that the graph of one forward pass keeps alive."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = model(images)
    for tensor in tensors_on_nodes(maps):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_on_nodes(maps: list[Tensor]) -> list[Tensor]:
    """Tensors hung on the graph's nodes as attributes, which saved-tensor hooks do not see."""
    found: list[Tensor] = []
    seen, todo = set(), [m.grad_fn for m in maps]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in getattr(node, "__dict__", {}).values():
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in values if isinstance(item, Tensor)]
        todo += [parent for parent, _ in node.next_functions]
    return found


def memory_table(imgsz: int) -> None:
    """Kept memory of revcol_small, batch 1, and its growth from 4 columns to 16."""
    images = torch.rand(1, 3, imgsz, imgsz)
    size = SIZES["small"]
    outputs = sum(4 * c * (imgsz // s) ** 2 for c, s in zip(size.channels, (4, 8, 16, 32))) / MIB
    print(f"kept between forward and backward, {imgsz} x {imgsz}, batch 1, MiB")
    print(f"{'':22s}" + "".join(f"{mode:>10s}" for mode in MODES) + f"{'last only':>10s}")
    counts = {}
    for columns in (4, 8, 16):
        model = RevCol(size._replace(columns=columns)).train()
        row = []
        for mode, span in (*((m, None) for m in MODES.values()), ("sparse", columns)):
            row.append(kept_bytes(set_mode(model, mode, span), images) / MIB)
        counts[columns] = row
        print(f"small, {columns:2d} columns     " + "".join(f"{value:10.1f}" for value in row))
    growth = [(b - a) / 8 for a, b in zip(counts[8], counts[16])]
    print("growth per column     " + "".join(f"{value:10.3f}" for value in growth))
    print(f"a column's outputs    {outputs:10.3f}")


def set_mode(model: RevCol, save_memory: bool | str, span: int | None = None) -> RevCol:
    """Switch a built network to another way of keeping its maps."""
    model.save_memory = save_memory
    model.span = span or RevCol(Size((1,) * 4, (1,) * 4, 1, 0.0), save_memory).span
    return model


def time_table(imgsz: int, steps: int) -> None:
    """CPU seconds of forward and backward of revcol_tiny and revcol_small."""
    print(f"\ntraining step, {imgsz} x {imgsz}, batch 1, CPU seconds (times plain)")
    for name in ("tiny", "small"):
        model, images = RevCol(SIZES[name]).train(), torch.rand(1, 3, imgsz, imgsz)
        best = dict.fromkeys(MODES, float("inf"))
        for _ in range(steps + 1):  # interleaved, so that a busy machine is busy for all
            for mode, save_memory in MODES.items():
                start = time.process_time()
                torch.stack(
                    [m.mean() for m in set_mode(model, save_memory)(images)]
                ).sum().backward()
                best[mode] = min(best[mode], time.process_time() - start)
        row = [f"{best[mode]:.2f} ({best[mode] / best['plain']:.2f})" for mode in MODES]
        print(f"{name:10s}" + "".join(f"{mode:>9s} {cell}" for mode, cell in zip(MODES, row)))


def gradients(model: RevCol, images: Tensor) -> list[Tensor]:
    """Gradients of all learned parameters from one fixed random state."""
    torch.manual_seed(0)
    model.zero_grad()
    maps = model(images)
    weights = [torch.linspace(-1, 1, m.numel()).view_as(m) for m in maps]
    torch.stack([(m * w).sum() for m, w in zip(maps, weights)]).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def error_table() -> None:
    """Gradient errors of the modes, widths a quarter of revcol_small's, 64 x 64, batch 2."""
    print("\nlargest relative error of a parameter's gradient, float32")
    print(f"{'':34s}{'columns':>10s}{'sparse':>10s}{'last only':>10s}")
    for columns in (4, 8, 16):
        for label, scaled in (("at initialisation", False), ("layer scale 0.5-1", True)):
            torch.manual_seed(0)
            model = RevCol(Size((16, 32, 64, 128), (2, 2, 4, 2), columns, 0.1)).train()
            if scaled:
                _scale_up(model)
            images = torch.rand(2, 3, 64, 64)
            plain = gradients(set_mode(model, False), images)
            row = []
            for mode, span in ((True, None), ("sparse", None), ("sparse", columns)):
                got = gradients(set_mode(model, mode, span), images)
                row.append(max(float((a - b).norm() / a.norm()) for a, b in zip(plain, got)))
            cells = "".join(f"{value:10.1e}" for value in row)
            print(f"{columns:2d} columns, {label:22s}{cells}")


def _scale_up(model: nn.Module) -> None:
    """Give every branch a weight near that of its residual, as after training."""
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.uniform_(parameter, 0.5, 1.0)
        elif parameter.ndim > 1 and "alpha" not in name:
            nn.init.kaiming_uniform_(parameter)


if __name__ == "__main__":
    main()
