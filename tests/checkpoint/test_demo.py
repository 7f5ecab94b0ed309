"""The embedded default as it really is; skipped where the package index can't be reached."""

from pathlib import Path

import pytest
import torch

from atomcli.checkpoint.assets import demo_model, demo_text
from atomcli.checkpoint.source import Source, open_source
from atomcli.errors import RunError

SENTENCE = "Prices rose by 123.45 % , didn't they?"


@pytest.fixture(scope="module")
def demo() -> Source:
    """From the user's own cache: the tests of a checkout and its demo share one download."""
    try:
        return open_source("demo")
    except RunError as error:
        pytest.skip(f"the demo model can't be fetched: {error}")


@pytest.fixture(autouse=True)
def cache() -> None:
    """Takes the place of the cache that other tests isolate themselves in."""


def test_tensors_are_those_that_transformers_loads(demo: Source) -> None:
    from transformers import AutoModelForCausalLM

    path = demo_model()
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    expected = model.state_dict()
    assert expected.keys() - demo.names() == {"lm_head.weight"}
    assert demo.config.tie_word_embeddings
    for name in demo.names():
        assert torch.equal(demo.read(name), expected[name].to(torch.bfloat16)), name
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size"):
        assert getattr(demo.config, key) == getattr(model.config, key)
    assert demo.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps)


def test_tokenizer_and_config_survive_saving(demo: Source, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    demo.save_companions(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(SENTENCE).input_ids == demo.tokenizer()(SENTENCE).input_ids
    assert tokenizer.decode(tokenizer(SENTENCE).input_ids) == SENTENCE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlamaForCausalLM"]
    assert getattr(config, "quantization_config", None) is None
    assert config.dtype == torch.bfloat16


def test_calibration_and_held_out_text_never_overlap(demo: Source) -> None:
    texts = [demo_text(kind).read_text(encoding="utf-8").split() for kind in ("calibration", "held_out")]
    runs = [{hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)} for words in texts]
    assert min(len(run) for run in runs) > 200_000
    assert not runs[0] & runs[1]


def test_the_calibration_text_is_long_enough(demo: Source) -> None:
    tokens = demo.tokenizer()(demo_text("calibration").read_text(encoding="utf-8"), verbose=False).input_ids
    assert len(tokens) >= 128 * 2048
