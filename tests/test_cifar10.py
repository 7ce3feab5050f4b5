"""The CIFAR-10 example: its data is checked, its curves are right, its runs can be resumed."""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs the extra: examples")
pytest.importorskip("sklearn", reason="needs the extra: examples")
from flax import nnx
from matplotlib.image import imread
from rich.console import Console

from jaxce import diagnostics
from jaxce.examples import common
from jaxce.examples.cifar10 import __main__ as command
from jaxce.examples.cifar10 import convolution, program, report, training
from jaxce.examples.cifar10 import data as datasets
from jaxce.examples.cifar10 import model as networks
from jaxce.examples.cifar10.checkpoint import Checkpoints, restore
from jaxce.examples.cifar10.data import DamagedDataError, DataUnavailableError
from jaxce.examples.common import UsageError

RECORDS = 40  # in a file of the tiny CIFAR-10 made here
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's one-cycle schedule multiplies a bool array by a float one."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def console():
    return Console(file=io.StringIO(), soft_wrap=True)


def output(console):
    return console.file.getvalue()


# Data.


@pytest.fixture
def records(monkeypatch):
    """The bytes of the six files of a tiny CIFAR-10, by name."""
    monkeypatch.setattr(datasets, "RECORDS_PER_FILE", RECORDS)
    rng = np.random.default_rng(0)
    names = (*datasets.TRAIN_FILES, datasets.TEST_FILE)
    files = {name: rng.integers(0, 256, (RECORDS, 3073), np.uint8) for name in names}
    for file in files.values():
        file[:, 0] %= 10
    return files


@pytest.fixture
def data_dir(tmp_path, records):
    """A directory as unpacking leaves it."""
    folder = tmp_path / "data" / datasets.FOLDER
    folder.mkdir(parents=True)
    for name, file in records.items():
        (folder / name).write_bytes(file.tobytes())
    return tmp_path / "data"


@pytest.fixture
def archive(tmp_path, data_dir):
    """The tiny CIFAR-10 as an archive, to be served from here."""
    path = tmp_path / "served.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(data_dir / datasets.FOLDER, datasets.FOLDER)
    return path


@pytest.fixture
def serve(monkeypatch):
    """Makes a file what is downloaded, under its own checksum unless told otherwise."""

    def serve(path, md5=None):
        monkeypatch.setattr(datasets, "URL", path.as_uri())
        got = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setattr(datasets, "ARCHIVE_MD5", md5 or got)

    return serve


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "URL", (tmp_path / "nothing here").as_uri())


@pytest.mark.parametrize("inside", [False, True], ids=["parent given", "folder given"])
def test_reads_the_binary_version(data_dir, records, console, inside):
    given = data_dir / datasets.FOLDER if inside else data_dir
    data = datasets.load(given, console)

    train = np.concatenate([records[name] for name in datasets.TRAIN_FILES])
    np.testing.assert_array_equal(data.train_labels, train[:, 0])
    np.testing.assert_array_equal(data.test_labels, records[datasets.TEST_FILE][:, 0])
    assert data.train_images.shape == (5 * RECORDS, 32, 32, 3)
    for n, y, x, channel in [(0, 0, 0, 0), (1, 0, 5, 0), (50, 7, 0, 1), (199, 31, 30, 2)]:
        stored = train[n, 1 + 1024 * channel + 32 * y + x]
        assert data.train_images[n, y, x, channel] == stored


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), f"{RECORDS * 3073 - 1:,} bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), f"{RECORDS * 3073 + 1:,} bytes"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b"\x0a" + path.read_bytes()[1:]), "10 in record 0"),
    ],
    ids=["short", "long", "missing", "label"],
)
@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_refuses_damaged_files(data_dir, console, damage, got, name):
    damage(data_dir / datasets.FOLDER / name)
    with pytest.raises(DamagedDataError) as error:
        datasets.load(data_dir, console)
    message = str(error.value)
    assert name in message
    assert "expected" in message
    assert f"got {got}" in message
    assert "Delete" in message


def test_downloads_checks_and_unpacks(tmp_path, archive, serve, records, console):
    serve(archive)
    data = datasets.load(tmp_path / "new" / "directory", console)
    np.testing.assert_array_equal(data.test_labels, records[datasets.TEST_FILE][:, 0])
    assert "Downloading" in output(console)
    left = {path.name for path in (tmp_path / "new" / "directory").iterdir()}
    assert left == {datasets.ARCHIVE, datasets.FOLDER}


def test_refuses_and_deletes_a_download_with_another_checksum(tmp_path, archive, serve, console):
    serve(archive, md5="0" * 32)
    with pytest.raises(DamagedDataError, match=f"expected md5 {'0' * 32}, got [0-9a-f]{{32}}"):
        datasets.load(tmp_path / "new", console)
    assert list((tmp_path / "new").iterdir()) == []


def test_refuses_but_keeps_an_archive_that_was_there(tmp_path, console):
    mine = tmp_path / datasets.ARCHIVE
    mine.write_bytes(b"something else")
    with pytest.raises(DamagedDataError, match=f"expected md5 {datasets.ARCHIVE_MD5}"):
        datasets.load(tmp_path, console)
    assert mine.exists()


def member(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    "other",
    [
        member("../escaped", size=4),
        member(f"{datasets.FOLDER}/../../escaped", size=4),
        member("link", type=tarfile.SYMTYPE, linkname="../../escaped"),
        member("link", type=tarfile.LNKTYPE, linkname="../../escaped"),
        member("device", type=tarfile.CHRTYPE),
        member(f"{datasets.FOLDER}/readme.html", size=4),
    ],
    ids=["parent", "parent from inside", "symbolic link", "hard link", "device", "file"],
)
def test_unpacks_the_batches_alone(tmp_path, data_dir, other):
    target = tmp_path / "target"
    target.mkdir()
    path = target / datasets.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(other, io.BytesIO(b"evil"))
        tar.add(data_dir / datasets.FOLDER, datasets.FOLDER)
    folder = datasets.unpack(path, target)
    assert {entry.name for entry in tmp_path.iterdir()} == {"target", data_dir.name}
    assert {entry.name for entry in target.iterdir()} == {path.name, folder.name}
    names = (*datasets.TRAIN_FILES, datasets.TEST_FILE)
    assert {entry.name for entry in folder.iterdir()} == set(names)
    for name in names:
        assert (folder / name).read_bytes() == (data_dir / datasets.FOLDER / name).read_bytes()


def test_refuses_links_in_place_of_batches(tmp_path, data_dir):
    path = tmp_path / datasets.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        for name in datasets.TRAIN_FILES:
            tar.add(data_dir / datasets.FOLDER / name, f"{datasets.FOLDER}/{name}")
        tar.addfile(member(f"{datasets.FOLDER}/{datasets.TEST_FILE}", type=tarfile.SYMTYPE, linkname="/etc/hostname"))
    with pytest.raises(DamagedDataError, match=f"no file {datasets.FOLDER}/{datasets.TEST_FILE}"):
        datasets.unpack(path, tmp_path)
    assert not (tmp_path / datasets.FOLDER).exists()


def test_refuses_an_archive_of_something_else(tmp_path):
    path = tmp_path / datasets.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(member("readme.txt", size=4), io.BytesIO(b"text"))
    with pytest.raises(DamagedDataError, match=datasets.FOLDER):
        datasets.unpack(path, tmp_path)


def test_a_data_dir_that_cannot_be_one_is_an_error_of_one_line(tmp_path, archive, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    arguments = ["--output-dir", str(tmp_path / "out"), "--data-dir"]
    assert command.main([*arguments, str(file)]) == 2
    assert capsys.readouterr().err == f"error: --data-dir: expected a folder, got {file}, which is a file.\n"

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(datasets.tempfile, "TemporaryDirectory", read_only)
    with pytest.raises(UsageError, match=r"^--data-dir: expected a folder to unpack .* in: Read-only file system\.$"):
        datasets.unpack(archive, tmp_path)


def test_without_data_or_network_says_so_and_takes_digits(tmp_path, no_network, console):
    missing = tmp_path / "given"
    with pytest.raises(DataUnavailableError):
        datasets.load_cifar10(missing, console)

    data = datasets.load(missing, console)
    assert data.name == "digits"
    assert data.train_images.shape == (1437, 8, 8, 1)
    assert data.test_images.shape == (360, 8, 8, 1)
    assert set(data.train_labels) == set(data.test_labels) == set(range(10))
    said = output(console)
    assert f"{missing} holds neither" in said
    assert "downloading" in said
    assert "digits instead" in said
    assert "--data-dir" in said
    assert not missing.exists()


def test_digits_are_bytes_that_span_the_range():
    images = datasets.load_digits().train_images
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)


# Networks and augmentation.


def test_max_pool_is_that_of_flax_and_so_is_its_gradient():
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (5, 8, 6, 3))
    cotangent = jax.random.normal(keys[1], (5, 4, 3, 3))
    ours, our_vjp = jax.vjp(networks.max_pool, x)
    theirs, their_vjp = jax.vjp(lambda x: nnx.max_pool(x.T, (2, 2), (2, 2)).T, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(our_vjp(cotangent)[0], their_vjp(cotangent)[0])


@pytest.mark.parametrize("convolve", [convolution.convolve, convolution.convolve_by_xla], ids=["ours", "XLA's"])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3)])
def test_a_convolution_and_its_derivatives_sum_over_the_neighbours(inputs, outputs, convolve, rng):
    """Against the sums themselves in float64, of numbers that bfloat16 holds; their float32 sums have an error each."""

    def numbers(*shape):
        return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64)

    height, width, n = 6, 7, 2
    x, kernel, cotangent = (
        numbers(inputs, height, width, n),
        numbers(outputs, 3, 3, inputs),
        numbers(outputs, height, width, n),
    )

    def sums(x, kernel, cotangent):
        out, of_x, of_kernel = np.zeros_like(cotangent), np.zeros_like(x), np.zeros_like(kernel)
        for row, column, i, j in itertools.product(range(height), range(width), range(3), range(3)):
            y, z = row + i - 1, column + j - 1
            if 0 <= y < height and 0 <= z < width:
                out[:, row, column] += kernel[:, i, j] @ x[:, y, z]
                of_x[:, y, z] += kernel[:, i, j].T @ cotangent[:, row, column]
                of_kernel[:, i, j] += cotangent[:, row, column] @ x[:, y, z].T
        return out, of_x, of_kernel

    given = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    out, pullback = jax.vjp(jax.jit(convolve), *given)
    ours = out, *pullback(jnp.asarray(cotangent, jnp.float32))
    terms = (9 * inputs, 9 * outputs, height * width * n)
    sizes = sums(abs(x), abs(kernel), abs(cotangent))
    for got, expected, size, count in zip(ours, sums(x, kernel, cotangent), sizes, terms, strict=True):
        assert got.dtype == jnp.float32
        rounded = 0.0 if got is out else 2.0**-8  # derivatives are rounded to bfloat16, as what they are of
        np.testing.assert_array_less(abs(got - expected), 1e-30 + count * EPS * size + rounded * abs(expected))


def test_a_convolution_is_a_product_of_matrices_on_cpu_and_a_convolution_elsewhere():
    shapes = jax.ShapeDtypeStruct((4, 8, 8, 2), jnp.float32), jax.ShapeDtypeStruct((5, 3, 3, 4), jnp.float32)
    traced = jax.jit(jax.grad(lambda *args: convolution.convolve(*args).sum(), argnums=(0, 1))).trace(*shapes)
    for platform, convolutions in {"cpu": False, "tpu": True, "cuda": True}.items():
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in program) == convolutions
        assert ("stablehlo.dot_general" in program) != convolutions


def test_flip_mirrors_the_images_it_is_told_to():
    images = np.arange(4 * 3 * 4 * 1, dtype=np.uint8).reshape(4, 3, 4, 1)
    flipped = np.array([True, False, False, True])
    np.testing.assert_array_equal(networks.flip(images, flipped)[1:3], images[1:3])
    np.testing.assert_array_equal(networks.flip(images, flipped)[::3], images[::3, :, ::-1])


def test_crops_of_full_size_shift_each_image_by_up_to_an_eighth():
    rows, columns = np.mgrid[0:16, 0:16]
    images = np.broadcast_to(np.stack([rows, columns], -1), (300, 16, 16, 2)).astype(np.int32)
    cropped = np.asarray(networks.random_crop(jax.random.key(0), images, 16))
    assert cropped.shape == images.shape
    shifts = cropped[:, 8, 8] - 8
    assert {tuple(shift) for shift in shifts} == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    inner = images[:, 2:14, 2:14] + shifts[:, None, None, :]
    np.testing.assert_array_equal(cropped[:, 2:14, 2:14], inner)


def test_small_crops_are_squares_from_anywhere_in_the_image():
    rows, columns = np.mgrid[0:8, 0:8]
    images = np.broadcast_to(np.stack([rows, columns], -1), (300, 8, 8, 2)).astype(np.int32)
    cropped = np.asarray(networks.random_crop(jax.random.key(0), images, 5))
    corners = cropped[:, 0, 0]
    assert {tuple(corner) for corner in corners} == {(i, j) for i in range(4) for j in range(4)}
    np.testing.assert_array_equal(cropped, images[:, :5, :5] + corners[:, None, None, :])


def test_the_first_epochs_of_the_full_recipe_see_small_crops():
    digits = datasets.load_digits().first(256, 100)
    larger = dataclasses.replace(digits, train_images=np.zeros((256, 32, 32, 3), np.uint8))
    settings = make_settings(recipe="full", epochs=10)
    trainer = training.Trainer(larger, settings)
    assert [trainer.side(epoch) for epoch in range(1, 11)] == [24] * 7 + [32] * 3
    trainer.data = digits  # 8 x 8, and the network halves them three times
    assert {trainer.side(epoch) for epoch in range(1, 11)} == {8}
    demo = training.Trainer(larger, make_settings(recipe="demo", epochs=10))
    assert {demo.side(epoch) for epoch in range(1, 11)} == {32}


def test_the_first_layer_makes_inputs_uncorrelated():
    """Of pixels that are much alike it makes numbers that are not, each beside its negative.

    Their mean squares are 1, but for the share of 0.03 in what varies little.
    """
    rng = np.random.default_rng(0)
    images = rng.normal(128, 40, (50, 8, 8, 1)) + rng.normal(0, 10, (50, 8, 8, 3))
    images = images.clip(0, 255).astype(np.uint8)
    filters = networks.whitening_filters(images, 2, 7, 0.03)
    assert filters.shape == (2, 2, 3, 14)
    layout = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(networks.scaled(images), filters, (1, 1), "VALID", dimension_numbers=layout)
    out = np.asarray(out).reshape(-1, 14)
    same = np.eye(12, dtype=np.float32).reshape(2, 2, 3, 12)
    patches = jax.lax.conv_general_dilated(networks.scaled(images), same, (1, 1), "VALID", dimension_numbers=layout)
    variances = np.linalg.svd(np.asarray(patches, float).reshape(-1, 12), compute_uv=False)[:7] ** 2 / len(out)
    assert variances.max() > 1
    assert variances.min() < 0.03
    # The filters come from a 12 x 12 matrix of float32 whose error is divided by what the filters divide by, squared.
    atol = 12 * EPS * variances.max() / (variances.min() + 0.03)
    np.testing.assert_allclose(out[:, :7].T @ out[:, :7] / len(out), np.diag(variances / (variances + 0.03)), atol=atol)
    np.testing.assert_array_equal(out[:, 7:], -out[:, :7])
    first = filters[..., 0] / np.abs(filters[..., 0]).max()  # the component that varies most: colours together
    assert (np.sign(first) == np.sign(first[:, :, :1])).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (4, 4), (5, 3)])
def test_a_convolution_starts_by_passing_on_its_inputs(inputs, outputs, rng):
    x = jnp.asarray(rng.normal(size=(inputs, 6, 6, 2)), jnp.bfloat16)
    block = networks.ConvBlock(inputs, outputs, pool=False, rngs=nnx.Rngs(0))
    out = convolution.convolve(x, block.kernel[...])
    same = min(inputs, outputs)
    np.testing.assert_array_equal(out[:same], x[:same])
    assert (jnp.abs(out[same:]) > 0).all()


def test_the_mean_of_both_views_is_of_an_image_and_its_mirror_image(rng):
    images = rng.normal(size=(5, 4, 6, 3))
    corners = networks.mean_of_views(lambda images: images[:, 0, 0], images)
    np.testing.assert_array_equal(corners, (images[:, 0, 0] + images[:, 0, 5]) / 2)


def test_mixup_blends_images_and_targets_alike():
    images = np.zeros((6, 8, 8, 1), np.uint8)
    images[:] = np.arange(0, 60, 10)[:, None, None, None]
    labels = np.arange(6, dtype=np.int32)
    mixed, targets = networks.mixup(jax.random.key(0), images, jnp.asarray(labels), 0.4)
    np.testing.assert_array_equal(targets.indices, np.stack([labels, labels[::-1]], -1))
    np.testing.assert_allclose(targets.probs.sum(-1), 1, atol=EPS)
    assert len(np.unique(targets.probs[:, 0])) == 6
    # The brightness of an image is ten times its label, so that of a blend says what it holds.
    brightness = 10 * (targets.probs * targets.indices).sum(-1)
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), brightness, rtol=8 * EPS)


# Training.


def make_settings(**changes):
    plain = training.Settings(
        recipe="demo",
        loss="jaxce",
        epochs=2,
        batch_size=64,
        width=4,
        label_smoothing=0.0,
        mixup=0.0,
        seed=0,
        train_examples=256,
        test_examples=100,
    )
    return dataclasses.replace(plain, **changes)


def run(output_dir, console, settings=None, **options):
    options = {"data_dir": output_dir / "no data"} | options
    settings = settings or make_settings()
    return program.run(settings, output_dir=output_dir, console=console, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run: the rows, where it wrote, and what it printed."""
    path = tmp_path_factory.mktemp("run")
    console = Console(file=io.StringIO(), soft_wrap=True)
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(datasets, "URL", (path / "nothing here").as_uri())
        return run(path, console), path, output(console)


def without_seconds(rows):
    return [dataclasses.replace(row, seconds=0.0) for row in rows]


def step_losses(trainer):
    losses = []
    for epoch in range(1, trainer.settings.epochs + 1):
        losses += trainer.train_epoch(epoch)
    return np.array(losses)


def nudged_step_losses(trainer, start, seed, roundings=1):
    """The same from ``start``, with each weight moved by so many roundings, up, down or not."""
    rng = np.random.default_rng(seed)

    def nudge(x):
        return x * (1 + roundings * EPS * rng.integers(-1, 2, x.shape).astype(np.float32))

    nnx.update(trainer.modules, jax.tree.map(jnp.array, start))
    weights = nnx.state(trainer.model, nnx.Param)
    nnx.update(trainer.model, jax.tree.map(nudge, weights))
    return step_losses(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.1, "mixup": 0.2}], ids=repr)
def test_jaxce_and_optax_follow_the_same_curve(changes, monkeypatch):
    """To within the loss's own rounding, and what training makes of roundings.

    The first is 16 ε of the loss. The second is measured: how far optax's curve moves when the
    initial weights do, by one rounding each. Eight times the farthest of three such curves so far
    allows for our having drawn only three. The convolutions do not round to bfloat16 here: that
    makes so much of one rounding that the curves would tell little.
    """
    monkeypatch.setattr(networks, "convolve", convolution.convolve_by_xla)
    data = datasets.load_digits().first(1024, 100)
    trainer = training.Trainer(data, make_settings(loss="optax", width=16, **changes))
    start = jax.tree.map(np.array, nnx.state(trainer.modules))  # copies: training donates its own
    optax_losses = step_losses(trainer)
    nudged = [nudged_step_losses(trainer, start, seed) for seed in range(3)]
    spread = np.maximum.accumulate(np.max(np.abs(nudged - optax_losses), axis=0))
    allowed = 16 * EPS * optax_losses + 8 * spread

    jaxce_losses = step_losses(training.Trainer(data, make_settings(loss="jaxce", width=16, **changes)))
    assert len(jaxce_losses) == 32
    assert jaxce_losses[-1] < 0.95 * jaxce_losses[0]  # there is a curve to follow
    assert (np.abs(jaxce_losses - optax_losses) <= allowed).all()

    # The tolerance tells apart what it should: weights that differ in the second digit.
    other_losses = nudged_step_losses(trainer, start, seed=3, roundings=100_000)
    assert (np.abs(other_losses - optax_losses) > allowed).mean() > 0.5


def test_an_epoch_sees_every_example_once_in_a_new_order():
    data = datasets.load_digits().first(256, 100)
    trainer = training.Trainer(data, make_settings(batch_size=50))
    first, again, second = (np.concatenate(trainer.batches(epoch)) for epoch in (1, 1, 2))
    assert len(first) == 250
    assert len(np.unique(first)) == 250
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


def test_half_of_the_images_are_mirrored_and_then_the_others():
    digits = datasets.load_digits().first(256, 100)
    assert not training.Trainer(digits, make_settings()).flipped(1).any()
    trainer = training.Trainer(dataclasses.replace(digits, mirrors=True), make_settings())
    first, second, third = (trainer.flipped(epoch) for epoch in (1, 2, 3))
    np.testing.assert_array_equal(first, ~second)
    np.testing.assert_array_equal(first, third)
    assert 96 < first.sum() < 160  # 4 deviations about the mean of 128


@pytest.mark.slow
def test_the_full_recipe_is_tested_on_both_sides_of_an_image():
    data = dataclasses.replace(datasets.load_digits().first(256, 100), mirrors=True)
    trainer = training.Trainer(data, make_settings(recipe="full"))
    both = trainer.test()
    trainer.data = dataclasses.replace(data, test_images=data.test_images[:, :, ::-1])
    np.testing.assert_allclose(trainer.test(), both, rtol=16 * EPS)
    assert trainer.report()[0].loss == pytest.approx(both[0], rel=100 * EPS)


def test_biases_go_faster_and_do_not_decay_and_filters_stay():
    """With every gradient 1, a first step moves a weight by the rate times what Nesterov makes of 1 and the decay."""
    trainer = training.Trainer(datasets.load_digits().first(256, 100), make_settings())
    trainer.model.blocks[0].norm.bias[...] = jnp.ones(4)
    before = jax.tree.map(np.array, nnx.state(trainer.model))
    gradients = jax.tree.map(jnp.ones_like, nnx.state(trainer.model, nnx.Param))
    trainer.optimizer.update(trainer.model, gradients)
    after = nnx.state(trainer.model)

    rate = 0.2 * trainer.settings.learning_rate * (1 + training.MOMENTUM)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), before, after)
    bias = moved["blocks"][0]["norm"]["bias"][...]
    np.testing.assert_allclose(bias, training.BIAS_RATE * rate, rtol=4 * EPS)
    head = before["head"]["kernel"][...]
    expected = rate * (1 + training.WEIGHT_DECAY * head)
    # The difference of two weights has the rounding of the weights.
    np.testing.assert_allclose(moved["head"]["kernel"][...], expected, rtol=4 * EPS, atol=EPS * np.abs(head).max())
    np.testing.assert_array_equal(moved["filters"][...], 0)


def test_testing_weighs_examples_alike_in_a_last_short_batch(monkeypatch):
    data = datasets.load_digits().first(256, 100)
    trainer = training.Trainer(data, make_settings())
    at_once = trainer.test()
    monkeypatch.setattr(training, "EVALUATION_BATCH", 30)
    np.testing.assert_allclose(trainer.test(), at_once, rtol=16 * EPS)


@pytest.mark.slow
def test_resuming_gives_the_curve_of_one_run(tmp_path, no_network, console, monkeypatch):
    """In the middle of an epoch, after one, and from the checkpoint before when the newest is damaged."""
    settings = make_settings(epochs=3, mixup=0.2)  # mixup, so that random numbers matter
    trainer = training.Trainer(datasets.load_digits().first(256, 100), settings)
    start = jax.tree.map(np.array, nnx.state(trainer.modules))  # copies: training donates its own

    def compiled_once(data, settings):
        nnx.update(trainer.modules, jax.tree.map(jnp.array, start))
        return trainer

    monkeypatch.setattr(program, "Trainer", compiled_once)
    straight = run(tmp_path / "straight", console, settings)

    monkeypatch.setattr(program, "SAVE_SECONDS", 0.0)
    train_epoch = training.Trainer.train_epoch

    def interrupted(trainer, epoch, done=0):
        yield from itertools.islice(train_epoch(trainer, epoch, done), 3 if epoch == 2 else None)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Trainer, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", console, settings)
    assert checkpoints(tmp_path / "parts") == [6, 7]  # of 4 steps in each epoch
    for flag, epochs, stop_after in ("--stop-after", 3, 1), ("--epochs", 1, None), ("--epochs", 1, 2):
        fewer = dataclasses.replace(settings, epochs=epochs)
        with pytest.raises(program.UsageError, match=f"^{flag}: expected at least 2"):
            run(tmp_path / "parts", console, fewer, resume=True, stop_after=stop_after)

    monkeypatch.setattr(training.Trainer, "train_epoch", train_epoch)
    half = run(tmp_path / "parts", console, settings, resume=True, stop_after=2)
    assert [row.epoch for row in half] == [1, 2]
    assert checkpoints(tmp_path / "parts") == [7, 8]
    damage(tmp_path / "parts" / "checkpoint" / "step-0000008")
    whole = run(tmp_path / "parts", console, settings, resume=True)
    assert "step-0000008 is damaged" in output(console)
    assert checkpoints(tmp_path / "parts") == [11, 12]
    assert [row.epoch for row in whole] == [1, 2, 3]
    assert without_seconds(whole) == without_seconds(straight)

    histories = [json.loads((tmp_path / d / "history.json").read_text()) for d in ("straight", "parts")]
    assert histories[0]["start_loss"] == histories[1]["start_loss"]


def checkpoints(output_dir):
    return [int(path.name.removeprefix("step-")) for path in sorted((output_dir / "checkpoint").iterdir())]


def damage(path):
    """Eight bytes overwritten, which change a number and not the format."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(8)
    path.write_bytes(content)


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints of a network of a few weights; the modules, what holds them, and their folder."""
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    kept = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        layer.bias[...] = jnp.full(2, step, jnp.float32)
        kept.save(step, (layer,), {"step": step, "losses": [0.1, math.inf], "none": None})
    return layer, kept, tmp_path / "checkpoint"


def test_checkpoints_give_back_what_was_saved_and_are_two(saved, console):
    layer, kept, folder = saved
    assert checkpoints(folder.parent) == [2, 3]
    found = kept.load(console)
    assert found["record"] == {"step": 3, "losses": [0.1, math.inf], "none": None}
    other = nnx.Linear(3, 2, rngs=nnx.Rngs(1))
    restore((other,), found)
    np.testing.assert_array_equal(other.kernel[...], layer.kernel[...])
    np.testing.assert_array_equal(other.bias[...], [3, 3])
    assert output(console) == ""


@pytest.mark.parametrize("other", [nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(2, rngs=nnx.Rngs(0))])
def test_a_checkpoint_of_another_network_is_refused(saved, console, other):
    """Of other sizes or with other names, as one that another version of the example wrote."""
    _, kept, _ = saved
    with pytest.raises(UsageError, match=r"^--resume: expected a checkpoint of this network, found one of another"):
        restore((other,), kept.load(console))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damage, 1),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), 1),
        (lambda path: path.write_bytes(b""), 1),
        (lambda path: (path.unlink(), path.mkdir()), 1),
        (lambda path: path.unlink(), 0),
    ],
    ids=["overwritten", "cut short", "empty", "unreadable", "missing"],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(saved, console, change, said):
    _, kept, folder = saved
    change(folder / "step-0000003")
    assert kept.load(console)["record"]["step"] == 2
    assert output(console).count("\n") == output(console).count(str(folder / "step-0000003")) == said


def test_damaged_checkpoints_alone_are_an_error_of_one_line(saved, capsys):
    _, _, folder = saved
    for path in folder.iterdir():
        damage(path)
    assert command.main(["--resume", "--output-dir", str(folder.parent)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: --resume: expected a checkpoint in {folder}, found none that is whole.")
    assert errors.count("\n") == 1


def test_a_new_run_replaces_the_checkpoints_of_a_longer_one(saved, console):
    layer, _, folder = saved
    new = Checkpoints(folder.parent)
    assert checkpoints(folder.parent) == [2, 3]  # until there is something to replace them
    new.save(1, (layer,), {})
    assert checkpoints(folder.parent) == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 7}, "expected seed 0.* got 7"),
        ({"loss": "optax"}, "expected loss jaxce.* got optax"),
        ({"epochs": 3}, None),
    ],
)
def test_resuming_needs_a_checkpoint_of_the_same_run(finished, console, changes, complaint):
    _, folder, _ = finished
    record = Checkpoints(folder).load(console)["record"]
    about = {"arguments": dataclasses.asdict(make_settings()), "data": record["data"]}
    program.check_settings(record, about, console)
    assert output(console) == ""
    about["arguments"] |= changes
    if complaint is None:
        program.check_settings(record, about, console)
        assert "planned for 2 epochs and now follows a plan for 3" in output(console)
    else:
        with pytest.raises(UsageError, match=complaint):
            program.check_settings(record, about, console)


def test_resuming_needs_a_checkpoint(tmp_path, capsys):
    assert command.main(["--resume", "--output-dir", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: --resume: expected a checkpoint in {tmp_path / 'checkpoint'}, found none. Run ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(("recipe", "width"), [("demo", 16), ("full", 4)])
def test_recipes_start_near_chance_and_learn(tmp_path, no_network, console, recipe, width):
    settings = make_settings(recipe=recipe, width=width, label_smoothing=0.1, batch_size=32)
    rows = run(tmp_path, console, settings)
    assert "ln 10" in output(console)
    assert "Warning" not in output(console)
    assert rows[-1].train_loss < min(rows[0].train_loss, math.log(10))


# Reports.


def test_writes_history_and_curves(finished):
    rows, path, printed = finished
    history = json.loads((path / "history.json").read_text())
    assert history["arguments"] == dataclasses.asdict(make_settings())
    assert history["data"].startswith("digits: 256 images to train on, 100 to test on")
    assert history["versions"]["jax"] == jax.__version__
    assert history["machine"]["cpu_count"] >= 1
    assert history["chance_loss"] == pytest.approx(2.302585092994046)
    assert [row["train_loss"] for row in history["epochs"]] == [row.train_loss for row in rows]
    for row in history["epochs"]:
        assert row["skill"] == pytest.approx(1 - row["test_loss"] / 2.302585092994046)

    report = json.loads((path / "report.json").read_text())
    assert report["examples"] == 100
    assert report["loss"] == pytest.approx(rows[-1].test_loss, rel=100 * EPS)
    assert report["accuracy"] == pytest.approx(rows[-1].test_accuracy, rel=100 * EPS)
    assert [c["name"] for c in report["per_class"]] == [str(digit) for digit in range(10)]
    assert report["findings"][0] in printed
    beside, confused, calibrated, empty, pictures = printed.splitlines()[-5:]
    assert beside.startswith(f"Beside guessing: the loss of {report['loss']:.3f} is ")
    assert f"{report['accuracy']:.1%} of the images are told right, not 10%" in beside
    assert confused.startswith("Most often confused: ")
    assert f"{report['confidence']:.1%} sure on average, right {report['accuracy']:.1%} of the time" in calibrated
    assert empty == ""
    assert pictures.startswith(f"Pictures to look at in {path}: curves.png, report.png and confusion.png; beside them ")
    assert imread(path / "report.png").shape[:2] == (576, 1800)
    assert imread(path / "confusion.png").shape[:2] == (720, 840)

    picture = imread(path / "curves.png")
    assert picture.shape[:2] == (480, 1200)
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10


def test_confusions_are_counted_and_drawn_with_a_row_for_each_class(tmp_path, monkeypatch):
    data = datasets.load_digits().first(256, 100)
    found, confusion = training.Trainer(data, make_settings()).report()
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(data.test_labels, minlength=10))
    assert confusion.trace() == pytest.approx(100 * found.accuracy, rel=100 * EPS)

    drawn = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    names = [f"class {i}" for i in range(10)]
    report.plot_confusion(tmp_path / "confusion.png", confusion, names)
    (axes,) = drawn[0].axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("class", "taken for")
    assert [[label.get_text() for label in labels] for labels in (axes.get_yticklabels(), axes.get_xticklabels())] == [
        names,
        names,
    ]
    assert len(axes.texts) == confusion.size
    for text in axes.texts:
        column, row = text.get_position()
        assert int(text.get_text()) == confusion[row, column]


def test_prints_a_row_for_each_epoch(finished):
    rows, _, printed = finished
    lines = printed.splitlines()
    table = lines[lines.index(report.HEADER) + 1 :][: len(rows)]
    for row, line in zip(rows, table, strict=True):
        epoch, train_loss, test_loss, accuracy, skill, _ = line.split()
        assert int(epoch) == row.epoch
        assert float(train_loss) == pytest.approx(row.train_loss, abs=5e-5)
        assert float(test_loss) == pytest.approx(row.test_loss, abs=5e-5)
        assert float(accuracy.rstrip("%")) == pytest.approx(100 * row.test_accuracy, abs=5e-3)
        assert float(skill) == pytest.approx(1 - row.test_loss / math.log(10), abs=5e-4)


@pytest.mark.parametrize(
    ("loss", "warning"),
    [
        (2.30, None),
        (2.79, None),
        (2.81, "too large"),
        (math.nan, "too large"),
        (1.81, None),
        (1.79, "seen nothing"),
    ],
)
def test_warns_when_the_loss_at_the_start_is_far_from_chance(loss, warning):
    message = report.start_message(loss)
    assert "ln 10 = 2.3026" in message
    assert f"{loss:.4f}" in message
    assert ("Warning" in message) == (warning is not None)
    assert (warning or "") in message


@pytest.mark.parametrize(
    ("scale", "kind"), [(1.0, "Well calibrated"), (4.0, "Too sure of itself"), (0.3, "Less sure than it may be")]
)
def test_three_lines_say_what_the_result_means(scale, kind):
    """Nine in ten of class 0 are told right, and a logit of ln 9 is as sure as that; cats and dogs are confused."""
    labels = np.repeat([0, 1], 50)
    guesses = np.where(np.arange(100) % 10, labels, 1 - labels)
    logits = scale * math.log(9) * np.eye(2, dtype=np.float32)[guesses]
    found = diagnostics.report(logits, labels, class_names=["cat", "dog"])
    beside, confused, calibrated = report.in_words(found, np.array([[45, 5], [5, 45]])).splitlines()
    side = "below" if scale < 4 else "above"
    assert f"the loss of {found.loss:.3f} is {abs(found.skill):.0%} {side} the 0.693 of guessing" in beside
    assert "90.0% of the images are told right, not 50%" in beside
    assert confused == "Most often confused: cat and dog (10 times)."
    assert calibrated.startswith(f"{kind}: ")
    nothing = report.in_words(found, np.diag([50, 50])).splitlines()[1]
    assert nothing == "Most often confused: none."


# The command line.


def test_recipes_fill_in_what_is_not_given():
    parse = command.make_parser().parse_args
    settings = command.settings_from(parse(["--recipe", "full", "--epochs", "3"]))
    full = training.RECIPES["full"]
    assert (settings.epochs, settings.width) == (3, full.width)
    assert settings.label_smoothing == full.label_smoothing
    assert settings.learning_rate == full.learning_rate
    assert settings.train_examples is None

    unsmoothed = command.settings_from(parse(["--recipe", "full", "--label-smoothing", "0"]))
    assert unsmoothed.label_smoothing == 0
    demo = training.RECIPES["demo"]
    halved = command.settings_from(parse(["--batch-size", str(demo.batch_size // 2)]))
    assert halved.learning_rate == demo.learning_rate / 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--epochs", "0"], "--epochs: expected a whole number from 1 up, got '0'"),
        (["--batch-size", "many"], "--batch-size: expected a whole number from 1 up, got 'many'"),
        (["--label-smoothing", "1"], "expected a number from 0 to below 1, got '1'"),
        (["--mixup", "nan"], "--mixup: expected a finite number from 0 up, got 'nan'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 2**63 - 1, got '-1'"),
        (["--seed", str(2**63)], "--seed: expected a whole number from 0 to 2**63 - 1, got '9223372036854775808'"),
        (["--loss", "torch"], "invalid choice: 'torch'"),
    ],
)
def test_refuses_bad_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert complaint in capsys.readouterr().err


def test_the_program_ends_with_one_line_for_a_mistake(tmp_path, no_network, capsys):
    paths = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "run")]
    assert command.main([*paths, "--batch-size", "2000"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --batch-size: expected at most 1437")
    assert errors.count("\n") == 1


def test_says_before_training_that_results_cannot_be_written(tmp_path, no_network, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert command.main(["--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "file" / "run")]) == 2
    errors = capsys.readouterr().err
    assert errors == f"error: --output-dir: expected a folder, got {tmp_path / 'file' / 'run'}: Not a directory.\n"

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(common.tempfile, "TemporaryFile", read_only)
    assert command.main(["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors == f"error: --output-dir: expected a folder, got {tmp_path}: Read-only file system.\n"
