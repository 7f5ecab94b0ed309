"""Generated model directories: of the shape they were asked for, the same twice, and hard where trained models are."""

import pytest
import torch

from atomcli.benchmarks.parents import PARENTS, parent_config, write_parent
from atomcli.checkpoint.source import open_source
from atomcli.errors import UsageError
from atomcli.models.registry import describe
from atomcli.models.tensors import account, block_shapes, outer_shapes
from atomcli.runtime.decoder import load_parent


def small(shape="llama-2-7b", blocks=2, **changes):
    return parent_config(shape, blocks, divide=32, head_dim=16, **changes)


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("shape", PARENTS)
def test_every_shape_is_a_model_that_atom_accounts_for(shape, tmp_path):
    source = open_source(str(write_parent(small(shape, 1), tmp_path / "model")))
    account(describe(source.config), source.config, source.names(), source.shape)
    hidden = load_parent(source).model(torch.tensor([[1, 40, 50, 60]])).last_hidden_state
    assert torch.isfinite(hidden).all()


@pytest.mark.parametrize(
    ("shape", "parameters"),
    # As published: 6.74, 13.02, 68.98, 46.70 and 30.53 billions.
    [
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-2-70b", 68.98),
        ("mixtral-8x7b", 46.70),
        ("qwen3-30b-a3b", 30.53),
    ],
)
def test_the_shapes_are_the_published_ones(shape, parameters):
    from math import prod

    from transformers import CONFIG_MAPPING

    raw = parent_config(shape)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    family = describe(config)
    block = sum(prod(each) for each in block_shapes(family, config, 0).values())
    outside = sum(prod(each) for each in outer_shapes(family, config).values())
    assert (block * config.num_hidden_layers + outside) / 1e9 == pytest.approx(parameters, abs=0.01)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    first, again = write_parent(small(), tmp_path / "a"), write_parent(small(), tmp_path / "b")
    other = write_parent(small(), tmp_path / "c", seed=1)
    assert files_of(first) == files_of(again)
    assert files_of(first)["model-00001-of-00003.safetensors"] != files_of(other)["model-00001-of-00003.safetensors"]


def test_a_block_does_not_depend_on_the_depth(tmp_path):
    """Only what adds to the stream shrinks with it."""
    shallow = open_source(str(write_parent(small(blocks=1), tmp_path / "a")))
    deep = open_source(str(write_parent(small(blocks=3), tmp_path / "b")))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(shallow.read(name), deep.read(name))


def test_channels_stand_out_and_the_first_token_is_massive(tmp_path):
    source = open_source(str(write_parent(small(blocks=4), tmp_path / "model")))
    model = load_parent(source)
    tokens = torch.randint(3, 259, (4, 64), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    hidden = model.model(tokens, output_hidden_states=True).hidden_states[3].float()
    largest = hidden.abs().amax(dim=-1)
    assert float(largest[:, 0].min()) > 20 * float(largest[:, 1:].median())
    energy = hidden[:, 1:].square().mean(dim=(0, 1)).sort(descending=True).values
    assert float(energy[0]) > 10 * float(energy.median())


def test_its_tokenizer_reads_any_text_and_begins_with_its_first_token(tmp_path):
    tokenizer = open_source(str(write_parent(small(blocks=1), tmp_path / "model"))).tokenizer()
    ids = tokenizer("héllo\n").input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert len(ids) == 1 + len("héllo\n".encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == "héllo\n"


def test_what_can_not_be_made_is_refused(tmp_path):
    with pytest.raises(UsageError, match="gpt-5 is no shape"):
        parent_config("gpt-5")
    with pytest.raises(UsageError, match="can't be divided by 3"):
        parent_config("llama-2-7b", divide=3)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(UsageError, match="not empty"):
        write_parent(small(), tmp_path / "model")
