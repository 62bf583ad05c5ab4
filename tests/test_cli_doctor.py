"""What doctor measures, says and prints."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from secateur.cli import doctor
from secateur.cli.main import app
from secateur.core import facts
from secateur.core.errors import MissingNative, UsageError
from secateur.report.doctor import break_even_table, break_even_text, machine_table
from secateur.runtime import breakeven, library, machine, native
from secateur.runtime.advice import advice
from secateur.runtime.breakeven import BreakEven, Case, Point, break_evens, crossing, pruned
from secateur.runtime.machine import Cache, Machine, caches, listed
from secateur.runtime.native import Spec
from secateur.runtime.race import Raced

needs_native = pytest.mark.skipif(not library.available(), reason="the native library is not built")

HERE = Machine(
    processor="Test 3000",
    system="Linux x86_64",
    cores=8,
    caches=(Cache(1, 48 << 10, 2), Cache(2, 2 << 20, 2), Cache(3, 480 << 20, 32)),
    instructions=("avx2", "fma", "avx512f"),
    kernels=("avx512", "avx2", "baseline"),
    isa="avx512",
    problem="",
    load=0.3,
    threads=4,
    read_gb_per_s=40.0,
    float32_gflops=500.0,
    float32_by="PyTorch",
    bfloat16_gflops=550.0,
)
SMALL = (
    Case("conv", Spec("conv", 16, 8, kernel=(3, 3), pads=(1, 1, 1, 1)), (1, 8, 6, 6)),
    Case("linear", Spec("linear", 32, 64), (9, 64)),
    Case("linear, 1 token", Spec("linear", 32, 64), (1, 64)),
    Case("linear, 1 token", Spec("linear", 32, 64), (1, 64), "bfloat16"),
)


def found(pattern: str, *ratios: float, layer: str = "conv", dtype: str = "float32") -> BreakEven:
    """A break-even from ratios at 30, 55, 75 and 90 %."""
    points = tuple(
        Point(s, 1.0, r, r, "kernel list 1x8")
        for s, r in zip(breakeven.SPARSITIES, ratios, strict=False)
    )
    where, at_most = crossing([(p.sparsity, p.ratio) for p in points])
    return BreakEven(layer, dtype, pattern, "PyTorch", points, where, at_most)


# ---- the machine


def write_cache(folder: Path, number: int, **values: str) -> None:
    """One cache as Linux describes it."""
    place = folder / "cpu0" / "cache" / f"index{number}"
    place.mkdir(parents=True)
    for name, value in values.items():
        (place / name).write_text(value + "\n")


def test_caches_are_read_and_the_one_of_instructions_left_out(tmp_path: Path) -> None:
    write_cache(tmp_path, 0, type="Data", level="1", size="48K", shared_cpu_list="0,64")
    write_cache(tmp_path, 1, type="Instruction", level="1", size="32K", shared_cpu_list="0,64")
    write_cache(tmp_path, 2, type="Unified", level="3", size="480M", shared_cpu_list="0-31,64-95")
    write_cache(tmp_path, 3, type="Unified", level="2", size="2048K", shared_cpu_list="0")
    write_cache(tmp_path, 4, type="Unified", level="4", size="odd", shared_cpu_list="0")
    write_cache(tmp_path, 5, type="Unified")
    assert caches(tmp_path) == (
        Cache(1, 48 << 10, 2),
        Cache(2, 2 << 20, 1),
        Cache(3, 480 << 20, 64),
    )


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3", 4), ("0-1,4-5,9", 5), ("", 0)])
def test_lists_of_processors(text: str, count: int) -> None:
    assert listed(text) == count


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ("model name\t: AMD EPYC", "AMD EPYC (family 26, model 2)"),
        ("model name\t: AMD EPYC 9R14", "AMD EPYC 9R14"),
    ],
)
def test_a_processor_whose_name_is_hidden(
    about: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"cpu family\t: 26\nmodel\t\t: 2\n{about}\n\nmodel\t\t: 3\n"
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(facts, "_CPUINFO", tmp_path / "cpuinfo")
    assert facts.processor() == name


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "_WIDTH", 64)
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    before = torch.get_num_threads()
    seen = machine.machine(1)
    assert torch.get_num_threads() == before
    assert seen.cores >= 1
    assert min(seen.read_gb_per_s, seen.float32_gflops, seen.bfloat16_gflops) > 0
    assert bool(seen.kernels) == library.available()
    assert seen.float32_by in ("PyTorch", "ONNX Runtime")
    with pytest.raises(UsageError, match="threads=0"):
        machine.machine(0)


@pytest.mark.parametrize(("cores", "said"), [(1, "1 processor. "), (4, "4 processors. ")])
def test_more_threads_than_processors_are_refused(
    cores: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: cores)
    with pytest.raises(UsageError, match=said) as caught:
        machine.machine(cores + 1)
    assert all(caught.value.parts().values())


def test_the_rate_of_float32_is_that_of_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read_rate", lambda: 1.0)
    monkeypatch.setattr(machine, "_matmul_rate", lambda _: 200.0)
    for other, rate, by in ((400.0, 400.0, "ONNX Runtime"), (0.0, 200.0, "PyTorch")):
        monkeypatch.setattr(machine, "_onnxruntime_rate", lambda _, other=other: other)
        seen = machine.machine(1)
        assert (seen.float32_gflops, seen.float32_by, seen.bfloat16_gflops) == (rate, by, 200.0)


def test_a_machine_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[str, ...]:
        raise MissingNative("it was not built")

    monkeypatch.setattr(native, "isas", missing)
    kernels, isa, problem = machine._kernels()
    assert (kernels, isa) == ((), None)
    assert "it was not built" in problem
    without = dataclasses.replace(HERE, kernels=(), isa=None, problem=problem)
    assert "no sparse kernels" in advice(without, ())[0]


@needs_native
def test_a_wrong_instruction_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> str:
        raise UsageError("SECATEUR_ISA=mmx", "there is none of that name")

    monkeypatch.setattr(native, "isa", wrong)
    kernels, isa, problem = machine._kernels()
    assert kernels
    assert isa is None
    assert "mmx" in problem


# ---- break-even


@pytest.mark.parametrize(
    ("ratios", "where"),
    [
        ((2.0, 1.5, 0.5, 0.4), (0.65, False)),
        ((0.9, 0.8, 0.7, 0.6), (0.3, True)),
        ((4.0, 3.0, 2.0, 1.1), (None, False)),
        ((1.0, 0.9, 0.8, 0.7), (0.3, True)),
        # One bad measurement: the fit is 1.1, 1.1, 0.5, so it meets 1 a sixth of the way on.
        ((0.8, 1.4, 0.5), (0.583, False)),
    ],
)
def test_where_a_noisy_line_meets_one(
    ratios: tuple[float, ...], where: tuple[float | None, bool]
) -> None:
    assert crossing(list(zip(breakeven.SPARSITIES, ratios, strict=False))) == where


@pytest.mark.parametrize("pattern", breakeven.PATTERNS)
def test_patterns_are_what_they_say(pattern: str) -> None:
    spec = Spec("linear", 64, 256)
    kept = pruned(spec, pattern, 0.5) != 0
    assert abs(float(kept.float().mean()) - 0.5) < 0.05
    rows = breakeven.PATTERNS[pattern]
    if rows:
        groups = kept.view(-1, rows, 256)
        assert torch.equal(groups.all(1), groups.any(1))
    else:
        assert (kept.view(-1, 4).sum(1) == 2).all()


@needs_native
def test_every_pattern_is_timed() -> None:
    results = list(break_evens(1, cases=SMALL, seconds=0.0))
    assert [(r.layer, r.dtype, r.pattern) for r in results] == [
        *(("conv", "float32", p) for p in breakeven.PATTERNS),
        *(("linear", "float32", p) for p in breakeven.PATTERNS),
        ("linear, 1 token", "float32", "unstructured"),
        ("linear, 1 token", "bfloat16", "unstructured"),
    ]
    for result in results:
        assert all(p.dense_ms > 0 and p.sparse_ms > 0 for p in result.points)
        families = {p.kernel.split()[1] for p in result.points}
        if "token" in result.layer:
            assert families == {"gemv"}
        elif "blocks" in result.pattern:
            assert families == {"blocks"}
        else:
            assert families <= {"list", "panels"}
    Console(width=100).print(break_even_table(results))


@needs_native
def test_runs_that_other_work_held_up_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    held_up = (4.0, 80.0, 4.0, 80.0, 80.0)

    def busy(runners: list[Any], **_: Any) -> Raced:
        return Raced((held_up, *[(2.0, 2.0, 90.0, 90.0, 90.0)] * (len(runners) - 1)))

    monkeypatch.setattr(breakeven, "race", busy)
    points = [p for r in break_evens(1, cases=SMALL[:1]) for p in r.points]
    assert {(p.dense_ms, p.sparse_ms, p.ratio) for p in points} == {(4.0, 2.0, 0.5)}


@pytest.mark.parametrize("case", SMALL)
def test_both_dense_layers_can_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    breakeven.dense_runner(case, 1)[1]()
    monkeypatch.setattr(breakeven, "find_spec", lambda _: None)
    name, run = breakeven.dense_runner(case, 1)
    run()
    assert name == "PyTorch"


# ---- advice


def test_advice_names_where_each_pattern_pays() -> None:
    measured = [
        found("unstructured", 2.0, 1.5, 0.5, 0.4),
        found("unstructured", 1.5, 0.5, 0.4, 0.3, layer="linear"),
        found("4x1 blocks", 0.9, 0.8, 0.7, 0.6),
        found("16x1 blocks", 4.0, 3.0, 2.0, 1.1),
        found("2:4", 1.6),
        found("unstructured", 0.9, 0.5, layer="linear, 1 token", dtype="bfloat16"),
    ]
    said = advice(HERE, measured)
    assert said[0] == "Unstructured sparsity pays from 65 % on, in all layers measured."
    assert said[1] == "Sparsity in 4x1 blocks pays at 30 % already, in all layers measured."
    assert "16x1 blocks was not faster than dense in 1 of 1 layers" in said[2]
    assert said[3] == "2:4 does not pay on this processor: 0.62 times the dense speed at 50 %."
    assert "it pays at 30 % already in bfloat16." in said[4]
    assert "no rival here: 1.1 times" in said[5]


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((0.5, 0.8), "pays on this processor in all layers measured: 1.25 to 2.00 times"),
        ((0.5, 1.25, 2.0), "pays on this processor in 1 of 3 layers measured: 0.50 to 2.00 times"),
        ((0.98, 2.0), "does not pay on this processor: 0.50 to 1.02 times"),
    ],
)
def test_advice_about_two_of_four_names_the_range(ratios: tuple[float, ...], said: str) -> None:
    measured = [found("2:4", ratio, layer=str(i)) for i, ratio in enumerate(ratios)]
    assert advice(HERE, measured)[0] == f"2:4 {said} the dense speed at 50 %."


def test_advice_about_a_matrix_unit() -> None:
    amx = dataclasses.replace(
        HERE, bfloat16_gflops=2000.0, instructions=("avx512f", "amx_tile", "amx_bf16")
    )
    overtakes = found("unstructured", 2.0, 1.0, 0.4, 0.1)
    assert (
        "it has a matrix unit (AMX). Unstructured float32 overtakes it from about 82 % on"
        in (advice(amx, [overtakes])[-1])
    )
    assert "does not catch up" in advice(amx, [found("unstructured", 2.0, 1.0, 0.6, 0.3)])[-1]


def test_advice_about_a_bfloat16_that_is_emulated() -> None:
    slow = dataclasses.replace(HERE, bfloat16_gflops=1.0)
    assert "no rival here: 0.002 times the rate" in advice(slow, ())[-1]
    console = Console(file=(text := io.StringIO()), width=120)
    console.print(machine_table(slow))
    assert "1 GFLOP/s (PyTorch), 0.002x float32" in text.getvalue()


def test_advice_about_a_busy_machine() -> None:
    assert "(load 3.5 on 8 processors)" in advice(dataclasses.replace(HERE, load=3.5), ())[0]
    assert not any("busy" in said for said in advice(HERE, ()))


def test_advice_about_a_forced_instruction_set() -> None:
    said = advice(dataclasses.replace(HERE, isa="avx2"), ())
    assert said[0] == (
        "SECATEUR_ISA holds the kernels to avx2; this machine has avx512. Unset it for speed."
    )


# ---- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "machine", lambda threads: dataclasses.replace(HERE, threads=threads)
    )
    results = [found("unstructured", 2.0, 1.5, 0.5, 0.4), found("2:4", 1.6)]
    monkeypatch.setattr(doctor, "break_evens", lambda _: iter(results))


@pytest.mark.usefixtures("quick")
def test_the_document() -> None:
    run = CliRunner().invoke(app, ["doctor", "--json", "--threads", "3"])
    assert run.exit_code == 0, run.output
    document: dict[str, Any] = json.loads(run.stdout)
    result = document.get("result", document)
    assert result["machine"]["threads"] == 3
    assert result["machine"]["amx"] is False
    assert result["machine"]["caches"][2] == {"level": 3, "bytes": 480 << 20, "shared_by": 32}
    assert [b["pattern"] for b in result["break_even"]] == ["unstructured", "2:4"]
    assert result["break_even"][0]["sparsity"] == 0.65
    assert len(result["advice"]) == 3


@pytest.mark.usefixtures("quick")
def test_the_text() -> None:
    run = CliRunner().invoke(app, ["doctor"])
    assert run.exit_code == 0, run.output
    for part in (
        "Test 3000",
        "L3 480 MiB",
        "40.0 GB/s",
        "1.1x float32",
        "65 %",
        "0.62x",
        "PyTorch",
    ):
        assert part in run.output, part
    assert "Unstructured sparsity pays from 65 % on" in run.output


def test_tables_of_an_unknown_machine() -> None:
    bare = dataclasses.replace(HERE, caches=(), instructions=(), kernels=(), isa=None)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(machine_table(bare))
    text = console.export_text()
    assert text.count("unknown") == 2
    assert text.count("none") == 2
    assert break_even_text(found("4x1 blocks", 2.0, 1.5)) == "never"
