"""`atom doctor` names what is here, what isn't, and fails where atom can't run."""

import json

import pytest
import torch

from atomcli.cli import doctor


def test_doctor_on_this_machine(atom):
    outcome = atom("doctor", "--json")
    assert outcome.code == 0
    findings = {finding["what"]: finding for finding in json.loads(outcome.out)["findings"]}
    assert findings["torch"] == {"what": "torch", "state": "ok", "found": torch.__version__}
    assert {"Python", "transformers", "memory", "cache"} <= findings.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_why_no_kernel_runs(atom):
    lines = atom("doctor").out.splitlines()
    assert any(line.startswith("no") and "GPU" in line for line in lines)
    assert any(line.startswith("no") and "kernels" in line and "reference" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_it_ends_with_the_one_command_to_type(atom):
    assert atom("doctor").err.splitlines()[-1] == "next: atom quantize demo --samples 8"


def test_an_old_library_is_broken_and_exits_1(atom, monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "2.4.0+cpu" if name == "torch" else real(name))
    outcome = atom("doctor")
    assert outcome.code == 1
    assert "2.4.0+cpu, atom needs at least 2.11" in outcome.out
    assert outcome.err == "error: Atom does not run here: torch.\nhint: Upgrade with `pip install 'torch>=2.11'`.\n"
