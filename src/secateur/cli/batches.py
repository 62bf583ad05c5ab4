"""What networks are run on: data, or shapes that stand in for them."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from secateur.core.batches import Batch, Data, evaluating, forward, to_device
from secateur.core.errors import UsageError
from secateur.core.failing import on_example
from secateur.core.slots import device_of
from secateur.drive.structural.cutting import as_batch
from secateur.frontends import load_data
from secateur.frontends.example import example_inputs


def data_from(data: str | None, calibration: int | None) -> Data | None:
    """The data that ``--data`` names, with as many calibration samples as asked for.

    Raises:
        UsageError: Samples were asked for, of no data.

    Example:
        >>> data_from(None, 64)
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: --calibration 64: there is no --data. ...
    """
    if data is None and calibration is not None:
        raise UsageError(
            f"--calibration {calibration}",
            "there is no --data",
            "samples are taken from its training batches",
            "add --data, or leave --calibration out",
        )
    found = None if data is None else load_data(data)
    if found is None or calibration is None:
        return found
    return dataclasses.replace(found, calibration=calibration)


def measurable(data: Data | None) -> Data | None:
    """Data with batches on which a network can be measured; None without.

    Loaders are not asked whether they are empty: a stream has no length.

    Example:
        >>> measurable(Data()) is None, measurable(Data(test=[])) is None
        (True, False)
    """
    if data is None or (data.test is None and data.train is None):
        return None
    return data


def example_from(inputs: str | None, data: str | None, *models: nn.Module) -> Batch | None:
    """The batch that ``--input`` describes, or None where it was not given.

    Args:
        inputs: The value of ``--input``.
        data: That of ``--data``, which has batches of its own.
        models: Each is run once.

    Raises:
        UsageError: Both were given, the shapes cannot be read, or a model does not run on them.

    Example:
        >>> example_from("2x4", None, nn.Linear(4, 2)).shape
        torch.Size([2, 4])
    """
    if inputs is None:
        return None
    if data is not None:
        raise UsageError(
            f"--input {inputs} --data {data}",
            "both were given",
            "each says what the network reads",
            "leave --input out",
        )
    batch = as_batch(example_inputs(models[0], inputs))
    for model in models:
        why = "it is timed on it, and its multiply-adds are counted"
        with on_example(model, why), evaluating(model), torch.no_grad():
            forward(model, to_device(batch, device_of(model)))
    return batch
