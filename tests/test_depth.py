"""Depth: blocks are found by running, removed exactly, written down and replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import BudgetError, NeedsData, UsageError
from secateur.drive.structural.depth import BlockLoss, drop_blocks
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.structural.shrink import shrink
from secateur.formats import parse_surgery, surgery_text
from secateur.frontends.surgery import PassThrough, replay_, surgery_for
from secateur.frontends.transformers_save import load_transformers, save_transformers
from secateur.score import BlockInfluence
from secateur.structure import apply_, couple, cuts_for
from secateur.structure.deletion import delete_entries_, remove_blocks_
from secateur.structure.depth import Block, blocks_of, bypassed
from secateur.structure.masked import call, compare, predictions

transformers = pytest.importorskip("transformers")

IDS = {"input_ids": torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(0))}
IMAGE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Basic(nn.Module):
    """A block of a ResNet; its shortcut is the identity, or a convolution."""

    def __init__(self, inputs: int, outputs: int, *, project: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        change = project or inputs != outputs
        self.short = nn.Conv2d(inputs, outputs, 1) if change else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.body(x) + self.short(x)).relu()
        return out


class Resnet(nn.Module):
    """Stages of blocks: some keep the shape, some have a convolution as a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.stages = nn.Sequential(
            nn.Sequential(Basic(8, 8), Basic(8, 8)),
            nn.Sequential(Basic(8, 12), Basic(12, 12), Basic(12, 12, project=True)),
            nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU()),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return out


def seeded(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**TINY))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=4,
        n_head=4,
        vocab_size=40,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def qwen2() -> Any:
    config = transformers.Qwen2Config(
        **TINY,
        num_key_value_heads=2,
        use_sliding_window=True,
        max_window_layers=2,
        sliding_window=3,
    )
    return transformers.Qwen2ForCausalLM(config)


def vit() -> Any:
    sizes = {
        k: v for k, v in TINY.items() if k not in ("vocab_size", "bos_token_id", "eos_token_id")
    }
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[2, 3], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def convnext() -> Any:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[2, 3], num_stages=2)
    config.layer_scale_init_value = 1.0
    return transformers.ConvNextModel(config)


def swin() -> Any:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, vocab_size=40
    )
    return transformers.T5Model(config)


# build, example, number of blocks, whether their entries are deleted
CASES: dict[str, tuple[Callable[[], nn.Module], Any, int, bool]] = {
    "bert": (bert, IDS, 4, True),
    "gpt2": (gpt2, IDS, 4, True),
    "llama": (llama, IDS, 4, True),
    "qwen2": (qwen2, IDS, 4, True),
    "vit": (vit, IMAGE, 4, True),
    "resnet": (resnet, IMAGE, 4, False),
    "convnext": (convnext, IMAGE, 5, True),
    "swin": (swin, IMAGE, 4, False),
    "t5": (t5, {**IDS, "decoder_input_ids": IDS["input_ids"]}, 6, False),
    "hand": (Resnet, IMAGE["pixel_values"], 3, False),
}


@torch.no_grad()
def run(model: nn.Module, example: Any) -> list[Tensor]:
    return predictions(call(model, example))


@pytest.mark.parametrize("name", CASES)
def test_removed_is_bypassed_and_replays(name: str) -> None:
    build, example, count, deleted = CASES[name]
    model = seeded(build)
    blocks = blocks_of(model, example)
    assert len(blocks) == count
    gone = [blocks[0], blocks[-1]]
    with bypassed(model, gone):
        wanted = run(model, example)
    whole = run(model, example)
    assert compare(whole, wanted).error > 1e-3  # so the blocks did something
    batch = example if isinstance(example, dict) else (example, None)
    keep = [b.path for b in blocks if b not in gone]
    pruned = drop_blocks(model, 2, [batch], keep=keep)
    assert compare(run(pruned.model, example), wanted).error == 0
    assert compare(run(model, example), whole).error == 0  # the original is as it was
    assert pruned.facts.measures["proof"] == 0
    before, after = pruned.facts.measures["parameters"]
    assert before - after == sum(b.parameters for b in gone)
    assert pruned.surgery is not None
    assert {b.kind for b in pruned.surgery.blocks} == {"deleted" if deleted else "removed"}
    surgery = parse_surgery(surgery_text(pruned.surgery).encode())
    fresh = seeded(build)
    replay_(fresh, surgery, check_weights=True)
    assert compare(run(fresh, example), wanted).error == 0


def test_blocks_have_an_identity_shortcut() -> None:
    model = seeded(Resnet)
    paths = [b.path for b in blocks_of(model, IMAGE["pixel_values"])]
    assert paths == ["stages.0.0", "stages.0.1", "stages.1.1"]
    assert (
        blocks_of(nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), torch.ones(1, 3)) == []
    )
    config = transformers.AlbertConfig(**TINY, embedding_size=8)
    assert blocks_of(transformers.AlbertModel(config), IDS) == []  # one block that runs four times


def test_inputs_are_never_parameters_on_meta() -> None:
    with torch.device("meta"):
        model = bert()
        example = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    assert len(blocks_of(model, example)) == 4


@pytest.mark.parametrize("build", [llama, gpt2, qwen2])
def test_caches_and_plain_from_pretrained(build: Any, tmp_path: Path) -> None:
    model = seeded(build)
    first = blocks_of(model, IDS)[0].path
    small = copy.deepcopy(model)
    remove_blocks_(small, [first], IDS)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = small.generate(**IDS, **asked, use_cache=True)
    assert torch.equal(with_cache, small.generate(**IDS, **asked, use_cache=False))
    small.save_pretrained(tmp_path / "out")
    loaded = type(small).from_pretrained(tmp_path / "out").eval()
    assert loaded.config.num_hidden_layers == 3
    assert compare(run(loaded, IDS), run(small, IDS)).error == 0
    assert model.config.num_hidden_layers == 4  # a configuration is copied before it is edited


def test_numbers_in_layers_that_are_part_of_the_function_keep_the_block_in_its_place() -> None:
    """GPT-2 may divide by the number of the layer: renumbering would change what it computes."""
    model = seeded(gpt2)
    for block in model.transformer.h:
        block.attn.scale_attn_by_inverse_layer_idx = True
    model.config.scale_attn_by_inverse_layer_idx = True
    edits = remove_blocks_(copy.deepcopy(model), ["transformer.h.0"], IDS)
    assert [e.kind for e in edits] == ["removed"]


def test_the_lowest_scores_go() -> None:
    model = seeded(bert)
    for inner in (model.encoder.layer[2].attention.output, model.encoder.layer[2].output):
        inner.dense.weight.data.zero_()
        inner.dense.bias.data.zero_()
    pruned = drop_blocks(model, 1, [IDS])
    assert [n.where for n in pruned.facts.notes] == ["encoder.layer.2"]
    scores = pruned.facts.measures["block_scores"]
    assert min(scores, key=scores.__getitem__) == "encoder.layer.2"


def test_loss_is_measured_without_each_block() -> None:
    model = seeded(llama)
    batch = {**IDS, "labels": IDS["input_ids"]}
    paths = [b.path for b in blocks_of(model, IDS)]
    with torch.no_grad():
        dense = model(**batch).loss
        rises = []
        for path in paths:
            small = copy.deepcopy(model)
            remove_blocks_(small, [path], IDS)
            rises.append(float(small(**batch).loss - dense))
    pruned = drop_blocks(model, 1, [batch], criterion=BlockLoss(), example_inputs=IDS)
    found = pruned.facts.measures["block_scores"]
    assert [found[p] for p in paths] == pytest.approx(rises, abs=1e-6)
    assert pruned.facts.notes[0].where == paths[rises.index(min(rises))]


def test_greedy_measures_again() -> None:
    """Two blocks that undo each other: alone each is needed, together they are not."""

    class Shift(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            layer = nn.Linear(1, 1)
            layer.weight.data.zero_()
            layer.bias.data.fill_(by)
            self.inner = nn.Sequential(layer)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.inner(x)
            return out

    net = nn.Sequential(Shift(4.0), Shift(-4.0), Shift(2.5), Shift(0.1))
    batch = (torch.zeros(3, 1), torch.full((3, 1), 2.6))
    plain = drop_blocks(net, 2, [batch], criterion=BlockLoss())
    greedy = drop_blocks(net, 3, [batch], criterion=BlockLoss(greedy=True))
    assert {n.where for n in plain.facts.notes} == {"3", "2"}
    assert len(greedy.facts.notes) == 3


def test_neighbours_go_together() -> None:
    model = seeded(llama)
    pruned = drop_blocks(model, 2, [IDS], criterion=BlockInfluence((), span=2, measure="angle"))
    numbers = [int(n.where.rpartition(".")[2]) for n in pruned.facts.notes]
    assert numbers[1] == numbers[0] + 1
    with pytest.raises(UsageError, match="Ask for 2"):
        drop_blocks(model, 1, [IDS], criterion=BlockInfluence((), span=2))


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_targets(unit: str) -> None:
    model = seeded(llama)
    pruned = drop_blocks(model, f"{unit}=70%", [IDS])
    before, after = pruned.facts.measures["parameters"]
    assert sum(n.topic == "removed-block" for n in pruned.facts.notes) in (1, 2)
    assert after < before
    if unit == "params":
        assert after <= 0.7 * before < after + blocks_of(model, IDS)[0].parameters
    with pytest.raises(BudgetError, match="stay"):
        drop_blocks(model, f"{unit}=1%", [IDS])


def test_bundle_and_further_pruning(tmp_path: Path) -> None:
    """Blocks first and widths after: what was cut in the shallow network has its old names."""
    model = seeded(llama)
    shallow = drop_blocks(model, 1, [IDS], keep=["model.layers.1", "model.layers.3"])
    again = drop_blocks(shallow.model, 1, [IDS], keep=["model.layers.2"])
    recipe = ShrinkRecipe(target=secateur.Target("params", 0.7), recovery=())
    narrow = shrink(again.model, recipe, IDS)
    folder = narrow.save(tmp_path / "out")
    restored: Any = secateur.load(seeded(llama), folder).model
    assert compare(run(restored, IDS), run(narrow.model, IDS)).error == 0
    assert restored.config.num_hidden_layers == 2


@pytest.mark.parametrize("uniform", [True, False])
def test_saved_for_transformers(uniform: bool, tmp_path: Path) -> None:
    """Plainly where a configuration says it; else with the surgery for the original one."""
    shallow = drop_blocks(seeded(qwen2), 1, [IDS], keep=["model.layers.1"])
    model: Any = shallow.model
    structure = couple(model, IDS)
    keep = {
        width.name: torch.arange(width.groups) % (2 if uniform else 2 + number) == 0
        for number, width in enumerate(structure.widths)
        if width.name.endswith("gate_proj")
    }
    cuts = cuts_for(model, structure, keep)
    assert shallow.surgery is not None
    surgery = shallow.surgery.then(surgery_for(model, cuts))
    apply_(model, cuts)
    saved = save_transformers(model, tmp_path / "out", surgery, example=IDS)
    assert saved.uniform == uniform
    if uniform:
        plain = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
        assert compare(run(plain.eval(), IDS), run(model, IDS)).error < 1e-6
    loaded = load_transformers(tmp_path / "out")
    assert compare(run(loaded, IDS), run(model, IDS)).error < 1e-6


def test_refusals() -> None:
    model = seeded(bert)
    with pytest.raises(UsageError, match="it has 4"):
        drop_blocks(model, 4, [IDS])
    with pytest.raises(NeedsData, match="BlockInfluence"):
        drop_blocks(model, 1, example_inputs=IDS)
    with pytest.raises(UsageError, match="no residual block"):
        remove_blocks_(model, ["pooler"], IDS)
    with pytest.raises(UsageError, match="fails on the example"):
        blocks_of(model, torch.ones(2))
    good = {"entries": [1], "size": 4, "config": {"num_hidden_layers": [4, 3]}}
    for wrong in (
        {"size": 5},
        {"entries": [9]},
        {"entries": ["a"]},
        {"config": {"num_hidden_layers": [7, 3]}},
        {"config": {"no_such_key": [4, 3]}},
        {"config": 3},
    ):
        with pytest.raises(UsageError, match="nothing was changed"):
            delete_entries_(model, "encoder.layer", {**good, **wrong})
        assert len(model.encoder.layer) == model.config.num_hidden_layers == 4
    with pytest.raises(UsageError, match="list of"):
        delete_entries_(model, "pooler", good)


def test_a_failed_replay_changes_nothing() -> None:
    model = seeded(bert)
    surgery = drop_blocks(model, 1, [IDS]).surgery
    assert surgery is not None
    (block,) = surgery.blocks
    wrong = {
        **block.details,
        "config": {"num_hidden_layers": [4, 3], "num_attention_heads": [5, 4]},
    }
    object.__setattr__(surgery, "blocks", (type(block)(block.module, block.kind, wrong),))
    with pytest.raises(UsageError):
        replay_(model, surgery)
    assert len(model.encoder.layer) == model.config.num_hidden_layers == 4
    assert not any(isinstance(m, PassThrough) for m in model.modules())


def test_bypassed_restores_on_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError), bypassed(net, [Block("0", "tensor", 6)]):
        raise ZeroDivisionError
    assert "forward" not in vars(net[0])


@pytest.mark.parametrize("drop", [True, 2.5, 0.5, "2", "70%", None, [1]])
def test_a_drop_without_a_unit_is_no_sparsity_and_true_is_no_number(drop: Any) -> None:
    with pytest.raises(UsageError, match="drop=2 or drop='params=70%'"):
        drop_blocks(nn.Linear(1, 1), drop, [torch.zeros(1, 1)])


@pytest.mark.parametrize(("share", "missed"), [(0.6, True), (0.57, False)])
def test_a_target_in_blocks_is_told_and_so_is_a_miss(share: float, missed: bool) -> None:
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    found = drop_blocks(net, secateur.Target("params", share), [IDS])
    told = found.facts.measures["target"]
    assert told["dense"] == sum(p.numel() for p in net.parameters())
    assert told["limit"] == share * told["dense"]
    assert told["reached"] == sum(p.numel() for p in found.model.parameters()) <= told["limit"]
    assert [
        n.text.endswith("not have been met") for n in found.facts.notes if n.topic == "target"
    ] == ([True] * missed)
