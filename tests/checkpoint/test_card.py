"""The model card: metadata that the Hub reads, numbers that are in the files beside it, nothing that changes."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from atomcli.checkpoint.card import CARD, base_model
from atomcli.checkpoint.manifest import read_manifest, read_report
from atomcli.checkpoint.record import record_divergence
from atomcli.checkpoint.source import open_source
from atomcli.checkpoint.verify import verify_checkpoint
from atomcli.errors import InputError
from atomcli.pipeline.compress import compress
from tests.helpers.tiny import random_parent, random_tokens
from tests.pipeline.conftest import small_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("card")
    random_parent("llama")[0].save_pretrained(directory / "parent")
    source = open_source(str(directory / "parent"))
    compress(source, small_recipe(), directory / "out", tokens=random_tokens(6, 24), device="cpu")
    return directory / "out"


def test_the_hub_reads_the_card_and_it_says_what_the_report_says(made):
    card, report = ModelCard.load(made / CARD), read_report(made)
    card.data.to_dict()
    assert card.data.library_name == "transformers"
    assert "atom" in card.data.tags
    assert f"{report['proof']['kld']:.4f} nats" in card.text
    assert f"{report['bits_per_weight']:.3f}" in card.text
    for part in ("import atomcli", "vllm serve", "w4a4-g16-o16", "int4 in groups of 16"):
        assert part in card.text
    assert str(made.parent) not in card.content  # where the parent lay is nobody's business


def test_the_manifest_covers_it(made, tmp_path):
    assert CARD in read_manifest(made).files
    copy = shutil.copytree(made, tmp_path / "copy")
    verify_checkpoint(copy)
    (copy / CARD).write_text("# Another model")
    with pytest.raises(InputError, match=r"README\.md"):
        verify_checkpoint(copy)


def test_only_what_is_on_the_hub_is_a_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_model("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert base_model("demo") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("models/mine", "./models/mine", "/data/model", "model.gguf", "a/b/c"):
        assert base_model(name) is None


def test_what_is_measured_later_goes_into_the_card_and_under_the_manifest(made, tmp_path):
    row = {
        "mean_kld": 0.25, "mean_kld_standard_error": 0.01, "top1_agreement": 0.9, "token_perplexity": 22.0,
        "parent_token_perplexity": 20.0, "perplexity_ratio": 1.1, "perplexity_ratio_standard_error": None,
        "windows": 20, "window_length": 2048,
    }  # fmt: skip
    copy = shutil.copytree(made, tmp_path / "copy")
    for kld in (0.5, 0.25):
        record_divergence(copy, "held-out text", row | {"mean_kld": kld})
        verify_checkpoint(copy)
    card = ModelCard.load(copy / CARD)
    assert card.text.count("## Measured") == 1
    assert "0.2500 ± 0.0100" in card.text
    assert "20 windows of 2048 tokens" in card.text
    assert card.text.index("## Measured") < card.text.index("## Use")
    assert "0.5000" not in card.text
