"""Writing ONNX files, and checking that they compute the same."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.core.arguments import require_dense, require_kind, require_network
from secateur.core.atomic import new_file
from secateur.core.batches import (
    Batch,
    evaluating,
    inputs_of,
    mapped,
    narrow,
    size_of,
    to_device,
)
from secateur.core.errors import DataError, MissingExtra, UsageError, kind_of
from secateur.core.failing import on_example
from secateur.core.samples import is_listed, listed_in
from secateur.core.slots import device_of
from secateur.frontends.onnx_check import Call, difference, require_repeatable

#: Largest allowed difference, relative to the largest output.
TOLERANCE = 1e-4
_HALF = (torch.bfloat16, torch.float16)
# Language models return their keys and values too, in objects that are no tensors.
_LEAN = {"use_cache": False}
# Forms that the exporter can follow where it fails on the faster ones; the numbers are the same.
_PLAIN = {
    "_attn_implementation_internal": "eager",
    "_experts_implementation_internal": "batched_mm",
}
# Keyword inputs that belong to training.
_NOT_INPUTS = ("labels",)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: The file.
        bytes: Its size.
        opset: Version of the operators.
        error: Largest difference between ONNX Runtime and PyTorch on the example, relative to the
            largest output.
        inputs: Names of the inputs.
        notes: What else a user should know.
        lengths: Whether tokens may be of any length.
    """

    path: str
    bytes: int
    opset: int
    error: float
    inputs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    lengths: bool = False


def export_onnx(model: nn.Module, example: Batch, path: str | Path) -> Exported:
    """Write ``model`` as one ONNX file, and run it to check that it computes the same.

    The batch axis of every input is dynamic, and so is the length of tokens: the second axis of
    integer inputs that have two, where the model can be exported so. Zeros are stored as ordinary
    numbers: the file is as large as that of the dense network. A network in half precision is
    written in float32, with a note: ONNX Runtime lacks most operators of these types on processors.

    Args:
        model: Run in evaluation mode; left as it was.
        example: A batch, as in training; targets are left out. One sample is doubled, since a batch
            of one would be taken for a constant.
        path: The file; it appears whole and checked, or not at all.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        UsageError: The model is accelerated or does not run on the example, PyTorch cannot export it, or
            ONNX Runtime cannot run it.
        DataError: The file computes something else, or the example is empty; no file is kept.
        FileError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> out = tempfile.mkdtemp() + "/net.onnx"
        >>> done = export_onnx(nn.Linear(4, 2), torch.randn(3, 4), out)
        >>> done.error < 1e-4, Path(out).stat().st_size == done.bytes
        (True, True)
    """
    require_onnx()  # before the work
    require_network("exporting to ONNX", model)
    names, write = (str, PathLike), "export_onnx(model, example, 'net.onnx')"
    require_kind("export_onnx(path=...)", path, names, what="a file's name", write=write)
    path = Path(path)
    asked = f"exporting {kind_of(model)} to {path.name!r}"
    require_dense(asked, model)
    call = Call(model, *_inputs(model, example))
    halves = sorted({str(p.dtype) for p in model.parameters() if p.dtype in _HALF})
    notes: tuple[str, ...] = ()
    if halves:
        inputs = tree_map_only(Tensor, _single, (call.args, call.kwargs))
        call = Call(copy.deepcopy(model).float(), *inputs)
        kinds = " and ".join(halves).replace("torch.", "")
        notes = (
            f"weights are {kinds}; the file has float32, which ONNX Runtime computes everywhere",
        )
    _require_runs(call)
    call = replace(call, lengths=any(map(call.is_tokens, call.leaves)))
    with (
        evaluating(call.model),
        new_file(path) as temporary,
        tempfile.TemporaryDirectory(prefix=".secateur-", dir=path.parent) as place,
    ):
        file = Path(place) / "model.onnx"
        try:
            made = _written(call, file, asked)
        except (UsageError, DataError):
            if not call.lengths:
                raise
            call = replace(call, lengths=False)  # e.g. a table of positions fits one length
            made = _written(call, file, asked)
        temporary.write_bytes(file.read_bytes())
    notes += made.notes
    return replace(made, path=str(path), bytes=path.stat().st_size, notes=notes)


@torch.no_grad()
def _require_runs(call: Call) -> None:
    """Run the model once, so that what is wrong with the example is not blamed on the exporter."""
    why = "the exporter follows it as it runs, and the file is checked against it"
    with on_example(call.model, why), evaluating(call.model):
        call.model(*mapped(call.args), **mapped(call.kwargs))


def _written(call: Call, file: Path, asked: str) -> Exported:
    """Write a file, and check it."""
    onnx, runtime = _packages()
    notes = _write(call, file, asked)
    onnx.checker.check_model(str(file))
    opset = max(o.version for o in onnx.load(str(file)).opset_import if not o.domain)
    session = _session(runtime, file, asked)
    error = difference(session, call, asked)
    if not error <= TOLERANCE:
        require_repeatable(call, asked, TOLERANCE)
        raise DataError(
            asked,
            f"ONNX Runtime differs from PyTorch by {error:.2g} of the largest output",
            f"at most {TOLERANCE:g} is rounding: the exporter or ONNX Runtime changed the model",
            "report the model to them; the file was not kept",
        )
    names = tuple(i.name for i in session.get_inputs())
    given = zip(names, (x for x in call.leaves if isinstance(x, Tensor)), strict=True)
    fixed = [f"{n} {tuple(x.shape)}" for n, x in given if x.ndim and not call.has_rows(x)]
    if fixed:
        notes += (f"without a row for each sample, inputs keep their shape: {', '.join(fixed)}",)
    return Exported("", 0, int(opset), error, names, notes, call.lengths)


def _session(runtime: Any, file: Path, asked: str) -> Any:
    try:
        return runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common one of their own
        raise UsageError(
            asked,
            f"ONNX Runtime does not load the file ({str(error).splitlines()[0][:300]})",
            "it lacks an operator that the exporter wrote, for this type of numbers",
            "report it to ONNX Runtime; the file was not kept",
        ) from error


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def require_onnx() -> None:
    """Refuse now what :func:`export_onnx` would refuse for want of a package.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise MissingExtra(name, "onnx", "exporting to ONNX") from None


def _packages() -> tuple[Any, Any]:
    require_onnx()
    import onnx
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    return onnx, onnxruntime


def _inputs(model: nn.Module, example: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if size_of(example) == 0:
        raise DataError(
            "exporting to ONNX",
            "the example has no samples",
            "the file is checked with them",
            "give a batch of one or more",
        )
    samples = listed_in(example)
    if any(is_listed(part, samples) for part in inputs_of(example)[0]):
        raise UsageError(
            "exporting to ONNX",
            f"the example is a list of {samples} images",
            "a file has inputs of its own for each, and so for one number of images only",
            "export the part that reads a batch as one tensor",
        )
    if size_of(example) == 1:
        example = mapped(example, lambda x: torch.cat([x, x]) if x.ndim else x)
    elif size_of(example) > 2:
        example = narrow(example, 2)
    args, kwargs = inputs_of(to_device(example, device_of(model)))
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is not None and "labels" in kwargs:  # what such models read if nothing else is given
        kwargs.setdefault("decoder_input_ids", shifted(labels=kwargs["labels"]))
    return args, {k: v for k, v in kwargs.items() if k not in _NOT_INPUTS}


def _write(call: Call, file: Path, asked: str) -> tuple[str, ...]:
    """Export; notes on what was done for it."""
    try:
        with _configured(call.model, _LEAN):
            _export(call, file)
        return ()
    except Exception as error:
        with _configured(call.model, _LEAN | _PLAIN) as changed, contextlib.suppress(Exception):
            if changed & _PLAIN.keys():
                _export(call, file)
                return ("attention and experts are written in their plain form",)
        deepest: BaseException = error
        while deepest.__cause__ is not None:  # the outer ones only say at which step it failed
            deepest = deepest.__cause__
        first = next((line for line in str(deepest).splitlines() if line.strip()), "no message")
        raise UsageError(
            asked,
            f"PyTorch's exporter failed ({type(deepest).__name__}: {first[:300]})",
            "it traces the model with torch.export, which cannot follow everything",
            "see docs.pytorch.org/docs/stable/onnx_export.html for what it can follow",
        ) from error


def _export(call: Call, file: Path) -> None:
    inputs = (*call.args, *call.kwargs.values())
    free = torch.export.Dim.AUTO

    def axes(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: axes(value) for name, value in x.items()}
        if isinstance(x, (tuple, list)):
            return type(x)(map(axes, x))
        if not call.has_rows(x):
            return None
        return {0: free, 1: free} if call.lengths and call.is_tokens(x) else {0: free}

    # Without named arguments, the exporter takes a mapping that comes last for them.
    args = call.args if call.kwargs else (*call.args, {})
    with _silent():
        torch.onnx.export(
            call.model,
            args,
            str(file),
            kwargs=call.kwargs or None,
            dynamo=True,
            external_data=False,
            dynamic_shapes=tuple(map(axes, inputs)),
            verbose=False,
        )


@contextlib.contextmanager
def _configured(model: nn.Module, values: Mapping[str, Any]) -> Iterator[set[str]]:
    """Other settings in all configurations of Transformers, where they are set; what was changed."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed: list[tuple[Any, str, Any]] = []
    try:
        for config in configs.values():
            for name, value in values.items():
                before = getattr(config, name, None)
                if before is not None and before != value:
                    setattr(config, name, value)
                    changed.append((config, name, before))
        yield {name for _, name, _ in changed}
    finally:
        for config, name, before in changed:
            setattr(config, name, before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter reports its progress on stdout, in warnings and in logs; none of it is news."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
