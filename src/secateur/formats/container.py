"""One safetensors file with dense tensors, sparse weights, tied names and a content hash.

The layout is described byte by byte in ``docs/formats/bundle.md``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.core.atomic import new_file
from secateur.core.errors import FormatError, UsageError, kind_of
from secateur.core.masks import Masks
from secateur.core.plain import is_wrapper
from secateur.formats.layouts import LAYOUTS, SPARSE_DTYPES, smallest
from secateur.formats.sharing import find_aliases
from secateur.formats.table import Entry, Table, parse_table, read_json, require_version

#: safetensors' own limit for the header.
HEADER_LIMIT = 100_000_000

#: Types that every safetensors reader of the last years knows, by their name in the file.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

# The only place where these bytes can stand in a header unescaped is the metadata itself.
_MARK = b'"secateur_sha256":"'
_BLANK = b"0" * 64
_AGAIN = "copy the file again from where it came, or write it again"
_CONVERT = "convert it; or, where the network makes it anew, register it with persistent=False"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], masks: Masks) -> None:
    """Write tensors to a file; those with a mask in their smallest layout, tied ones once.

    Pruned entries are stored as zero whatever value they have now. The same input gives the
    same bytes.

    Args:
        path: The file; replaced as a whole, only if everything was written.
        tensors: A full ``state_dict``, buffers included.
        masks: Masks of some of the tensors.

    Raises:
        UsageError: A tensor or mask cannot be stored; the message names it.
        FileError: The file cannot be written, as on a full disk.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> mask = torch.tensor([[True, False]])
        >>> write_tensors(file, {"w": torch.tensor([[1.5, 2.0]])}, Masks({"w": mask}))
        >>> tensors, masks = read_tensors(file)
        >>> tensors["w"].tolist(), masks["w"].tolist()
        ([[1.5, 0.0]], [[True, False]])
    """
    require_storable(tensors)
    for name, mask in masks.items():
        _require_masked(name, mask, tensors)
    aliases = find_aliases(tensors, masks)
    stored: dict[str, Tensor] = {}
    sparse: dict[str, Entry] = {}
    for name in masks:
        if name not in aliases:
            sparse[name] = _pack_into_(stored, name, tensors, masks[name])
    for name, tensor in tensors.items():
        if name not in aliases and name not in sparse:
            stored[name] = _plain(tensor)
    stored = _apart(stored)
    metadata = {"format": "pt", "secateur": Table(sparse, aliases).to_json()}
    with new_file(path) as temporary:
        try:
            save_file(stored, temporary, metadata={**metadata, "secateur_sha256": _BLANK.decode()})
        except SafetensorError as error:  # the tensors were checked: it is the disk
            raise OSError(str(error)) from error
        _seal_(temporary)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Masks]:
    """Read what :func:`write_tensors` wrote: all tensors dense, and the masks.

    Tied names give the same tensor object.

    Raises:
        FormatError: The file is missing, truncated, altered, oversized, of another version, or
            its header does not agree with itself.

    Example:
        >>> read_tensors("no-such-file.safetensors")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: reading 'no-such-file.safetensors': there is no such \
file. A tensor file was expected there. Check the path.
    """
    path = Path(path)
    with _reading(path):
        _require_whole(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get("secateur")
            if text is None:
                raise _damaged("its header has no 'secateur' entry", "it is no secateur file")
            require_version(read_json(text, "the table in the header"))
            _require_digest(path)
            table = parse_table(text)
            found = {key: _header_of(file, key) for key in file.keys()}  # noqa: SIM118
            plain = _require_agreement(table, found)
            tensors, masks = {}, {}
            for name, entry in table.sparse.items():
                parts = {part: _get(file, key) for part, key in entry.keys(name).items()}
                if entry.layout == "dense":
                    parts["values"] = parts["values"].flatten()
                layout = LAYOUTS[entry.layout]
                tensors[name], masks[name] = layout.unpack(parts, entry.shape, entry.dtype)
            for name in plain:
                tensors[name] = _get(file, name)
    for name, alias in table.aliases.items():
        tensors[name] = tensors[alias.of]
        if alias.masked:
            masks[name] = masks[alias.of]
    return tensors, Masks(masks)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Put the file name into every error that reading can raise."""
    asked = f"reading {str(path)!r}"
    try:
        yield
    except FormatError as error:
        found = error.found if error.asked == "the file" else f"{error.asked}: {error.found}"
        raise FormatError(asked, found, error.why, error.do) from error
    except (SafetensorError, OSError) as error:
        found = f"it is no whole safetensors file ({str(error)[:200]})"
        raise FormatError(asked, found, "it is truncated or altered", _AGAIN) from error
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        found = f"a tensor cannot be made ({str(error)[:200]})"
        raise FormatError(asked, found, "the header promises what cannot be", _AGAIN) from error


def _require_whole(path: Path) -> None:
    """Sizes first: nothing is parsed or allocated for a file that cannot be right."""
    if not path.is_file():
        found = "it is not a regular file" if path.exists() else "there is no such file"
        raise FormatError("the file", found, "a tensor file was expected there", "check the path")
    size = path.stat().st_size
    if size < 8:
        raise _damaged(f"it has {size} bytes", "the first 8 hold the length of the header")
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > min(HEADER_LIMIT, size - 8):
        found = f"its header claims {length} bytes and the file has {size}"
        raise _damaged(found, f"a header ends inside the file and has at most {HEADER_LIMIT} bytes")


def _require_agreement(table: Table, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Compare the table with what is in the file; return the names of the dense tensors."""
    left = dict(found)
    for name, entry in table.sparse.items():
        sizes = LAYOUTS[entry.layout].parts(entry.shape, entry.dtype, entry.kept)
        for part, key in entry.keys(name).items():
            dtype, length = sizes[part]
            shape = entry.shape if entry.layout == "dense" else (length,)
            stored = left.pop(key, None)
            if stored is None:
                raise _damaged(f"{key[:80]!r} is missing or used twice", f"{name[:80]!r} needs it")
            if (DTYPES[stored[0]], stored[1]) != (dtype, shape):
                why = f"{name[:80]!r} needs {dtype} of shape {str(shape)[:80]}"
                raise _damaged(f"{key[:80]!r} is {stored[0]} {str(stored[1])[:80]}", why)
    owners = {*table.sparse, *left}
    if len(owners) != len(table.sparse) + len(left):
        raise _damaged("a name is both sparse and dense", "each tensor is stored once")
    for name, alias in table.aliases.items():
        masked = not alias.masked or alias.of in table.sparse
        if name in owners or alias.of not in owners or not masked:
            found_alias = f"{name[:80]!r} is tied to {alias.of[:80]!r}"
            raise _damaged(found_alias, "the one must be new and the other stored")
    return sorted(left)


def _header_of(file: safe_open, key: str) -> tuple[str, tuple[int, ...]]:
    part = file.get_slice(key)
    dtype, shape = str(part.get_dtype()), tuple(part.get_shape())
    if dtype not in DTYPES:
        raise _damaged(f"{key[:80]!r} is of type {dtype}", f"the types are {', '.join(DTYPES)}")
    return dtype, shape


def _get(file: safe_open, key: str) -> Tensor:
    # A clone owns its memory: the mapped file may be replaced or cut while the tensor lives.
    tensor: Tensor = file.get_tensor(key)
    return tensor.clone()


def _pack_into_(
    stored: dict[str, Tensor], name: str, tensors: Mapping[str, Tensor], mask: Tensor
) -> Entry:
    value = _plain(tensors[name])
    shape, kept = tuple(value.shape), int(mask.sum())
    layout = smallest(shape, value.dtype, kept)
    entry = Entry(layout.name, shape, value.dtype, kept)
    keys = entry.keys(name)
    taken = next((key for key in keys.values() if key != name and key in tensors), None)
    if taken is not None:
        raise UsageError(
            f"writing {name!r} as {layout.name}",
            f"another tensor is already named {taken!r}",
            "the parts of a sparse weight are stored under such names",
            f"rename that tensor, or leave {name!r} without a mask",
        )
    if layout.name == "dense":
        stored[name] = value
    else:
        stored |= {keys[part]: tensor for part, tensor in layout.pack(value, mask.cpu()).items()}
    return entry


def _apart(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own where it shares some; safetensors insists on it."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in stored.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def require_storable(tensors: Mapping[str, object]) -> None:
    """Fail early, before hours of work, where :func:`write_tensors` would fail at the end.

    Args:
        tensors: A full ``state_dict``.

    Raises:
        UsageError: One of them cannot be stored; the message names it.

    Example:
        >>> require_storable({"w": torch.zeros(2)})
        >>> require_storable({"w": torch.zeros(2).to_sparse()})
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: writing the tensor 'w': it is torch.sparse_coo on cpu, ...
    """
    for name, tensor in tensors.items():
        _require_storable(name, tensor)


def _require_storable(name: str, tensor: object) -> None:
    asked = f"writing the tensor {name!r}"
    if not isinstance(tensor, Tensor):
        found, why = f"it is {kind_of(tensor)}", "a file holds tensors only"
        raise UsageError(asked, found, why, "leave it out of the state_dict")
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        found = f"it is {tensor.layout} on {tensor.device}, quantized: {tensor.is_quantized}"
        raise UsageError(asked, found, "only plain tensors with data can be stored", _CONVERT)
    if is_wrapper(tensor):
        found = f"it is {kind_of(tensor)}, which keeps its numbers in other tensors"
        raise UsageError(asked, found, "only plain tensors with data can be stored", _CONVERT)
    if tensor.dtype not in DTYPES.values():
        why = f"the format has {', '.join(DTYPES)}"
        raise UsageError(asked, f"its type is {tensor.dtype}", why, _CONVERT)
    if name == "__metadata__" or name.encode("utf-8", "replace").decode() != name:
        why = "names are UTF-8 text, and '__metadata__' is taken by the format"
        raise UsageError(asked, "it cannot have that name", why, "rename it")


def _require_masked(name: str, mask: Tensor, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        raise UsageError(
            f"writing the mask of {name!r}",
            f"there is no such tensor among {len(tensors)}",
            "masks are stored with their weights",
            "pass the full state_dict, and masks under the same names",
        )
    tensor = tensors[name]
    if mask.shape != tensor.shape or tensor.ndim == 0 or tensor.dtype not in SPARSE_DTYPES.values():
        raise UsageError(
            f"writing the mask of {name!r}",
            f"the mask is {tuple(mask.shape)}, the tensor {tuple(tensor.shape)} {tensor.dtype}",
            f"shapes must agree, with an axis or more, and types are {', '.join(SPARSE_DTYPES)}",
            "check where the mask comes from",
        )


def _seal_(path: Path) -> None:
    """Bring the metadata into a fixed order (safetensors' is random) and write the hash into it."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "Python and Rust write this JSON alike; order changes no length"
        stream.seek(8)
        stream.write(text.ljust(length))
    place, _, digest = _digest(path)
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(digest)


def _require_digest(path: Path) -> None:
    _, stored, digest = _digest(path)
    if stored != digest:
        why = f"their SHA-256 starts with {digest[:12].decode()}; the header says "
        raise _damaged("its bytes were altered", why + ascii(stored[:12].decode("latin-1")))


def _digest(path: Path) -> tuple[int, bytes, bytes]:
    """``(place, stored, computed)``: SHA-256 of the file with zeros in place of the hash."""
    with path.open("rb") as stream:
        head = stream.read(8)
        head += stream.read(int.from_bytes(head, "little"))
        place = head.find(_MARK) + len(_MARK)
        if head.count(_MARK) != 1 or place + 64 > len(head):
            raise _damaged("its header has no 'secateur_sha256' entry", "it was altered")
        digest = hashlib.sha256(head[:place] + _BLANK + head[place + 64 :])
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return place, head[place : place + 64], digest.hexdigest().encode()


def _damaged(found: str, why: str) -> FormatError:
    return FormatError("the file", found, why, _AGAIN)
