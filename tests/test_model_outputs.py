"""What models return: a tensor, a tuple that begins with the loss, or a mapping."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Data, FineTune, Recipe, Target, prune, recipes
from secateur.core.errors import DataError, NeedsData
from secateur.core.losses import default_loss, logits_of
from secateur.evaluate import measure

KINDS = ("tuple", "list", "mapping")


class Answering(nn.Module):
    """A classifier that returns its own loss beside the logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))

    def forward(self, x: Tensor, labels: Tensor) -> object:
        logits = self.net(x)
        loss = F.cross_entropy(logits, labels)
        if self.kind == "mapping":
            return {"loss": loss, "logits": logits}
        return (loss, logits) if self.kind == "tuple" else [loss, logits]


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    drawn = torch.randn(4, 16, 16)
    return [{"x": x, "labels": x[:, :4].argmax(1)} for x in drawn]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distill", [0.5, 1.0])
def test_distillation_trains_what_the_student_answers(kind: str, distill: float) -> None:
    cut = Recipe(target=Target("sparsity", 0.8))
    how = FineTune(2, lr=0.1, distill=distill)
    plain = prune(Answering(kind), cut, batches())
    taught = prune(Answering(kind), Recipe(target=cut.target, recovery=(how,)), batches())
    assert taught.facts.history[0]["loss"] > 0
    assert not torch.equal(plain.model.net[0].weight, taught.model.net[0].weight)
    if distill == 1:
        first = batches()[0]
        with torch.no_grad():
            dense = logits_of(Answering(kind)(**first))
            far = [F.mse_loss(logits_of(p.model(**first)), dense) for p in (plain, taught)]
        assert far[1] < far[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_loss_serves_training_and_gradients(kind: str) -> None:
    model, batch = Answering(kind), batches()[0]
    loss = F.cross_entropy(model.net(batch["x"]), batch["labels"])
    assert torch.equal(default_loss(model, batch), loss)
    history = prune(model, Recipe(recovery=(FineTune(3, lr=0.1),)), batches()).facts.history
    assert history[-1]["loss"] < history[0]["loss"]
    found = [prune(net, recipes.obd(0.5), batches()).masks for net in (model, Answering("tuple"))]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_is_read_from_the_logits(kind: str) -> None:
    model = Answering(kind)
    right = torch.cat([model.net(b["x"]).argmax(1) == b["labels"] for b in batches()])
    found = measure(model, Data(train=batches(), test=batches()), latency=False)
    assert found.accuracy == pytest.approx(right.float().mean().item())
    loss = torch.stack([F.cross_entropy(model.net(b["x"]), b["labels"]) for b in batches()]).mean()
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "None"),
        (torch.tensor(1.0), "a tensor of shape ()"),
        ((torch.tensor(1.0), None), "a tuple of a tensor of shape (), None"),
        ({"loss": torch.tensor(1.0)}, "a dict of loss"),
        ([], "a list of nothing"),
        ("logits", "a str"),
    ],
)
def test_an_output_without_predictions_is_refused(output: object, said: str) -> None:
    with pytest.raises(DataError, match="predictions") as error:
        logits_of(output)
    assert said in error.value.found


def test_a_missing_loss_says_what_the_model_returned() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"logits": x}

    with pytest.raises(NeedsData, match="a dict of logits"):
        default_loss(Plain(), batches()[0])
