"""Rebuild a pruned network from its folder, with torch and safetensors alone.

    python replay.py FOLDER FILE.py:FUNCTION

FUNCTION takes no arguments and returns the original, uncut network. Or from Python:
``model = replay(build(), "folder")``. The files are described in bundle.md and surgery.md.
"""

import copy
import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load


def checked(raw, mark):
    """Refuse bytes whose SHA-256, taken with zeros in its own place, is another one."""
    found = re.search(mark + b'([0-9a-f]{64})"', raw)
    blank = found and raw[: found.start(1)] + b"0" * 64 + raw[found.end(1) :]
    if not blank or hashlib.sha256(blank).hexdigest() != found[1].decode():
        raise ValueError("the file was altered")
    return raw


def read_tensors(path):
    """All tensors of a model.safetensors, dense. A plain safetensors file is read as it is."""
    raw = Path(path).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = load(raw)
    if "secateur" not in header.get("__metadata__", {}):
        return tensors
    checked(raw, b'"secateur_sha256":"')
    table = json.loads(header["__metadata__"]["secateur"])
    if table["version"] != 1:
        raise ValueError(f"model.safetensors has version {table['version']}, this reads 1")
    for name, entry in table["sparse"].items():
        value = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        if entry["layout"] == "dense":
            continue
        if entry["layout"] == "bitmask":
            bits = tensors.pop(name + ".bitmask")[:, None] >> torch.arange(8) & 1
            mask = bits.flatten()[: value.numel()].bool().reshape(value.shape)
        elif entry["layout"] == "csr":
            counts = tensors.pop(name + ".row_counts").long()
            rows = torch.arange(len(counts)).repeat_interleave(counts)
            mask = torch.zeros(value.shape, dtype=torch.bool)
            mask.view(len(counts), -1)[rows, tensors.pop(name + ".columns").long()] = True
        else:
            raise ValueError(f"{name} has the unknown layout {entry['layout']}")
        value[mask] = tensors.pop(name + ".values")
        tensors[name] = value
    return tensors | {name: tensors[alias["of"]] for name, alias in table["aliases"].items()}


def read_surgery(path):
    """The fields of a surgery.json."""
    surgery = json.loads(checked(Path(path).read_bytes(), b'"sha256":"'))
    if surgery["version"] != 1:
        raise ValueError(f"surgery.json has version {surgery['version']}, this reads 1")
    return surgery


def shapes_hash(state):
    lines = sorted([name, list(x.shape)] for name, x in state.items())
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()


class PassThrough(torch.nn.Module):
    """In the place of a removed block."""

    def __init__(self, returns="tensor", rest=()):
        super().__init__()
        self.returns, self.rest = returns, rest

    def forward(self, *args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        given = {None: None, **dict(enumerate(args)), **kwargs}
        more = (given.get(place) for place in self.rest)
        return (first, *more) if self.returns == "tuple" else first


def set_size(module, name, value):
    """Write a size: num_heads, config.num_heads (copied first: it is shared) or shape[0]."""
    holder = module
    if name.startswith("config."):
        module.config = holder = copy.copy(module.config)
        name = name.removeprefix("config.")
    name, _, entry = name.partition("[")
    if entry:
        old, at = getattr(holder, name), int(entry[:-1])
        value = getattr(old, "_make", type(old))([*old[:at], value, *old[at + 1 :]])
    vars(holder)[name] = value  # a configuration may be frozen


@torch.no_grad()
def cut_(model, surgery):
    if shapes_hash(model.state_dict()) != surgery["original"]["shapes"]:
        raise ValueError(f"this {type(model).__name__} is not the network that was cut")
    if any(block["kind"] != "removed" for block in surgery["blocks"]):
        raise ValueError("a block was replaced in a way that this script does not know")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters |= dict(model.named_buffers(remove_duplicate=False))
    done = set()
    for cut in surgery["cuts"]:
        x, axis = parameters[cut["parameter"]], cut["axis"]
        selection = surgery["selections"][cut["selection"]]
        if (id(x), axis) not in done and x.shape[axis] != selection["size"]:
            raise ValueError(f"axis {axis} of {cut['parameter']} is {x.shape[axis]}")
        if (id(x), axis) not in done:
            kept = [torch.arange(start, stop) for start, stop in selection["runs"]]
            x.data = x.data.index_select(axis, torch.cat(kept).to(x.device)).clone()
        done.add((id(x), axis))
    for edit in surgery["attributes"]:
        set_size(model.get_submodule(edit["module"]), edit["name"], edit["after"])
    attention = [m for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    if any(len({m.embed_dim, *m.out_proj.weight.shape}) > 1 for m in attention):
        raise ValueError("heads of nn.MultiheadAttention were cut: only secateur.load can run them")
    for block in surgery["blocks"]:
        path, _, name = block["module"].rpartition(".")
        setattr(model.get_submodule(path), name, PassThrough(**block["details"]))
    if shapes_hash(model.state_dict()) != surgery["result"]["shapes"]:
        raise ValueError("the shapes after the cut are not those that surgery.json promises")


def replay(model, folder):
    """Cut a freshly built original ``model``, if it was cut, load the weights, and return it."""
    tensors = read_tensors(Path(folder) / "model.safetensors")
    if (Path(folder) / "surgery.json").exists():
        cut_(model, read_surgery(Path(folder) / "surgery.json"))
    own = model.state_dict(keep_vars=True)
    for name in set(own) - set(tensors):  # a tied weight may be stored under one of its names
        twin = next((n for n in tensors if n in own and own[n] is own[name]), None)
        tensors |= {name: tensors[twin]} if twin else {}
    model.load_state_dict(tensors)
    return model


if __name__ == "__main__":
    file, _, function = sys.argv[2].rpartition(":")
    sys.path.insert(0, str(Path(file).resolve().parent))  # what it imports may lie beside it
    module = importlib.import_module(Path(file).stem)
    model = replay(getattr(module, function)(), sys.argv[1])
    print(f"{type(model).__name__} with {sum(x.numel() for x in model.parameters()):,} parameters")
