"""Heads by their numbers, and cut Transformers models that Transformers loads again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import FormatError, UsageError
from secateur.drive.structural.heads import prune_heads
from secateur.drive.structural.uniform import uniform_keep
from secateur.formats import BlockEdit
from secateur.frontends.surgery import PassThrough, surgery_for
from secateur.frontends.transformers_save import load_transformers, save_transformers
from secateur.structure import Cuts, Structure, apply_, couple, cuts_for
from secateur.structure.masked import call, compare, predictions

transformers = pytest.importorskip("transformers")

IDS = {"input_ids": torch.arange(14).reshape(2, 7) % 50}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
TEXT = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5, "vocab_size": 50}


def bert() -> nn.Module:
    config = transformers.BertConfig(**TEXT, intermediate_size=48)
    return transformers.BertModel(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**TEXT, intermediate_size=48)
    return transformers.RobertaForMaskedLM(config)


def electra() -> nn.Module:
    config = transformers.ElectraConfig(**TEXT, intermediate_size=48, embedding_size=24)
    return transformers.ElectraModel(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        dim=40, n_layers=2, n_heads=5, hidden_dim=48, vocab_size=50
    )
    return transformers.DistilBertModel(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=40,
        n_layer=2,
        n_head=5,
        vocab_size=50,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    more = {
        **TEXT,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "head_dim": 8,
        "num_key_value_heads": 3,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**more, intermediate_size=48))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        **{**TEXT, "image_size": 16, "patch_size": 8, "intermediate_size": 48}
    )
    return transformers.ViTModel(config)


# model, inputs, weight of its queries in layer 1, its output weight, whether heads are rows of it
QUERIES: list[tuple[Callable[[], nn.Module], dict[str, Tensor], str, str]] = [
    (bert, IDS, "encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.output.dense"),
    (
        roberta,
        IDS,
        "roberta.encoder.layer.{}.attention.self.query",
        "roberta.encoder.layer.{}.attention.output.dense",
    ),
    (
        electra,
        IDS,
        "encoder.layer.{}.attention.self.query",
        "encoder.layer.{}.attention.output.dense",
    ),
    (
        distilbert,
        IDS,
        "transformer.layer.{}.attention.q_lin",
        "transformer.layer.{}.attention.out_lin",
    ),
    (gpt2, IDS, "transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj"),
    (vit, PIXELS, "layers.{}.attention.q_proj", "layers.{}.attention.o_proj"),
    (llama, IDS, "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj"),
]


def error(a: nn.Module, b: nn.Module, inputs: Any) -> float:
    with torch.no_grad():
        return compare(predictions(call(a, inputs)), predictions(call(b, inputs))).error


def silenced(model: nn.Module, output: str, heads: dict[int, list[int]]) -> nn.Module:
    """A copy in which the output projection ignores some heads (of width 8)."""
    silent = copy.deepcopy(model)
    for layer, numbers in heads.items():
        module = silent.get_submodule(output.format(layer))
        for head in numbers:
            rows = slice(8 * head, 8 * head + 8)
            with torch.no_grad():
                if isinstance(module, nn.Linear):
                    module.weight[:, rows] = 0
                else:  # GPT-2 stores (in, out)
                    module.weight[rows] = 0
    return silent


@pytest.mark.parametrize(("build", "inputs", "query", "output"), QUERIES)
def test_heads_are_removed(
    build: Callable[[], nn.Module], inputs: Any, query: str, output: str, tmp_path: Path
) -> None:
    model = build().eval()
    whole = llama == build
    first, second = ({0: [1], 1: [0, 4]}, {1: [0]}) if not whole else ({0: [0, 1]}, {1: [4, 5]})
    silent = silenced(model, output, first)
    before = copy.deepcopy(model)
    pruned = prune_heads(model, first)
    assert pruned.model is model
    assert error(model, silent, inputs) < 1e-5
    assert error(model, before, inputs) > 1e-5
    heads = 6 if whole else 5
    for layer, gone in first.items():
        weight = model.get_submodule(query.format(layer)).weight
        share = weight.numel() / before.get_submodule(query.format(layer)).weight.numel()
        assert share == pytest.approx(1 - len(gone) / heads)
    # Saved as a bundle and loaded into a fresh model.
    folder = pruned.save(tmp_path / "b")
    fresh = build().eval()
    secateur.load(fresh, folder)
    assert error(fresh, model, inputs) == 0
    secateur.load(before, folder, check_weights=True)
    # Numbers are those of the model as it is now.
    silent = silenced(model, output, second)
    again = prune_heads(model, second)
    assert error(model, silent, inputs) < 1e-5
    fresh = build().eval()
    secateur.load(fresh, again.save(tmp_path / "c"))
    assert error(fresh, model, inputs) == 0


def test_heads_that_cannot_be_removed() -> None:
    model = llama().eval()
    before = copy.deepcopy(model)

    def refused(heads: dict[int, list[int]], match: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            prune_heads(model, heads, **options)
        assert "nothing was changed" in str(caught.value)
        assert error(model, before, IDS) == 0

    refused({0: [2]}, r"head 2 is named without \[3\]. Heads 2 to 3 share one key")
    refused({1: [0, 1], 0: [0, 1, 5]}, "head 5 is named without")
    refused({2: [0]}, "no layer 2; those of 'model.layers' are 0 to 1")
    refused({0: [6]}, "its heads are 0 to 5")
    refused({0: [-1]}, "has no head -1")
    refused({0: range(6)}, "all 6 heads")
    refused({0: [0, 1]}, "no list of layers", layers="model.nothing")
    model.model.layers[0] = before.model.layers[0] = PassThrough()
    refused({0: [0, 1]}, "layers.0 has no weights. A block that was removed")
    with pytest.raises(UsageError, match="no list of layers"):
        prune_heads(nn.Linear(2, 2), {0: [0]}, example=torch.ones(1, 2))


def test_no_heads_are_no_change() -> None:
    model = bert().eval()
    before = copy.deepcopy(model)
    prune_heads(model, {0: [], 1: []})
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )


def test_a_list_of_pruned_heads_is_kept_up() -> None:
    model: Any = bert().eval()
    model.config.pruned_heads = {}
    prune_heads(model, {0: [1]})
    prune_heads(model, {0: [1], 1: [2, 0]})
    assert model.config.pruned_heads == {0: [1, 2], 1: [0, 2]}


# -- saving for Transformers ------------------------------------------------------------------------


def kept(structure: Structure, share: float, *, lead: str = "") -> dict[str, Tensor]:
    """Every width with ``lead`` in its name keeps the same share."""
    keep = {}
    for width in structure.widths:
        if lead in width.name:
            count = max(1, round(share * width.groups))
            keep[width.name] = torch.arange(width.groups) >= width.groups - count
    return keep


def cut(model: nn.Module, keep: dict[str, Tensor], structure: Structure) -> Any:
    cuts = cuts_for(model, structure, keep)
    surgery = surgery_for(model, cuts)
    apply_(model, cuts)
    return surgery


FEED = {bert: "intermediate", llama: "mlp.gate", gpt2: "mlp.c_fc", vit: "fc1"}
KEYS = {
    bert: {"intermediate_size": 24},
    llama: {"intermediate_size": 24},
    gpt2: {"n_inner": 80},
    vit: {"intermediate_size": 24},
}


@pytest.mark.parametrize("build", list(FEED))
def test_uniform_models_load_with_plain_from_pretrained(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    inputs = PIXELS if build is vit else IDS
    model = build().eval()
    structure = couple(model, inputs)
    surgery = cut(model, kept(structure, 0.5, lead=FEED[build]), structure)
    saved = save_transformers(model, tmp_path / "out", surgery)
    assert saved.uniform
    assert saved.changed == KEYS[build]
    loaded: Any = type(model).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    assert error(loaded.eval(), model, inputs) == 0
    assert {*map(str, (tmp_path / "out").iterdir())} >= {str(tmp_path / "out" / "config.json")}
    assert not (tmp_path / "out" / "surgery.json").exists()
    assert error(load_transformers(tmp_path / "out"), model, inputs) == 0


def test_saving_leaves_every_module_in_its_mode(tmp_path: Path) -> None:
    model: Any = bert()
    structure = couple(model, IDS)
    surgery = cut(model, kept(structure, 0.5, lead=FEED[bert]), structure)
    model.train()
    model.embeddings.eval()  # a part that is not trained, say
    modes = [module.training for module in model.modules()]
    save_transformers(model, tmp_path / "out", surgery)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("build", [llama, gpt2])
def test_all_widths_at_once_can_be_uniform(build: Any, tmp_path: Path) -> None:
    """Heads and the residual width too: GPT-2 needs them in proportion, Llama does not."""
    model = build().eval()
    structure = couple(model, IDS)
    surgery = cut(model, kept(structure, 0.5 if build is llama else 0.6), structure)
    saved = save_transformers(model, tmp_path / "out", surgery)
    assert saved.uniform
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert error(loaded, model, IDS) < 1e-6
    config = loaded.config
    expected = (24, 3) if build is gpt2 else (24, 4)
    assert (config.hidden_size, config.num_attention_heads) == expected


@pytest.mark.parametrize("build", [bert, llama, gpt2, vit])
def test_other_models_load_with_our_loader(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    inputs = PIXELS if build is vit else IDS
    model = build().eval()
    structure = couple(model, inputs)
    keep = kept(structure, 0.5, lead=FEED[build])
    name = list(keep)[1]
    keep[name] = torch.arange(len(keep[name])) < 10
    surgery = cut(model, keep, structure)
    saved = save_transformers(model, tmp_path / "out", surgery)
    assert not saved.uniform
    (key, value), *more = KEYS[build].items()
    assert not more
    assert saved.layers == {0: {key: value}, 1: {key: 10}}
    assert saved.unstated == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"] == {"0": {key: value}, "1": {key: 10}}
    recorded = type(model.config).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    assert getattr(recorded.per_layer_config[1], key) == 10
    assert error(load_transformers(tmp_path / "out"), model, inputs) == 0


def test_heads_of_bert_are_stated_by_no_configuration(tmp_path: Path) -> None:
    model = bert().eval()
    pruned = prune_heads(model, {1: [0]})
    assert pruned.surgery is not None
    saved = save_transformers(model, tmp_path / "out", pruned.surgery)
    assert (saved.uniform, saved.layers, saved.unstated) == (False, {}, (1,))
    assert error(load_transformers(tmp_path / "out"), model, IDS) == 0
    for name in ("surgery.json", "model.safetensors"):
        file = tmp_path / "out" / name
        good = file.read_bytes()
        file.write_bytes(good[:-20] + b"?" + good[-19:])
        with pytest.raises(FormatError, match=name):
            load_transformers(tmp_path / "out")
        file.write_bytes(good)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_removed_layers_are_renumbered(build: Any, tmp_path: Path) -> None:
    model = build().eval()
    path = "model.layers" if build is llama else "transformer.h"
    surgery = surgery_for(model, Cuts(), [BlockEdit(f"{path}.0", "removed")])
    second = copy.deepcopy(model.get_submodule(path)[1])
    model.get_submodule(path)[0] = PassThrough()
    saved = save_transformers(model, tmp_path / "out", surgery)
    assert saved.uniform
    assert saved.changed == {"num_hidden_layers": 1}
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert error(loaded, model, IDS) == 0
    names = dict(loaded.get_submodule(path)[0].named_parameters())
    assert all(torch.equal(x, names[n]) for n, x in second.named_parameters())


def test_a_config_that_gives_the_right_shapes_and_wrong_outputs_is_refused(tmp_path: Path) -> None:
    """Only running it shows that the rebuilt model is another function."""
    model: Any = bert().eval()
    structure = couple(model, IDS)
    surgery = cut(model, kept(structure, 0.5, lead="intermediate"), structure)
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.Tanh()
    assert not save_transformers(model, tmp_path / "out", surgery).uniform


def test_uniform_keep() -> None:
    model = bert().eval()
    structure = couple(model, IDS)
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for number, width in enumerate(structure.widths):
        keep[width.name] = torch.rand(width.groups, generator=generator) > 0.2 * (number + 1)
        keep[width.name][0] = True
    scores = {w.name: torch.rand(w.groups, generator=generator) for w in structure.widths}
    evened = uniform_keep(structure, keep, scores)
    for i in (0, 1):
        first, second = (structure.widths[i].name, structure.widths[i + 2].name)
        counts = int(evened[first].sum()), int(evened[second].sum())
        assert counts[0] == counts[1] >= 1
        assert counts[0] in (
            (int(keep[first].sum()) + int(keep[second].sum())) // 2 + d for d in (0, 1)
        )
    for name, flags in evened.items():
        # Nested: groups are only added, or only taken away, and by their scores.
        more, less = flags & ~keep[name], keep[name] & ~flags
        assert not (more.any() and less.any())
        if less.any():
            assert scores[name][less].max() <= scores[name][flags].min()
        if more.any():
            assert scores[name][more].min() >= scores[name][~flags].max()
    # A width that is not named keeps everything, and counts as such.
    one = structure.widths[1].name
    both = uniform_keep(structure, {one: torch.arange(48) < 24})
    assert [int(flags.sum()) for flags in both.values()] == [36, 36]
    assert uniform_keep(structure, evened, scores).keys() == evened.keys()


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
def test_heads_of_a_mixture_of_experts(kind: str) -> None:
    more = {"num_local_experts": 4} if kind == "Mixtral" else {"num_experts": 4}
    config = getattr(transformers, f"{kind}Config")(
        **{**TEXT, "num_hidden_layers": 1}, num_key_value_heads=5, intermediate_size=48, **more
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    silent = silenced(model, "model.layers.{}.self_attn.o_proj", {0: [1]})
    prune_heads(model, {0: [1]})
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 40)
    assert error(model, silent, IDS) < 1e-5
