"""Recipes: plain values that survive YAML, and errors that say what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import secateur
from secateur import FineTune, Recipe, Scope, Target, read_recipe, recipes
from secateur.allocate import ALLOCATIONS, Given, Ranked, Sensitivity, Tolerance
from secateur.core.errors import (
    BudgetError,
    FormatError,
    SecateurError,
    UnknownName,
    UsageError,
)
from secateur.drive.recipe_file import from_plain, part, to_plain
from secateur.drive.structural.recipe_file import read_shrink_recipe
from secateur.pattern import NM, PATTERNS, Blocks
from secateur.recover import (
    RECOVERIES,
    ROUNDINGS,
    BiasCorrection,
    ColumnSweep,
    Integer,
    LeastSquares,
)
from secateur.schedule import SCHEDULES, OneShot, Polynomial
from secateur.score import (
    CRITERIA,
    Lamp,
    Magnitude,
    Normalised,
    Random,
    Smoothed,
    Taylor,
    Wanda,
    Weighted,
)

NEED_ARGUMENTS: dict[str, Any] = {
    "lamp": Lamp(Magnitude(2)),
    "normalised": Normalised(Wanda(), "max"),
    "weighted": Weighted((Magnitude(), Lamp(Wanda())), (0.5, 2.0)),
    "smoothed": Smoothed(Taylor(), 0.3),
}

RECIPES: list[Recipe] = [
    Recipe(),
    *(Recipe(NEED_ARGUMENTS.get(n) or cls()) for n, cls in CRITERIA.items()),
    *(Recipe(pattern=cls()) for cls in PATTERNS.values()),
    *(Recipe(allocation=cls()) for cls in ALLOCATIONS.values()),
    *(Recipe(schedule=cls()) for cls in SCHEDULES.values()),
    *(Recipe(recovery=(cls(),)) for cls in RECOVERIES.values()),
    *(Recipe(rounding=cls()) for cls in ROUNDINGS.values()),
    *(alias() for alias in recipes.ALIASES.values()),
    Recipe(Random(7), Blocks(2, 3), Target("macs", 0.25), Tolerance(3, 4, "total")),
    Recipe(allocation=Given({"a.*": 0.25, "re:.*b": 0.5}, rest=Sensitivity((0.1, 0.7)))),
    Recipe(schedule=Polynomial(0.5, 7.25, 0.1, 2, "epochs"), recovery=(FineTune(8, lr=1e-5),)),
    Recipe(recovery=(ColumnSweep(64, 0.1), BiasCorrection(LeastSquares(9)), FineTune(2.5))),
    Recipe(recovery=LeastSquares(asymmetric=True, damp=0.1), sequential=True),
    Recipe(rounding=Integer(4, 32), sequential=True, seed=11),
    Recipe(scope=Scope(("layer1.*", "re:.*x"), ("Conv2d",), True), target=Target("bytes", 20000)),
    Recipe(pattern=NM(1, 3)),
    Recipe(target=Target("params", 12345)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.fingerprint())
def test_round_trip_through_yaml(recipe: Recipe, tmp_path: Path) -> None:
    plain = to_plain(recipe)
    assert from_plain(plain) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain))
    read = read_recipe(file)
    assert read == recipe
    assert read.fingerprint() == recipe.fingerprint()
    assert to_plain(read) == plain
    assert hash(read) == hash(recipe)


def test_fingerprints_tell_recipes_apart() -> None:
    prints = {r.fingerprint() for r in RECIPES}
    # Defaults written out are the default recipe (magnitude, elements, uniform, one-shot).
    assert len(prints) == len({repr(r) for r in RECIPES})
    assert Recipe(seed=1).fingerprint() != Recipe().fingerprint()
    assert Recipe(schedule=OneShot(0)).fingerprint() == Recipe().fingerprint()


def test_short_forms() -> None:
    recipe = from_plain({"criterion": "wanda", "pattern": "2:4", "recovery": "column_sweep"})
    assert recipe == Recipe(Wanda(), NM(2, 4), recovery=(ColumnSweep(),))
    assert part("pattern", "16x1") == Blocks(16, 1)
    assert from_plain({"target": "90%"}).target == Target("sparsity", 0.9)
    assert from_plain({"target": "macs=50%"}).target == Target("macs", 0.5)
    assert from_plain({"target": {"bytes": 20000}}).target == Target("bytes", 20000)
    assert from_plain({"target": 0.25}).target == Target("sparsity", 0.25)
    assert from_plain({"allocation": {"given": {"levels": {"fc": 0.5}}}}).allocation == Given(
        {"fc": 0.5}
    )


@pytest.mark.parametrize("name", recipes.ALIASES)
def test_methods(name: str) -> None:
    assert from_plain({"method": name}) == recipes.ALIASES[name]()
    if name == "sparsegpt":
        assert from_plain({"method": name, "pattern": "2:4"}).pattern == NM(2, 4)
    assert from_plain({"method": name, "target": 0.75}).target == Target("sparsity", 0.75)
    changed = from_plain({"method": name, "seed": 3})
    assert changed == dataclasses.replace(recipes.ALIASES[name](), seed=3)


def test_a_method_keeps_its_target_when_another_part_changes() -> None:
    recipe = from_plain({"method": {"magnitude": {"sparsity": 0.8}}, "pattern": "4x1"})
    assert recipe.target == Target("sparsity", 0.8)
    assert from_plain({"method": "lamp", "pattern": "per_row"}).target == Target("sparsity", 0.9)
    assert from_plain({"method": "wanda", "pattern": "1:4"}).target == Target("sparsity", 0.75)
    recipe = from_plain({"method": {"snip": {"sparsity": 0.8}}, "allocation": "erk"})
    assert recipe.target == Target("sparsity", 0.8)
    assert not isinstance(recipe.allocation, Ranked)


@pytest.mark.parametrize(
    ("value", "hint"),
    [(90, "0.9 or '90%'"), (-0.1, "from 0"), (1.0, "not including"), (1.5, "0.015"), ("nan", "")],
)
def test_impossible_sparsity(value: Any, hint: str) -> None:
    with pytest.raises(BudgetError, match=r"not in \[0, 1\)") as caught:
        from_plain({"target": value})
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("plain", "suggestion"),
    [
        ({"criterion": "magnitud"}, "magnitude"),
        ({"pattern": "element"}, "elements"),
        ({"allocation": "globl"}, "global"),
        ({"schedule": "cubical"}, "cubic"),
        ({"recovery": "column_swep"}, "column_sweep"),
        ({"rounding": "integr"}, "integer"),
        ({"method": "sparsgpt"}, "sparsegpt"),
        ({"criterio": "magnitude"}, "criterion"),
        ({"criterion": {"magnitude": {"pp": 1}}}, "p"),
        ({"scope": {"ignor": ["a"]}}, "ignore"),
        ({"method": {"wanda": {"sparsit": 0.5}}}, "sparsity"),
    ],
)
def test_unknown_names_suggest_the_nearest(plain: dict[str, Any], suggestion: str) -> None:
    with pytest.raises(UnknownName) as caught:
        from_plain(plain)
    assert suggestion in caught.value.do or suggestion in caught.value.why
    assert all(caught.value.parts()[key] for key in ("asked", "found", "why"))


@pytest.mark.parametrize(
    "plain",
    [
        {"criterion": "lamp"},
        {"criterion": "weighted"},
        {"criterion": {"weighted": {"parts": ["magnitude"], "weights": [1, 2]}}},
        {"criterion": {"weighted": {"parts": 3, "weights": [1]}}},
        {"criterion": {"magnitude": {"p": "two"}}},
        {"criterion": {"magnitude": 3}},
        {"criterion": ["magnitude"]},
        {"criterion": {"a": {}, "b": {}}},
        {"pattern": "0:4"},
        {"pattern": "4x0"},
        {"pattern": 4},
        {"target": [0.5]},
        {"target": {"sparsity": None}},
        {"target": {"sparsity": 0.5, "macs": 0.5}},
        {"target": {"flops": 0.5}},
        {"target": "half"},
        {"target": ""},
        {"target": {"macs": -1}},
        {"seed": "x"},
        {"sequential": "perhaps"},
        {"scope": {"include": 3}},
        {"scope": "fc"},
        {"schedule": {"cubic": {"begin": 5, "end": 1}}},
        {"schedule": {"cubic": {"unit": "years"}}},
        {"recovery": [{"finetune": {"epochs": -1}}]},
        {"rounding": {"integer": {"bits": 1}}},
        {"version": 2},
        {"allocation": {"given": {"levels": [1]}}},
        {"pattern": "2:4", "target": 0.9},
        {"pattern": "2:4", "allocation": "global"},
        ["magnitude"],
        "magnitude",
    ],
    ids=repr,
)
def test_wrong_recipes_raise_errors_of_ours(plain: Any) -> None:
    with pytest.raises(SecateurError) as caught:
        from_plain(plain)
    assert caught.value.asked
    assert caught.value.found


def test_a_selector_alone_is_not_spelt_letter_by_letter() -> None:
    try:
        scope = Scope(ignore="fc.weight")  # type: ignore[arg-type]
    except UsageError:
        return
    assert scope.ignore == ("fc.weight",)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    with pytest.raises(FormatError, match=r"r\.yaml"):
        read_recipe(file)
    for text in ("a: [", "a: &x 1\nb: *x\n", "\x00", "!!python/object/apply:os.getcwd []"):
        file.write_text(text)
        with pytest.raises(FormatError):
            read_recipe(file)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FormatError):
        read_recipe(file)
    file.write_text("# " + "x" * (1 << 20))
    with pytest.raises(FormatError, match="bytes"):
        read_recipe(file)
    with pytest.raises(FormatError):
        read_recipe(tmp_path)
    file.write_text("day: 2001-99-99")
    with pytest.raises(FormatError, match="month must be"):
        read_recipe(file)
    for text in ("", "# nothing yet\n", "---\n"):
        file.write_text(text)
        with pytest.raises(
            FormatError, match=r"nothing is written in it.*Write e\.g\. target: 90%"
        ):
            read_recipe(file)
    file.write_text("{}")
    assert read_recipe(file) == Recipe()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("target:", "recipe key 'target': nothing stands behind it.* target: 90%, or leave"),
        ("criterion:\ntarget: 90%", "recipe key 'criterion': nothing stands behind it"),
        ("seed: null", "recipe key 'seed': nothing stands behind it"),
        ("version: '1'", "'1' was given. A version is a number. Write version: 1"),
        ("version: true", "True was given. A version is a number"),
        ("seed: 99999999999999999999", "99999999999999999999 was given. A seed is .* 64 bits"),
        ("seed: -9223372036854775809", "64 bits"),
        ("seed: yes", "True was given. It should be a number"),
        (
            "recovery: {finetune: {epochs: yes}}",
            "argument 'epochs': True was given. It should be a number",
        ),
        ("target: 2:4", "'2:4': that is a pattern .* Give it as the pattern: 2:4"),
    ],
)
def test_keys_without_a_value_versions_and_seeds(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    for read in (read_recipe, read_shrink_recipe):
        with pytest.raises(UsageError, match=told):
            read(str(file))


@pytest.mark.parametrize("seed", [-(1 << 63), -1, (1 << 63) - 1])
def test_seeds_of_64_bits_are_taken(seed: int) -> None:
    net = torch.nn.Linear(4, 4)
    assert secateur.prune(net, Recipe(Random(), seed=seed)).facts.sparsity == 0.5


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("pattern: 2:4", NM(2, 4)),
        ("pattern: 1:4 # of four", NM(1, 4)),
        ("method: {sparsegpt: {pattern: 2:4}}", NM(2, 4)),
        ("pattern: 4x1", Blocks(4, 1)),
        ("pattern: {nm: {keep: 3, of: 8}}", NM(3, 8)),
    ],
)
def test_patterns_need_no_quotes(tmp_path: Path, text: str, pattern: Any) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert read_recipe(tmp_path / "r.yaml").pattern == pattern


def test_parts_of_the_users_own_are_recorded_by_path() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine:
        needs: frozenset[Any] = frozenset()

        def __call__(self, weight: Any, stats: Any) -> Any:
            return weight.value.abs()

    plain = to_plain(Recipe(Mine()))
    assert plain["criterion"].endswith("Mine")
    with pytest.raises(UnknownName):
        from_plain(plain)


def test_files_take_shares_and_single_names_as_people_write_them() -> None:
    plain = {
        "allocation": {"given": {"levels": {"0.weight": "40%", "2.*": 0.5}}},
        "scope": {"ignore": "4.weight"},
    }
    recipe = from_plain(plain)
    assert recipe.allocation == Given({"0.weight": 0.4, "2.*": 0.5})
    assert recipe.scope == Scope(ignore=("4.weight",))
    with pytest.raises(UsageError, match="unable to parse string as a number"):
        from_plain({"allocation": {"given": {"levels": {"0.weight": "many"}}}})
