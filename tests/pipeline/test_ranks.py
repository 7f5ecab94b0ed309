"""Several processes make bit for bit what one makes, share the work, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import atomcli.pipeline.road as road
from atomcli.pipeline.compress import compress
from atomcli.pipeline.ranks import ALONE, SLOTS, Ranks, owners, slots
from tests.pipeline.conftest import files_of, small_recipe

PRELUDE = textwrap.dedent("""
    import os, sys, torch
    from pathlib import Path
    import atomcli.pipeline.road as road
    from atomcli.checkpoint.source import open_source
    from atomcli.cli import command, together
    from atomcli.cli.console import console
    from atomcli.errors import RunError
    from atomcli.pipeline.compress import compress
    from tests.helpers.tiny import random_tokens
    from tests.pipeline.conftest import small_recipe
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])

    def make(model, out, ranks):
        tokens = random_tokens(6, 24)
        compress(open_source(model), small_recipe(), Path(out), tokens=tokens, device="cpu", ranks=ranks)

    @command.command
    def work():
        with together.meeting("cpu") as ranks:
            run(ranks)

    def start():
        import typer
        try:
            work(as_json=False, quiet=False, no_color=True, debug=False)
        except typer.Exit as end:
            sys.exit(end.exit_code)
""")


def launch(program: str, *arguments: object, size: int = 2) -> list[subprocess.Popen]:
    """The processes of one run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line sets it before torch is imported
    shared["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(program), *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and stderr of each process."""
    outputs = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


def without_timings(directory: Path) -> dict[str, object]:
    report = json.loads((directory / "atom_report.json").read_text())
    report.pop("timings")
    return report


@pytest.mark.slow
def test_three_processes_make_what_one_makes(parent, tokens, tmp_path, monkeypatch):
    """Dense and sparse, from the start and from the middle of a run that one process began."""
    sources = {name: parent(name, num_hidden_layers=3) for name in ("llama", "mixtral")}
    for name, source in sources.items():
        compress(source, small_recipe(), tmp_path / f"one-{name}", tokens=tokens, device="cpu")
    with monkeypatch.context() as patch:
        original = road.Road.block

        def interrupted(self, index, journal):
            if index == 1:
                raise KeyboardInterrupt
            return original(self, index, journal)

        patch.setattr(road.Road, "block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(sources["llama"], small_recipe(), tmp_path / "continued-llama", tokens=tokens, device="cpu")
    program = """
        def run(ranks):
            for name, model in (("llama", sys.argv[2]), ("mixtral", sys.argv[3])):
                for start in ("several", "continued"):
                    make(model, f"{sys.argv[1]}/{start}-{name}", ranks)
        start()
    """
    processes = launch(program, tmp_path, *(source.path for source in sources.values()), size=3)
    for code, text in ended(processes):
        assert code == 0, text
    for name in sources:
        for start in ("several", "continued"):
            assert files_of(tmp_path / f"{start}-{name}") == files_of(tmp_path / f"one-{name}")
            assert without_timings(tmp_path / f"{start}-{name}") == without_timings(tmp_path / f"one-{name}")
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_the_process_that_fails_says_so_and_all_end(parent, tmp_path):
    program = """
        def run(ranks):
            original = road.quantize_block
            def failing(*arguments, **keywords):
                if rank == 1:
                    raise RunError("The second process fails", "This is its hint")
                return original(*arguments, **keywords)
            road.quantize_block = failing
            make(sys.argv[1], sys.argv[2], ranks)
        start()
    """
    (first_code, first), (second_code, second) = ended(launch(program, parent().path, tmp_path / "out"))
    assert (first_code, second_code) == (1, 1)
    assert "error:" not in first
    assert second.count("error: The second process fails") == second.count("hint: This is its hint") == 1
    assert "Traceback" not in first + second
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_all_find_wrong_is_said_once(parent, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    program = """
        def run(ranks):
            make(sys.argv[1], sys.argv[2], ranks)
        start()
    """
    results = ended(launch(program, parent().path, tmp_path / "out"))
    assert [code for code, _ in results] == [2, 2]
    assert sum(text.count("is not empty") for _, text in results) == 1


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(parent, tmp_path):
    program = """
        def run(ranks):
            original = road.quantize_block
            def killed(*arguments, **keywords):
                if rank == 1:
                    Path(sys.argv[3]).touch()
                    import time; time.sleep(600)
                return original(*arguments, **keywords)
            road.quantize_block = killed
            make(sys.argv[1], sys.argv[2], ranks)
        start()
    """
    first, second = launch(program, parent().path, tmp_path / "out", tmp_path / "here")
    deadline = time.monotonic() + 120
    while not (tmp_path / "here").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    (first_code, text), (second_code, _) = ended([first, second])
    assert second_code == -signal.SIGKILL
    assert first_code == 1
    assert "another process of this run ended" in text.lower()
    assert "Traceback" not in text


@pytest.mark.parametrize("samples", [1, 2, SLOTS - 1, SLOTS, SLOTS + 1, 128])
def test_slots_are_the_sequences_in_order_and_rounds_are_the_slots(samples):
    cut = slots(samples)
    assert [sequence for slot in cut for sequence in slot] == list(range(samples))
    assert all(cut)
    for size in (1, 2, 3, 5, SLOTS + 3):
        together = [Ranks(rank, size).rounds(samples) for rank in range(size)]
        in_order = [rounds[number] for number in range(len(together[0])) for rounds in together]
        assert [rows for rows, _ in in_order if rows] == cut
        for number in range(len(together[0])):
            busy = sum(bool(rounds[number][0]) for rounds in together)
            assert all(rounds[number][1] == busy for rounds in together)


def test_work_is_divided_evenly_and_completely():
    costs = [float(cost) for cost in (11, 4, 4, 4, 4, 4, 1)]
    for size in (1, 2, 3, 10):
        chosen = owners(costs, size)
        loads = [sum(cost for cost, owner in zip(costs, chosen, strict=True) if owner == rank) for rank in range(size)]
        assert max(loads) <= max(max(costs), sum(costs) / size + 4)
    assert owners(costs, 1) == [0] * len(costs)


def test_alone_a_fold_is_a_sum():
    total = torch.ones(3)
    ALONE.fold(total, torch.full((3,), 2.0), 0, 1)
    assert total.tolist() == [3, 3, 3]
    assert ALONE.first_to_fail(1)
