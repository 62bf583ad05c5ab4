"""Models of the Transformers library, from a local folder and without any code from it."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from secateur.core.errors import FormatError, MissingExtra, UsageError

GENERATION = "generation_config.json"
#: What tokenizers and processors of images and sound write beside a model.
_READERS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.spm", "chat_template*", "*processor_config.json",
)  # fmt: skip


def read(folder: Path) -> nn.Module:
    """The model of a folder with its weights (safetensors only, nothing downloaded).

    Raises:
        MissingExtra: Transformers is not installed.
        UsageError: The folder asks for code of its own, or for a class that is not there.
        FormatError: Weights are missing, damaged or do not fit.

    Example:
        >>> read(Path("no-such-folder"))
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: the Transformers folder 'no-such-folder': ...
    """
    if (folder / "surgery.json").is_file():  # its configuration is only a record
        from secateur.frontends.transformers_save import load_transformers

        return load_transformers(folder)
    cls = _class(folder)
    with _quiet(), _reading(folder):
        model, info = cls.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    lacking = sorted(info.get("missing_keys", ())) + [
        str(key[0]) for key in info.get("mismatched_keys", ())
    ]
    if lacking:
        raise FormatError(
            f"the Transformers folder {str(folder)!r}",
            f"{len(lacking)} weights are missing or of another shape ({', '.join(lacking[:3])})",
            "they would be random numbers",
            "check that config.json and the weights belong together",
        )
    assert isinstance(model, nn.Module)
    return model.eval()


def build(folder: Path) -> nn.Module:
    """The architecture of a folder with random weights, to load a bundle into.

    Of a network that was cut it is that before the cut, which the bundle cuts again. Its parameters
    have the type that the configuration states, all of them; see :func:`take_types_`.
    """
    outer = folder
    if (folder / "surgery.json").is_file():  # its configuration is only a record
        folder = folder / "original"
    cls = _class(folder)
    with _quiet(), _reading(folder):
        import transformers

        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        model = cls._from_config(config, dtype=getattr(config, "dtype", None))
        if (outer / GENERATION).is_file():
            how = transformers.GenerationConfig.from_pretrained(str(outer), local_files_only=True)
            model.generation_config = how
    assert isinstance(model, nn.Module)
    return model.eval()


def take_types_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the types of the tensors that will be loaded into them.

    A configuration states one type. Models keep some weights in single precision beside it (T5 in
    float16, routers of mixtures), and a model may have been converted after it was built.

    Args:
        model: Changed in place.
        tensors: By the names of the ``state_dict``; what has no such name stays as it is.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> take_types_(layer, {"weight": torch.zeros(1, 2, dtype=torch.bfloat16)})
        >>> layer.weight.dtype, layer.bias.dtype
        (torch.bfloat16, torch.float32)
    """
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors and x.is_floating_point() and tensors[name].is_floating_point():
            x.data = x.data.to(tensors[name].dtype)


def copy_readers(source: Path, folder: Path) -> list[str]:
    """Copy what turns texts, images or sound into inputs: a cut does not change it.

    Args:
        source: A Transformers folder.
        folder: Where its tokenizer and processors are to be; a file that is there already stays.

    Returns:
        The names of the files that were copied.

    Example:
        >>> import tempfile
        >>> here, there = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        >>> for name in ("tokenizer.json", "model.safetensors"):
        ...     _ = (here / name).write_text("{}")
        >>> copy_readers(here, there)
        ['tokenizer.json']
    """
    found = {path for pattern in _READERS for path in source.glob(pattern) if path.is_file()}
    new = [path for path in sorted(found) if not (folder / path.name).exists()]
    for path in new:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in new]


def _class(folder: Path) -> Any:
    asked = f"the Transformers folder {str(folder)!r}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        found = f"its config.json cannot be read ({error})"
        raise FormatError(asked, found, "it names the class of the model", "check it") from error
    if "auto_map" in config:
        found = "its config.json names code to run (auto_map)"
        why = "code out of a model folder is never run"
        raise UsageError(asked, found, why, "build it in a file of your own: file.py:function")
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "transformers", asked) from None
    if not names:
        return transformers.AutoModel
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        found = (
            f"its architecture is {names[0]!r}, which Transformers {transformers.__version__} lacks"
        )
        raise UsageError(asked, found, "the class must be known", "use a version that has it")
    return cls


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        found = f"Transformers cannot load it ({type(error).__name__}: {str(error)[:300]})"
        why = "it must hold config.json and model.safetensors of the same model"
        asked = f"the Transformers folder {str(folder)!r}"
        raise FormatError(asked, found, why, "check the folder") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings on the terminal meanwhile."""
    # Untyped, hence Any.
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
