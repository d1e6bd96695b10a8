"""DALL-E's modules against OpenAI's own package with random weights, and against the golden counts."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cae_fast.config import UserError
from cae_fast.models.codes import masked_codes
from cae_fast.models.dalle import (
    DalleDecoder,
    DalleEncoder,
    DalleTokenizer,
    dalle_decoder,
    dalle_encoder,
    from_openai,
    map_pixels,
)

dall_e = pytest.importorskip("dall_e", reason="needs the dall-e package: pip install --no-deps dall-e")


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """The package starts biases at zero, where a lost one would not show."""
    for name, parameter in module.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def photographs(count: int, size: int) -> torch.Tensor:
    """Smooth noise, uint8 (count, 3, size, size)."""
    coarse = torch.rand(count, 3, size // 8, size // 8)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic") + 0.1 * torch.randn(count, 3, size, size)
    return (smooth * 255).clamp(0, 255).to(torch.uint8)


def every_position(images: torch.Tensor) -> torch.Tensor:
    return torch.arange((images.shape[-1] // 8) ** 2).expand(len(images), -1)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(1)
    encoder = randomized(dall_e.Encoder(n_hid=16, n_blk_per_group=2, vocab_size=512))
    decoder = randomized(dall_e.Decoder(n_hid=16, n_init=24, n_blk_per_group=2, vocab_size=512))
    with torch.no_grad():  # so that many codes are used
        encoder.blocks.output.conv.b.sub_(encoder(map_pixels(photographs(32, 56))).mean((0, 2, 3)))
    return encoder, decoder


@torch.no_grad()
def test_encoder_equals_the_original(original):
    theirs = original[0]
    ours = dalle_encoder(from_openai(theirs.state_dict()))
    pixels = torch.rand(3, 3, 48, 64)
    expected = theirs(pixels)
    assert (ours(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_other_depths_equal_the_original():
    """Their factor 1 / layers^2 depends on the depth, and ours is folded."""
    theirs = randomized(dall_e.Encoder(n_hid=8, n_blk_per_group=3, vocab_size=64))
    pixels = torch.rand(1, 3, 32, 32)
    expected = theirs(pixels)
    ours = dalle_encoder(from_openai(theirs.state_dict()))(pixels)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_decoder_equals_the_original(original):
    theirs = original[1]
    codes = torch.randint(512, (2, 5, 6))
    expected = theirs(F.one_hot(codes, 512).permute(0, 3, 1, 2).float())
    ours = dalle_decoder(from_openai(theirs.state_dict()))
    assert (ours(codes) - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokenizer = DalleTokenizer(dalle_encoder(from_openai(original[0].state_dict())), ours)
    picture = dall_e.unmap_pixels(torch.sigmoid(expected[:, :3]).float())
    torch.testing.assert_close(tokenizer.decode(codes), picture, rtol=0, atol=1e-5)


@torch.no_grad()
def test_codes_equal_the_original(original):
    """All positions and any of them, in the order asked for."""
    theirs = original[0]
    tokenizer = DalleTokenizer(dalle_encoder(from_openai(theirs.state_dict())), None)
    images = photographs(4, 56)
    expected = theirs(dall_e.map_pixels(images.float() / 255)).argmax(1).flatten(1)  # (4, 49)
    assert expected.unique().numel() > 20
    assert tokenizer.encode(images, every_position(images)).equal(expected)
    some = torch.stack([torch.randperm(49)[:20] for _ in range(4)])
    assert tokenizer.encode(images, some).equal(expected.gather(1, some))
    assert tokenizer.token_size(7) == 56
    assert tokenizer.num_codes == 512
    assert not tokenizer.has_decoder


def test_pixels_are_mapped_as_in_the_original():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = 0.1 + 0.8 * images.double() / 255
    assert (map_pixels(images).double() - expected).abs().max() < 1e-7


@torch.no_grad()
def test_float16_codes_agree_with_float32():
    """At least 99.9 % where the best logit leads by 3 % of the logits' spread, and nearly all of the others.

    Random weights leave ties that a trained tokenizer has not; the head is centered so that all codes are used.
    """
    theirs = randomized(dall_e.Encoder(n_hid=16, vocab_size=512))
    full = DalleTokenizer(dalle_encoder(from_openai(theirs.state_dict())), None)
    output = full.encoder.output
    output.bias.sub_(full.encoder(map_pixels(photographs(32, 64))).mean((0, 2, 3)))
    half_encoder = DalleEncoder(16, 2, 512)
    half_encoder.load_state_dict(full.encoder.state_dict())
    half = DalleTokenizer(half_encoder, None, dtype=torch.float16)
    images = photographs(32, 64)
    logits = full.encoder(map_pixels(images)).flatten(2)  # (32, 512, 64)
    best, second = logits.topk(2, 1).values.unbind(1)
    clear = best - second > 0.03 * logits.std()
    ids = every_position(images)
    codes = full.encode(images, ids)
    same = half.encode(images, ids) == codes
    assert codes.unique().numel() > 100
    assert clear.float().mean() > 0.8
    assert same[clear].float().mean() >= 0.999
    assert same.float().mean() >= 0.98


def test_masked_codes_take_the_first_of_equal_logits():
    features = torch.rand(2, 3, 2, 2)
    ids = torch.tensor([[0, 3], [1, 2]])
    assert masked_codes(features, torch.zeros(7, 3), torch.zeros(7), ids).equal(torch.zeros(2, 2, dtype=torch.int64))


def test_parameters_of_the_published_size():
    with torch.device("meta"):
        encoder, decoder = DalleEncoder(), DalleDecoder()
        theirs = dall_e.Encoder(device="meta"), dall_e.Decoder(device="meta")
    count = [sum(p.numel() for p in module.parameters()) for module in (encoder, decoder)]
    assert count == [sum(p.numel() for p in module.parameters()) for module in theirs]
    assert round(count[0] / 1e6, 2) == 53.79


@pytest.mark.parametrize(("size", "grid"), [(112, 14), (128, 16)])
def test_flops_equal_the_golden_counts(golden, size, grid):
    """And `encode` spends on the last layer only what the masked positions cost."""
    expected = golden("flops.json")[f"dalle_{size}"]
    with torch.device("meta"):
        tokenizer = DalleTokenizer(DalleEncoder(), None, device="meta")
        images = torch.empty(1, 3, size, size, dtype=torch.uint8)
        masked_ids = torch.zeros(1, grid**2 // 2, dtype=torch.int64)
    assert tokenizer.token_size(grid) == size
    with FlopCounterMode(display=False) as counter:
        tokenizer.encoder(map_pixels(images))
    assert counter.get_total_flops() == expected["total"]
    with FlopCounterMode(display=False) as counter:
        tokenizer.encode(images, masked_ids)
    assert counter.get_total_flops() == expected["total"] - expected["per"][f"output@{grid}"] // 2
    assert tokenizer.encode_flops(grid, grid**2 // 2) == counter.get_total_flops()


def test_foreign_names_are_refused():
    with pytest.raises(UserError, match=r"blocks\.stem\.w"):
        from_openai({"blocks.stem.w": torch.zeros(1)})
