"""Putting the weights of a file or a bundle into a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur.core.errors import FileError, FormatError, UsageError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import Bundle, read_bundle, read_tensors
from secateur.formats.bundle import is_meant
from secateur.frontends.surgery import load_bundle_


def load_weights_(network: nn.Module, path: str, bundle: Bundle | None = None) -> Masks:
    """Load a bundle, or a ``.safetensors`` file, into ``network`` in place.

    Args:
        network: Any module.
        path: The folder or file. Names in a file may begin with ``module.`` or ``_orig_mod.``, as those
            of networks in data parallelism or ``torch.compile`` do.
        bundle: The bundle, if it was read already.

    Returns:
        The masks of a bundle; none for a plain file.

    Raises:
        FileError: The file is missing or damaged.
        UsageError: Names, shapes or types differ; the network is unchanged.

    Example:
        >>> load_weights_(nn.Linear(1, 1), "gone.safetensors")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FileError: the weights 'gone.safetensors': there is no such file. ...
    """
    found = bundle or _read(Path(path), network)
    try:
        load_bundle_(network, found)
    except UsageError as error:
        do = _advice(network, found.tensors)
        raise UsageError(f"the weights {path!r}", error.found, error.why, do) from error
    return found.masks


def _read(path: Path, network: nn.Module) -> Bundle:
    asked = f"the weights {str(path)!r}"
    if is_meant(path):
        return read_bundle(path)
    if not path.exists():
        raise FileError(
            asked, "there is no such file", "weights come from a file", "check the path"
        )
    if path.suffix != ".safetensors":
        raise UsageError(
            asked,
            f"it is a {path.suffix or 'file without a suffix'}" if path.is_file() else "a folder",
            "weights are a .safetensors file or a bundle; pickles are never read",
            "convert it to safetensors",
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            ours = "secateur" in (file.metadata() or {})
            names = [] if ours else list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise FormatError(
            asked,
            f"it is no whole safetensors file ({str(error)[:200]})",
            "it is truncated or altered",
            "copy it again from where it came",
        ) from error
    if ours:  # the file of a bundle, taken out of its folder
        tensors, masks = read_tensors(path)
        return Bundle(tensors, masks, {}, Facts())
    named = _unwrapped(network, tensors)
    return Bundle(_with_tied(network, named), Masks({}), {}, Facts())


def _unwrapped(network: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Plain names in place of those that ``torch.compile`` or data parallelism has lengthened."""
    own = [name for name, _ in network.named_parameters()]
    for wrapper in ("_orig_mod.", "module.", "_orig_mod."):  # either may be inside the other
        if tensors and all(n.startswith(wrapper) for n in tensors):
            if any(n.startswith(wrapper) for n in own):  # a name of the network's own
                break
            tensors = {n.removeprefix(wrapper): x for n, x in tensors.items()}
    return tensors


def _advice(network: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """What to do about weights that do not fit: they may only be of another type."""
    state = network.state_dict()
    shapes = {name: x.shape for name, x in state.items() if isinstance(x, Tensor)}
    if shapes == {name: x.shape for name, x in tensors.items()}:
        stored = {x.dtype for name, x in tensors.items() if x.dtype != state[name].dtype}
        if len(stored) == 1:
            return (
                f"give the network their type where it is built, e.g. .to({stored.pop()}), or save the "
                "weights in the network's; nothing was loaded"
            )
    return "use the weights and the network of the same model; nothing was loaded"


def _with_tied(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the other names of tied weights: files store them under one name only."""
    groups: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    full = dict(tensors)
    for names in groups.values():
        stored = next((name for name in names if name in tensors), None)
        if stored is not None:
            full |= {name: tensors[stored] for name in names if name not in full}
    return full
