"""Heads and relative position bias against plain formulas in float64, and against torch's and timm's modules."""

import pytest
import torch
from torch import nn

from cae_fast.evaluation.attentive import AttentiveProbe
from cae_fast.evaluation.classifier import BatchNorm, Classifier
from cae_fast.evaluation.finetune import (
    BiasedSelfAttention,
    FinetuneHead,
    add_relative_position_bias,
    relative_position_index,
)
from cae_fast.evaluation.linear import LinearProbe
from cae_fast.models.vit import SelfAttention, VisionTransformer, initialize

BATCH, GRID, WIDTH, HEADS, CLASSES = 6, 3, 16, 4, 5


def make_encoder():
    encoder = VisionTransformer(GRID * 4, 4, WIDTH, 2, HEADS, 0.1)
    initialize(encoder)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    return encoder.eval()


def randomize(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def standardize(x, dim, eps):
    mean = x.mean(dim, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(dim, keepdim=True).add(eps).sqrt()


def softmax(x):
    e = (x - x.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("patch_mean", [False, True])
def test_linear_probe_is_batch_norm_and_linear_of_one_vector(patch_mean):
    probe = randomize(LinearProbe(WIDTH, CLASSES, patch_mean))
    assert [name for name, _ in probe.named_parameters()] == ["linear.weight", "linear.bias"]
    tokens = torch.randn(BATCH, GRID**2 + 1, WIDTH, dtype=torch.float64) * 1e-3  # eps counts at this size
    vectors = tokens[:, 1:].mean(1) if patch_mean else tokens[:, 0]
    expected = standardize(vectors, 0, 1e-6) @ probe.linear.weight.T + probe.linear.bias
    torch.testing.assert_close(probe(probe.select(tokens)), expected, rtol=1e-12, atol=1e-12)
    probe.norm.update(torch.stack(probe.norm.seen), torch.tensor(True))
    torch.testing.assert_close(probe.norm.running_var, 0.9 + 0.1 * vectors.var(0))
    probe.eval()
    normed = (vectors - probe.norm.running_mean) / (probe.norm.running_var + 1e-6).sqrt()
    torch.testing.assert_close(probe(probe.select(tokens)), normed @ probe.linear.weight.T + probe.linear.bias)


def test_batch_norm_is_torchs_with_its_update_after_the_step():
    ours, torchs = BatchNorm(WIDTH, 1e-5), torch.nn.BatchNorm1d(WIDTH, eps=1e-5, affine=False)
    for step in range(3):
        for x in torch.randn(2, BATCH, WIDTH) * 3 + step:
            torch.testing.assert_close(ours(x), torchs(x))
        ours.update(torch.stack(ours.seen), torch.tensor(True))
        ours.seen.clear()
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    x = torch.randn(BATCH, WIDTH)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))
    before = ours.running_mean.clone()
    ours.update(torch.full((1, 2, WIDTH), float("nan")), torch.tensor(False))
    assert ours.running_mean.equal(before)


@pytest.mark.parametrize("class_token", [False, True])
def test_attentive_probe_follows_its_formula(class_token):
    probe = randomize(AttentiveProbe(WIDTH, HEADS, CLASSES, class_token))
    tokens = torch.randn(BATCH, GRID**2 + 1, WIDTH, dtype=torch.float64)
    read = tokens if class_token else tokens[:, 1:]
    attn = probe.attn

    def norm(part, x):
        return standardize(x, -1, 1e-6) * part.weight + part.bias

    query = norm(probe.norm_q, probe.query[0]) @ attn.q.weight.T + attn.q_bias  # (1, D)
    key = norm(probe.norm_k, read) @ attn.k.weight.T  # (B, n, D)
    value = norm(probe.norm_v, read) @ attn.v.weight.T + attn.v_bias
    heads = []
    for h in range(HEADS):
        part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        weights = softmax((query[:, part] * key[..., part]).sum(-1) / (WIDTH // HEADS) ** 0.5)  # (B, n)
        heads.append((weights[..., None] * value[..., part]).sum(1))
    attended = torch.cat(heads, 1) @ attn.proj.weight.T + attn.proj.bias
    expected = standardize(attended, 0, 1e-5) @ probe.linear.weight.T + probe.linear.bias
    torch.testing.assert_close(probe(probe.select(tokens)), expected, rtol=1e-10, atol=1e-10)


def test_attentive_probe_is_torchs_multi_head_attention():
    probe = randomize(AttentiveProbe(WIDTH, HEADS, CLASSES))
    attn, reference = probe.attn, nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
    state = {"in_proj_weight": torch.cat((attn.q.weight, attn.k.weight, attn.v.weight)), "in_proj_bias": bias}
    reference.load_state_dict(state | {f"out_proj.{n}": p for n, p in attn.proj.named_parameters()})
    tokens = torch.randn(BATCH, GRID**2, WIDTH, dtype=torch.float64)
    query = probe.norm_q(probe.query).expand(BATCH, -1, -1)
    attended, _ = reference(query, probe.norm_k(tokens), probe.norm_v(tokens))
    torch.testing.assert_close(probe(tokens), probe.linear(probe.norm(attended[:, 0])))


def test_a_new_attentive_probe_starts_from_the_mean_of_the_values():
    probe = AttentiveProbe(WIDTH, HEADS, CLASSES)
    assert probe.query.count_nonzero() == 0
    tokens = torch.randn(BATCH, 7, WIDTH)
    mean = probe.attn.proj(probe.attn.key_value(tokens, probe.norm_v(tokens))[1].flatten(2).mean(1))
    torch.testing.assert_close(probe(tokens), probe.linear(nn.functional.batch_norm(mean, None, None, training=True)))


def test_finetune_head_takes_the_encoders_norm_over():
    encoder = make_encoder()
    model = Classifier(encoder, FinetuneHead(encoder, CLASSES))
    images = torch.randn(BATCH, 3, GRID * 4, GRID * 4)
    (patches,) = encoder.get_intermediate_layers(images)  # (B, N, D) before the final norm
    mean = standardize(patches.double().mean(1), -1, 1e-6) * encoder.norm.weight + encoder.norm.bias
    expected = mean @ model.head.linear.weight.double().T
    torch.testing.assert_close(model(images).double(), expected, rtol=1e-4, atol=1e-9)
    assert 0 < model.head.linear.weight.std() < 3e-5
    model(images).logsumexp(1).sum().backward()
    missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert missing == {"encoder.norm.weight", "encoder.norm.bias"}
    assert not any(dict(model.named_parameters())[name].requires_grad for name in missing)
    assert "encoder.pos_embed" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    "make",
    [LinearProbe, lambda w, c: LinearProbe(w, c, True), lambda width, classes: AttentiveProbe(width, HEADS, classes)],
)
def test_a_probe_leaves_the_encoder_alone(make):
    model = Classifier(make_encoder(), make(WIDTH, CLASSES))
    images = torch.randn(BATCH, 3, GRID * 4, GRID * 4)
    model(images).logsumexp(1).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.head.parameters())
    torch.testing.assert_close(model.head(model.head.read(model.encoder, images, None)), model(images))


def test_drop_path_factors_reach_the_blocks():
    encoder = make_encoder()
    model = Classifier(encoder, FinetuneHead(encoder, CLASSES))
    images = torch.randn(BATCH, 3, GRID * 4, GRID * 4)
    keep = torch.ones(4, BATCH)
    torch.testing.assert_close(model(images, keep), model(images))
    keep[:, 0] = 0.0
    tokens = encoder.all_tokens(images)[:1]
    torch.testing.assert_close(model(images, keep)[:1], model.head(tokens))


@pytest.mark.parametrize("grid", [1, 2, 3, 5])
def test_relative_position_index_is_the_brute_force_one(grid):
    index, rows = relative_position_index(grid), {}
    span = 2 * grid - 1
    for i in range(grid**2 + 1):
        for j in range(grid**2 + 1):
            if i == 0 or j == 0:
                expected = span**2 + {(True, False): 0, (False, True): 1, (True, True): 2}[i == 0, j == 0]
            else:
                down = (i - 1) // grid - (j - 1) // grid
                right = (i - 1) % grid - (j - 1) % grid
                expected = rows.setdefault((down, right), (down + grid - 1) * span + right + grid - 1)
            assert index[i, j] == expected
    assert len(set(rows.values())) == span**2
    assert sorted(rows.values()) == list(range(span**2))


def test_relative_position_index_is_timms(timm):
    from timm.layers.pos_embed_rel import gen_relative_position_index

    torch.testing.assert_close(relative_position_index(4), gen_relative_position_index((4, 4), class_token=True))


def test_biased_attention_adds_its_table_to_the_scores():
    attention = randomize(SelfAttention(WIDTH, HEADS))
    biased = BiasedSelfAttention(attention, GRID).double()
    x = torch.randn(BATCH, GRID**2 + 1, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(biased(x), attention(x))  # the table starts at 0
    nn.init.normal_(biased.relative_position_bias_table)
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    query, key, value = (x @ attention.qkv.weight.T + bias).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
    scores = torch.einsum("bihc,bjhc->bhij", query, key) / (WIDTH // HEADS) ** 0.5
    table, index = biased.relative_position_bias_table, relative_position_index(GRID)
    for i in range(GRID**2 + 1):
        for j in range(GRID**2 + 1):
            scores[:, :, i, j] += table[index[i, j]]
    attended = torch.einsum("bhij,bjhc->bihc", softmax(scores), value).flatten(2)
    torch.testing.assert_close(biased(x), attended @ attention.proj.weight.T + attention.proj.bias)
    biased(x).sum().backward()
    assert table.grad.count_nonzero() == table.numel()


def test_an_encoder_with_biases_is_timms_beit(timm):
    from timm.models.beit import Beit

    encoder = make_encoder()
    add_relative_position_bias(encoder)
    beit = Beit(GRID * 4, 4, num_classes=0, embed_dim=WIDTH, depth=2, num_heads=HEADS, qkv_bias=True, init_values=0.1,
                use_abs_pos_emb=True, use_rel_pos_bias=True, global_pool="")  # fmt: skip
    for block in encoder.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
    report = beit.load_state_dict(encoder.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(name.endswith(("k_bias", "relative_position_index")) for name in report.missing_keys)
    images = torch.randn(BATCH, 3, GRID * 4, GRID * 4)
    torch.testing.assert_close(encoder(images), beit.eval().forward_features(images), rtol=1e-4, atol=1e-5)
