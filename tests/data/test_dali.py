"""DALI against the CPU path: the same plan, nearly the same pixels. DALI's CPU pipeline stands for the GPU's."""

import gc
import gzip
import io
import logging
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cae_fast.cli import main
from cae_fast.config import UserError
from cae_fast.data import dali
from cae_fast.data.index import build_index
from cae_fast.data.loader import pretrain_loader
from cae_fast.data.sampling import SamplingPlan
from cae_kernels import block_mask

pytestmark = pytest.mark.skipif(dali.why_not() is not None, reason="needs nvidia-dali: pip install 'cae-fast[data]'")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

STRIPS = ("3x2000", "2000x3")  # all of their pixels lie at an edge
TENSORS = ("images", "token_images", "visible_ids", "masked_ids", "positions", "sample_ids")
EXACT = TENSORS[2:]
# DALI keeps fractions between rows and columns where torch and Pillow round, and repeats the pixels at the edges of a
# crop. Measured on photographs: up to 0.31 gray levels on average over a view (mostly 0.15), and 3 at most.
MEAN, MOST = 0.4, 4


def mask(positions):
    return block_mask(positions, seed=5, height=6, width=6, num_masked=18, min_block=4)


def noise(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_index(root, files):
    (root / "images").mkdir()
    for i, content in enumerate(files):
        (root / "images" / f"{i:02}.jpg").write_bytes(content)
    return build_index(root / "images", root / "x.index", 10_000_000)


@pytest.fixture(scope="module")
def index(tmp_path_factory, photograph, encode):
    """30 photographs, some of them not JPEG."""
    sizes = np.random.default_rng(0).integers(30, 300, (30, 2))
    formats = [("JPEG", "JPEG", "PNG")[i % 3] for i in range(30)]
    files = [encode(photograph(h, w, i), f) for i, ((h, w), f) in enumerate(zip(sizes, formats, strict=True))]
    return write_index(tmp_path_factory.mktemp("dali"), files)


def load(index, decoder="dali", batch=8, **changes):
    plan = SamplingPlan(len(index), index.heights, index.widths, batch, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    settings = {
        "image_size": 96,
        "token_size": 48,
        "start_step": 0,
        "stop_step": 5,
        "rank": 0,
        "world_size": 1,
        "micro_batch_size": 4,
        "num_workers": 0,
        "pin_memory": False,
    }
    return pretrain_loader(index, plan, mask, decoder=decoder, **(settings | changes))


def join(batches):
    batches = list(batches)
    return {name: torch.cat([getattr(batch, name) for batch in batches]).cpu() for name in TENSORS}


def assert_same(a, b, names=TENSORS):
    for name in names:
        assert torch.equal(a[name], b[name]), name


def assert_close(a, b, mean=MEAN, most=MOST):
    assert_same(a, b, EXACT)
    for name in ("images", "token_images"):
        difference = (a[name].float() - b[name].float()).abs()
        assert difference.flatten(1).mean(dim=1).max() < mean, name
        assert difference.max() <= most, name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_cpu_paths_batches(index, caplog, num_workers):
    batches = list(load(index, num_workers=num_workers))
    assert [batch.images.shape for batch in batches] == [(4, 3, 96, 96)] * 10
    assert batches[0].images.dtype == batches[0].token_images.dtype == torch.uint8
    assert_close(join(batches), join(load(index, "cpu")))
    assert next(load(index, token_size=None)).token_images is None
    assert caplog.records == []


def test_crops_end_at_their_edges(tmp_path, encode):
    """DALI's cut out of a JPEG gives what the same pixels cut out beforehand give, bit for bit."""
    jpegs = [encode(noise(40 + 20 * i, 300 - 20 * i, i), "JPEG", quality=95) for i in range(8)]
    pixels = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs]
    views = []
    for files in (jpegs, [encode(image, "PNG") for image in pixels]):
        root = tmp_path / str(len(views))
        root.mkdir()
        views.append(join(load(write_index(root, files), image_size=224, token_size=112)))
    assert_same(*views)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (2, 2), (4, 1)])
def test_processes_and_micro_batches_change_nothing(index, world_size, micro_batch_size):
    parts = [
        join(load(index, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size))
        for rank in range(world_size)
    ]
    together = {
        name: torch.stack([part[name].unflatten(0, (5, 8 // world_size)) for part in parts], dim=1).flatten(0, 2)
        for name in TENSORS
    }
    assert_same(together, join(load(index)))


@pytest.mark.parametrize("start", [1, 4])
def test_resume_in_the_middle(index, start):
    expected = {name: values[start * 8 :] for name, values in join(load(index)).items()}
    assert_same(join(load(index, start_step=start, num_workers=1)), expected)


def test_no_worker_stays_behind(index):
    loader = load(index, num_workers=2, stop_step=1000)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []
    abandoned = load(index, num_workers=2, stop_step=1000)
    next(abandoned)
    del abandoned
    gc.collect()
    assert multiprocessing.active_children() == []


def odd_files(photograph, encode):
    """{kind: (file, may DALI decode it itself)} of files that are to be decoded right."""
    image = Image.fromarray(photograph(120, 91))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    wide = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    flat = Image.new("RGB", (1500, 1500), "white")
    return {
        "4:4:4": (encode(image, "JPEG", subsampling=0, quality=95), True),
        "4:2:2": (encode(image, "JPEG", subsampling=1), True),
        "progressive": (encode(image, "JPEG", progressive=True), True),
        "gray": (encode(image.convert("L"), "JPEG"), True),
        "exif orientation": (encode(image, "JPEG", exif=rotated), True),
        "color profile": (encode(image, "JPEG", icc_profile=bytes(3000)), True),
        "thumbnail": (encode(image, "JPEG", exif=b"Exif\0\0" + encode(photograph(16, 16), "JPEG")), True),
        "garbage behind": (encode(image, "JPEG") + b"garbage" * 100, True),
        "restart marks": (encode(image, "JPEG", restart_marker_blocks=1), True),
        "a lot of white": (encode(flat, "JPEG", optimize=True), False),
        "cmyk": (encode(image.convert("CMYK"), "JPEG"), False),
        "rgb jpeg": (encode(image, "JPEG", keep_rgb=True), False),
        "zipped": (gzip.compress(encode(image, "JPEG")), False),
        "png palette": (encode(image.quantize(64), "PNG"), False),
        "png 16 bit": (encode(wide, "PNG"), False),
        "webp": (encode(image, "WEBP"), False),
        "bmp": (encode(image, "BMP"), False),
        "1x1": (encode(photograph(1, 1), "JPEG"), True),
        "3x2000": (encode(photograph(3, 2000), "JPEG"), True),
        "2000x3": (encode(photograph(2000, 3), "PNG"), False),
    }


def test_unusual_files(tmp_path, photograph, encode, caplog):
    files = odd_files(photograph, encode)
    index = write_index(tmp_path, [content for content, _ in files.values()])
    assert len(index) == len(files)
    for i, (kind, (content, expected)) in enumerate(files.items()):
        assert dali.is_whole_jpeg(content, (int(index.heights[i]), int(index.widths[i]))) is expected, kind
    settings = {"batch": len(files), "micro_batch_size": len(files), "stop_step": 3}
    views, expected = join(load(index, **settings)), join(load(index, "cpu", **settings))
    strips = torch.isin(expected["sample_ids"], torch.tensor([list(files).index(kind) for kind in STRIPS]))
    for rows, bounds in ((~strips, (MEAN, MOST)), (strips, (3, 20))):
        assert_close(*({name: joined[name][rows] for name in TENSORS} for joined in (views, expected)), *bounds)
    assert caplog.records == []


def bad_files(photograph, encode):
    """Files that took the place of good ones of 120 x 160 after the scan."""
    image = photograph(120, 160)
    jpeg, png = encode(image, "JPEG", quality=90), encode(image, "PNG")
    middle = len(jpeg) // 2
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><html>404</html>",
        "ppm": encode(image, "PPM"),
        "another size": encode(photograph(160, 120), "JPEG"),
        "another size, png": encode(photograph(12, 12), "PNG"),
        "truncated": jpeg[:middle],
        "last bytes": jpeg[:-2],
        "in the header": jpeg[:100],
        "zero tail": jpeg[:middle] + bytes(len(jpeg) - middle),
        "zero block": jpeg[:middle] + bytes(1024) + jpeg[middle + 1024 :],
        "garbled scan": jpeg[:middle] + b"\xff\xff\xff\x37garbled\xff\x01" + jpeg[middle + 13 :],
        "truncated progressive": encode(image, "JPEG", progressive=True)[:-3000],
        "truncated png": png[:-200],
        "garbled png": png[:2000] + bytes(500) + png[2500:],
        "truncated gzip": gzip.compress(jpeg)[:-20],
        "truncated webp": encode(image, "WEBP")[:-100],
        "no quantization table": without_tables(jpeg),
    }


def without_tables(jpeg):
    """The header stays readable and the structure whole, but no decoder can do anything with it."""
    first = jpeg.index(b"\xff\xdb")
    while jpeg[first : first + 2] == b"\xff\xdb":
        jpeg = jpeg[:first] + jpeg[first + 2 + int.from_bytes(jpeg[first + 2 : first + 4], "big") :]
    return jpeg


@pytest.fixture
def own_index(tmp_path, photograph, encode):
    """40 images of 120 x 160 whose files a test may damage."""
    return write_index(tmp_path, [encode(photograph(120, 160, i), "JPEG", quality=90) for i in range(40)])


def replaced(batches):
    return [entry for batch in batches for entry in batch.replaced]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_replaced_as_on_the_cpu_path(own_index, photograph, encode, num_workers):
    bad = bad_files(photograph, encode)
    for i, content in enumerate(bad.values()):
        own_index.path(i).write_bytes(content)
    own_index.path(len(bad)).unlink()
    settings = {"batch": 20, "stop_step": 2, "num_workers": num_workers}  # an epoch: every file is met
    expected, batches = list(load(own_index, "cpu", **settings)), list(load(own_index, **settings))
    assert replaced(batches) == replaced(expected)
    assert {path for _, path, _ in replaced(expected)} == {str(own_index.path(i)) for i in range(len(bad) + 1)}
    assert_close(join(batches), join(expected))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("failing", [(0,), (3,), (9,), (2, 3), (0, 1, 5, 9)])
def test_a_batch_that_dali_refuses_is_loaded_by_the_cpu_path(own_index, caplog, failing, num_workers):
    plan = SamplingPlan(40, own_index.heights, own_index.widths, 8, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    before = join(load(own_index))
    for number in failing:
        path = own_index.path(int(plan.draw(number // 2, 4 * (number % 2), 8).sample_ids[1]))
        content = without_tables(path.read_bytes())
        assert dali.is_whole_jpeg(content, (120, 160))
        path.write_bytes(content)
    expected = list(load(own_index, "cpu"))
    caplog.clear()
    batches = list(load(own_index, num_workers=num_workers))
    assert replaced(batches) == replaced(expected) != []
    told = [record.message for record in caplog.records if "are decoded on the CPU" in record.message]
    hit = [number for number, batch in enumerate(expected) if batch.replaced]
    assert set(failing) <= set(hit)
    assert len(told) == len(hit)
    assert all("Failed to decode sample" in message for message in told)
    for number, (batch, truth) in enumerate(zip(batches, expected, strict=True)):
        if number in hit:
            assert_same(vars(batch), vars(truth))
        else:  # as it would be without the bad files
            rows = slice(4 * number, 4 * number + 4)
            assert_same(vars(batch), {name: values[rows] for name, values in before.items()})


def test_damage_that_only_decoding_shows_harms_no_other_image(own_index):
    """libjpeg only warns of a scan that ends early, and so does DALI: this image is decoded as it is, or replaced."""
    plan = SamplingPlan(40, own_index.heights, own_index.widths, 8, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    before = join(load(own_index, stop_step=2))
    victim = int(plan.draw(0, 5, 6).sample_ids[0])
    content = own_index.path(victim).read_bytes()
    own_index.path(victim).write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    after = join(load(own_index, stop_step=2))
    assert int(after["sample_ids"][5]) in (victim, plan.replacement(5, 1))
    others = torch.arange(16) != 5
    assert_same(*({name: values[others] for name, values in joined.items()} for joined in (before, after)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_files_end_the_run_at_the_same_batch(own_index, num_workers):
    plan = SamplingPlan(40, own_index.heights, own_index.widths, 8, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    for sample_id in plan.draw(0, 0, 8).sample_ids[:3].tolist():
        own_index.path(sample_id).write_bytes(b"")
    good = set(plan.draw(0, 0, 8).sample_ids.tolist()) | set(plan.draw(1, 0, 8).sample_ids.tolist())
    for sample_id in set(range(40)) - good:
        own_index.path(sample_id).write_bytes(b"")
    outcomes = []
    for decoder in ("cpu", "dali"):
        received: list[list[int]] = []
        with pytest.raises(UserError, match="17 files in a row cannot be used") as error:
            received.extend(batch.positions.tolist() for batch in load(own_index, decoder, num_workers=num_workers))
        outcomes.append((received, str(error.value)))
        del error
        assert multiprocessing.active_children() == []
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] != []


def test_dali_that_never_works_ends_the_run(index, monkeypatch, caplog):
    class Broken:
        def __init__(self, source):
            self.source = source

        def run(self, stream):
            next(self.source)
            raise RuntimeError("no engine\n at 0x7f00")

    monkeypatch.setattr(dali._Pipeline, "_build", lambda pipeline: Broken(pipeline._source()))
    with pytest.raises(UserError, match="DALI does not work here .no engine at 0x7f00.; set cpu"):
        list(load(index, stop_step=50))
    assert sum("are decoded on the CPU" in record.message for record in caplog.records) == dali.MAX_FAILED_IN_ROW


def test_augmented_views_are_the_cpu_paths(index):
    with pytest.raises(ValueError, match="does not augment"):
        load(index, augment=lambda image: image)


def test_pretraining_with_dali(tmp_path, monkeypatch, caplog):
    """A run keeps the backend that it began with, and ends the same whether or not it was interrupted."""
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 1, num_heads: 2, regressor_depth: 1, "
        "decoder_depth: 1}\n"
        "mask: {min_block: 4}\n"
        "data: {path: 'bundled:photographs', num_workers: 1}\n"
        "optim: {epochs: 4, warmup_epochs: 1}\n"
        "train: {global_batch_size: 4, micro_batch_size: 2, device: cpu}\n"
        "log: {every_steps: 1, tensorboard: false}\n"
    )
    assert main(["pretrain", "small.yaml", "train.run_dir=whole", "data.backend=dali", "train.max_steps=2"]) == 0
    assert main(["pretrain", "small.yaml", "train.run_dir=parts", "data.backend=dali", "train.max_steps=1"]) == 0
    assert main(["pretrain", "small.yaml", "train.run_dir=parts", "data.backend=cpu", "train.max_steps=2"]) == 2
    caplog.clear()
    assert main(["pretrain", "small.yaml", "train.run_dir=parts", "train.max_steps=2"]) == 0
    assert "data: backend dali: the run began with it" in caplog.text
    assert "backend: dali" in (tmp_path / "parts" / "config.yaml").read_text()
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert main(["pretrain", "small.yaml", "train.run_dir=other", "train.max_steps=2"]) == 0
    assert "data: backend cpu: without a GPU, DALI is slower" in caplog.text
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


class TestOnAGpu:
    pytestmark = on_gpu

    def test_the_cpu_paths_batches(self, index, caplog):
        """nvJPEG has another inverse DCT than libjpeg-turbo: a gray level here and there, before any resizing."""
        batches = list(load(index, device="cuda", num_workers=2))
        assert all(getattr(batch, name).is_cuda for batch in batches for name in TENSORS)
        assert_close(join(batches), join(load(index, "cpu")), mean=1.0, most=16)
        assert caplog.records == []

    def test_bad_and_unusual_files(self, own_index, photograph, encode):
        files = [*bad_files(photograph, encode).values()]
        for i, content in enumerate(files):
            own_index.path(i).write_bytes(content)
        settings = {"batch": 20, "stop_step": 2}
        batches, expected = list(load(own_index, device="cuda", **settings)), list(load(own_index, "cpu", **settings))
        assert replaced(batches) == replaced(expected)
        assert_close(join(batches), join(expected), mean=1.0, most=16)

    def test_unusual_files(self, tmp_path, photograph, encode):
        index = write_index(tmp_path, [content for content, _ in odd_files(photograph, encode).values()])
        settings = {"batch": 20, "micro_batch_size": 20, "stop_step": 2}
        assert_close(join(load(index, device="cuda", **settings)), join(load(index, "cpu", **settings)), 3, 24)

    @pytest.mark.parametrize("micro_batch_size", [8, 4, 2])
    def test_a_busy_reader_sees_what_dali_wrote(self, index, micro_batch_size):
        """The reader is kept behind by long work and lets go of each batch before that has run."""
        settings = {"device": "cuda", "micro_batch_size": micro_batch_size, "stop_step": 60, "image_size": 224}
        per_step, weights = 8 // micro_batch_size, torch.arange(1, 1 + 3 * 224 * 224, device="cuda").double()

        def sums(busy):
            loader, found = load(index, num_workers=2, **settings), []
            work = torch.randn(4096, 4096, device="cuda")
            for _ in range(60):
                step = [next(loader) for _ in range(per_step)]
                if busy:
                    for _ in range(8):
                        work = (work @ work).clamp(-1, 1)
                for batch in step:
                    found.append(batch.images.flatten(1).double() @ weights)
                    found.append(batch.masked_ids.double().sum(dim=1) + batch.positions)
                if not busy:
                    torch.cuda.synchronize()
                del batch, step
            loader.close()
            return torch.cat(found)

        assert torch.equal(sums(busy=True), sums(busy=False))
