"""A Mixtral quantized on the card: every expert in its scheme, and the same logits wherever it is loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import atomcli
from atomcli.benchmarks.parents import parent_config, write_parent
from atomcli.checkpoint.source import open_source
from atomcli.pipeline.compress import compress
from atomcli.recipe import Recipe, load_recipe
from atomcli.runtime.decoder import load_checkpoint
from atomcli.runtime.linear import QuantLinear

pytestmark = pytest.mark.gpu
assert atomcli.__version__


@pytest.mark.parametrize("name", ["atom-w4a4", "atom-w4a8"])
def test_a_saved_mixtral_reloads_with_equal_logits(name, tmp_path):
    config = parent_config("mixtral-8x7b", 2, hidden_size=512, intermediate_size=768, num_attention_heads=8,
                           num_key_value_heads=2, head_dim=64, vocab_size=320)  # fmt: skip
    source = open_source(str(write_parent(config, tmp_path / "parent")))
    recipe = load_recipe(name).resolved()
    recipe["calibration"] |= {"samples": 8, "sequence_length": 256}
    tokens = torch.randint(3, 259, (8, 256), generator=torch.Generator().manual_seed(0))
    report = compress(source, Recipe.model_validate(recipe), tmp_path / "out", tokens=tokens, device="cuda")

    experts = {row["linear"]: row for row in report["layers"] if ".experts." in row["linear"]}
    assert len(experts) == 2 * 8 * 3
    assert all(row["bits_per_weight"] < 6 and row["tokens"] >= 512 for row in experts.values())
    assert any(row["forced_tokens"] for row in experts.values())

    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_checkpoint(tmp_path / "out")]
    with torch.inference_mode():
        ours, theirs = (model.cuda()(tokens[:2].cuda()).logits for model in models)
        assert torch.equal(ours, theirs)
        parent = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=torch.bfloat16).cuda()
        p, q = (logits.float().log_softmax(-1) for logits in (parent(tokens[:2].cuda()).logits, ours))
    assert sum(isinstance(module, QuantLinear) for module in models[0].modules()) == len(report["layers"])
    kld = float((p.exp() * (p - q)).sum(-1).mean())
    assert kld == pytest.approx(report["proof"]["kld"], rel=0.2)
