import numpy as np
import pytest
import torch

from cae_fast.data import sampling
from cae_kernels.parts.philox import STREAM_MASK, draw, philox4x32, uniform

ONES = 2**32 - 1


def words(seed, *counter):
    return [word.item() for word in philox4x32(seed, *(torch.tensor(part) for part in counter))]


# Known answers of the Random123 library (kat_vectors, philox4x32 with 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert words(key[0] | key[1] << 32, *counter) == list(expected)


def plain_philox(seed, counter):
    """The paper's algorithm in unbounded Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed % 2**32, seed // 2**32 % 2**32
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right // 2**32) ^ c1 ^ k0, right % 2**32, (left // 2**32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_broadcast_counters_agree_with_python_integers():
    seed = 0xFEDCBA9876543210
    draws = torch.tensor([[0], [1], [ONES]])
    positions = torch.tensor([0, 5, 2**31, 2**32 - 1, 2**32, 2**45 + 3])
    result = draw(seed, STREAM_MASK, draws, positions)
    for row, number in enumerate(draws.flatten().tolist()):
        for column, position in enumerate(positions.tolist()):
            counter = (number, position % 2**32, STREAM_MASK, position // 2**32)
            assert [word[row, column].item() for word in result] == plain_philox(seed, counter)


def test_same_words_as_the_data_pipeline():
    seed, draws, positions = 2**63 + 17, torch.arange(5)[:, None], torch.arange(64) + 2**32 - 32
    ours = draw(seed, STREAM_MASK, draws, positions)
    theirs = sampling.philox4x32(
        seed, draws.numpy(), (positions % 2**32).numpy(), STREAM_MASK, (positions // 2**32).numpy()
    )
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(our.numpy(), their.astype(np.int64))


def test_uniform_takes_the_top_24_bits_and_stays_below_one():
    bits = torch.tensor([0, 255, 256, 2**31, 2**32 - 1])
    assert uniform(bits).tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1.0 - 2.0**-24]
    assert uniform(bits).dtype == torch.float32


def test_uniform_passes_kolmogorov_smirnov_and_words_are_uncorrelated():
    sample = torch.stack([uniform(word) for word in draw(3, STREAM_MASK, torch.tensor(0), torch.arange(50_000))])
    for numbers in sample:
        assert pytest.importorskip("scipy.stats").kstest(numbers.numpy(), "uniform").pvalue > 1e-4
    neighbours = torch.cat((sample[:, :-1], sample[:, 1:]))  # the four words of a position and of the next one
    correlation = torch.corrcoef(neighbours) - torch.eye(8)
    assert correlation.abs().max() < 5 / 50_000**0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_makes_the_same_numbers():
    positions = torch.arange(300) + 2**33
    for cpu, cuda in zip(
        draw(1, STREAM_MASK, torch.tensor(9), positions),
        draw(1, STREAM_MASK, torch.tensor(9, device="cuda"), positions.cuda()),
        strict=True,
    ):
        assert torch.equal(cpu, cuda.cpu())
