"""`gen3r-engine bench`: suites from any directory, reports, comparisons, wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import commands
from benchmarks.harness import read_rows
from gen3r_engine.cli import bench, main
from tests.benchmarks.rows import kernel_rows, row

REPOSITORY = Path(__file__).resolve().parents[2]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_the_command_knows_the_suites() -> None:
    assert tuple(commands.SUITES) == bench.SUITES


def test_a_suite_runs_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--case", "guidance_step", "--provider", "eager", "gen3r"]
    out = ["--out", str(tmp_path), "--commit", "abc"]
    assert main(["bench", "--suite", "kernels", *chosen, *out]) == 0
    rows = read_rows([tmp_path])
    assert {r["case"] for r in rows} == {"ceiling", "guidance_step"}
    assert {r["commit"] for r in rows} == {"abc"}
    assert "0 skipped, 0 failed" in capsys.readouterr().out
    # The same case again replaces its rows and leaves the others.
    assert main(["bench", "--suite", "kernels", *chosen[:3], "eager", *out]) == 0
    assert len(read_rows([tmp_path])) == len(rows)


def test_listing_in_another_directory(tmp_path: Path) -> None:
    """As installed: no checkout on the path but the packages themselves."""
    paths = [REPOSITORY, *(REPOSITORY / p for p in ("kernels", "engine", "export", "training"))]
    code = f"import sys; sys.path[:0] = {[str(p) for p in paths[1:]]!r}; sys.path.append('x')\n"
    # gen3r lies at the top of the checkout, beside benchmarks: link it alone.
    (tmp_path / "gen3r").symlink_to(REPOSITORY / "gen3r")
    code += f"sys.path[:0] = [{str(tmp_path)!r}]\n"
    code += "from gen3r_engine.cli import main\n"
    code += "sys.exit(main(['bench', '--suite', 'kernels', '--list', '--case', 'attention*']))"
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == [
        "attention",
        "attention_backward",
    ]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = write(tmp_path / "kernels.jsonl", kernel_rows())
    assert main(["bench", "--report", rows, "--out", str(tmp_path / "out")]) == 0
    assert "| unproject |" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").is_file()
    assert (tmp_path / "out" / "roofline-nvidia-test-gpu.png").is_file()


def test_compare_fails_on_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a.jsonl", [row(samples=(1.0,))])
    after = write(tmp_path / "b.jsonl", [row(samples=(1.1,))])
    assert main(["bench", "--compare", before, after]) == 1
    assert "+10.0% | WORSE |" in capsys.readouterr().out
    assert main(["bench", "--compare", before, after, "--threshold", "0.2"]) == 0
    assert main(["bench", "--compare", after, before]) == 0
    assert "better" in capsys.readouterr().out


def test_options_of_a_suite_follow_two_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[object] = []

    class Fake:
        BadInput = commands.BadInput

        @staticmethod
        def run_suite(name: str, argv: list[str]) -> int:
            seen.append((name, argv))
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "load_commands", lambda: Fake)
        assert main(["bench", "--suite", "pipeline", "--", "--steps", "2"]) == 0
        options = ["--revision", "abc", "--out", "x", "--", "--frames", "9"]
        assert main(["bench", "--suite", "cpu", *options]) == 0
    assert seen == [
        ("pipeline", ["--steps", "2"]),
        ("cpu", ["--out", "x", "--commit", "abc", "--frames", "9"]),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suite", "kernels", "--case", "nix"], "no case fits ['nix']"),
        (["--suite", "loading", "--list"], "--list belongs to --suite kernels"),
        (["--suite", "speed"], "invalid choice: 'speed'"),
        (["--report", "/nonexistent.jsonl"], "does not exist; give a .jsonl file"),
        ([], "one of the arguments --suite --report --compare is required"),
    ],
)
def test_wrong_input_is_told_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert main(["bench", "--report"]) == 2
    assert (
        "belong to the source checkout; clone it and run 'make install'" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_pytest_benchmark_runs_the_same_cases() -> None:
    chosen = ["--benchmark-only", "-q", "-k", "guidance_step and multistep"]
    # In a worker of pytest-xdist its variables would make the child take itself for one.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *chosen, "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
