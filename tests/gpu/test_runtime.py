"""The fused runtime on a card: its kernels against the reference, graphs against plain calls, requests together and
alone, and transformers' generate on pages."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from atomcli.formats.scheme import SCHEMES, KVFormat, Scheme
from atomcli.kernels import attention, rowwise
from atomcli.runtime.decoding import DecodeRows, ladder
from atomcli.runtime.fused import FusedModel
from atomcli.runtime.paged_cache import PagedLayer
from atomcli.runtime.projection import Norm, Projection
from atomcli.runtime.sampling import Sampling
from atomcli.runtime.serving import Request, Server
from tests.helpers.fused import fused_logits, tiny_model
from tests.helpers.tiny import random_tokens

pytestmark = pytest.mark.gpu

KV4, KV8, KV16 = KVFormat("int4", hadamard=True), KVFormat("int8"), KVFormat("float")
W4A8, W8A8 = SCHEMES["w4a8"], SCHEMES["w8a8"]
W4A16 = Scheme(W4A8.weights, SCHEMES["w4a16"].activations, transform="hadamard")
MODELS = {"w4a8": (W4A8, KV4), "w8a8": (W8A8, KV8), "w4a16": (W4A16, KV4), "bf16": (None, KV16)}
# Heads of 64 and rows that hold the outliers, a body and a ragged end.
SHAPE: dict[str, Any] = {"head_dim": 64, "hidden_size": 320, "intermediate_size": 704, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def small_model(
    family: str = "llama", scheme: Scheme | None = W4A8, kv: KVFormat = KV4, **changes: Any
) -> PreTrainedModel:
    """A random model in bfloat16, on the CPU."""
    return tiny_model(family, scheme, kv, dtype=torch.bfloat16, **(SHAPE | changes))


def error(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative error of each token's logits."""
    got, want = got.float().cpu(), want.float().cpu()
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (3, 320), (17, 4096), (2, 8192), (5, 28672)])
def test_rowwise_kernels_are_torch(dtype: torch.dtype, rows: int, channels: int) -> None:
    def random_rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    # A number that rounds the other way before its second rounding ends two steps of bfloat16 away.
    x, residual, weight = random_rows(rows, channels), random_rows(rows, channels), random_rows(channels)
    for other in (None, residual):
        normed, total = rowwise.add_norm(x, other, weight, 1e-5)
        expected = x if other is None else x + other
        assert torch.equal(total, expected)
        torch.testing.assert_close(normed, rowwise.rms_norm(expected, weight, 1e-5), rtol=2e-2, atol=1e-5)
    both = random_rows(rows, 2 * channels)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(rowwise.silu_mul(gate, up), torch.nn.functional.silu(gate) * up, rtol=2e-2, atol=1e-5)


def test_heads_are_normed_in_place_of_a_wider_row() -> None:
    row = torch.randn(5, 10 * 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, device="cuda", dtype=torch.bfloat16)
    heads = row[:, 2 * 64 : 6 * 64].unflatten(-1, (4, 64))
    torch.testing.assert_close(
        rowwise.head_norm(heads, weight, 1e-6), rowwise.rms_norm(heads, weight, 1e-6), rtol=2e-2, atol=1e-5
    )


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w4a4"])
@pytest.mark.parametrize("tokens", [1, 19, 300])
def test_a_merged_product_is_its_linears(scheme: str, tokens: int) -> None:
    layer: Any = small_model("llama_biased", SCHEMES[scheme]).cuda().model.layers[0].self_attn
    projection = Projection([layer.q_proj, layer.k_proj, layer.v_proj], torch.bfloat16, [True, False, True])
    assert len(projection.kernels) == 1
    x, residual = (torch.randn(tokens, 320, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    norm = Norm(torch.rand(320, device="cuda", dtype=torch.bfloat16), 1e-5)
    y, total = projection.normed(x, residual, norm)
    rows = rowwise.rms_norm(x + residual, norm.weight, norm.epsilon)
    expected = torch.cat([layer.q_proj(rows), layer.k_proj(rows, add_bias=False), layer.v_proj(rows)], dim=-1)
    assert torch.equal(total, x + residual)
    assert error(y, expected).max() < 2e-2
    assert torch.equal(projection.plain(rows), expected)


@pytest.mark.parametrize(("scheme", "kv"), MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_kernels_are_as_near_to_fp32_as_the_reference(family: str, scheme: Scheme | None, kv: KVFormat) -> None:
    model = small_model(family, scheme, kv)
    tokens = random_tokens(3, 150)
    truth = copy.deepcopy(model).float()(tokens).logits
    reference, kernels = FusedModel.of(copy.deepcopy(model)), FusedModel.of(model.cuda())
    for chunks in ((150,), (100, 1, 1, 48)):
        # Random models amplify what bfloat16 rounds; the kernels must be as near to fp32 as the reference is.
        rounding = error(fused_logits(reference, tokens, chunks), truth)
        assert error(fused_logits(kernels, tokens, chunks), truth).median() < 1.3 * rounding.median() + 1e-3


@pytest.mark.parametrize(("scheme", "kv"), MODELS.values(), ids=MODELS.keys())
def test_graphs_of_every_size_do_what_plain_calls_do(scheme: Scheme | None, kv: KVFormat) -> None:
    model = FusedModel.of(small_model("llama", scheme, kv).cuda())
    assert model.capturable
    outcomes = []
    for captured in (True, False):
        pools = model.new_pools(64 * 2)
        for pool in pools:
            pool.zero_()
        rows = DecodeRows(model, pools, 64, 2)
        if not captured:
            rows._memory = None
        produced = []
        for size in ladder(64):
            for row in range(size):
                rows.place(row, 3 + row, 1, [2 * row, 2 * row + 1])
            produced += [rows.step(size) for _ in range(70)]
        outcomes.append(produced)
    assert outcomes[0] == outcomes[1]


def requests(count: int, seed: int, sampling: Sampling | None = None) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(
            [draw.randrange(2, 97) for _ in range(draw.choice((1, 5, 63, 64, 65, 90)))],
            draw.choice((1, 2, 20, 60)),
            sampling=sampling or Sampling(),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.95, 1)], ids=["greedy", "sampled"])
def test_a_request_gets_the_same_tokens_alone_and_in_a_full_batch(sampling: Sampling) -> None:
    model = FusedModel.of(small_model().cuda())
    asked = requests(16, 0, sampling)
    together = Server(model, 16 * 4, 16, context=192).run(asked)
    alone = [Server(model, 4, 1, context=192).run([request])[0] for request in asked]
    same = [a == b for a, b in zip(together, alone, strict=True)]
    assert all(same), f"{same.count(False)} of {len(same)} requests differ"


def test_a_soak_of_two_thousand_requests_leaks_no_page() -> None:
    model = FusedModel.of(small_model(num_hidden_layers=1).cuda())
    server = Server(model, 50, 40, context=192, chunk=256)
    asked = requests(2000, 2)
    assert [len(tokens) for tokens in server.run(asked)] == [request.new_tokens for request in asked]
    assert server.pages.free == 50


def test_generate_reads_pages_through_the_kernels() -> None:
    model = small_model()
    tokens = random_tokens(3, 70)
    mask = torch.ones_like(tokens)
    mask[1, :40] = 0
    with torch.no_grad():
        truth = copy.deepcopy(model).float()(tokens, attention_mask=mask).logits
        rounding = error(model(tokens, attention_mask=mask).logits, truth)[mask.bool()]
        model = model.cuda()
        got = model(tokens.cuda(), attention_mask=mask.cuda()).logits
        out = model.generate(
            tokens.cuda(), attention_mask=mask.cuda(), max_new_tokens=20, do_sample=False, return_dict_in_generate=True
        )
    assert all(isinstance(layer, PagedLayer) for layer in out.past_key_values.layers)
    assert out.sequences.shape == (3, 90)
    assert error(got, truth)[mask.bool()].median() < 1.3 * rounding.median() + 1e-3
    layer = out.past_key_values.layers[0]
    assert attention.why_not(layer.format, "cuda") is None
