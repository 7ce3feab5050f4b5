"""The data of the CIFAR-10 example: found, or fetched and checked, and read; or digits instead.

The format is the official binary version: five training files and one test file of 10,000 records,
a record being one byte of label and 3072 of picture. Reading it takes NumPy and no pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import wrap_file

from jaxce.examples.common import UsageError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"

NUM_CLASSES = 10  # of CIFAR-10 and of the digits alike
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDS_PER_FILE = 10_000
IMAGE_SHAPE = (3, 32, 32)  # as stored: one colour plane after the other
RECORD_BYTES = 1 + 3 * 32 * 32


class DataUnavailableError(Exception):
    """There is no CIFAR-10 here, and none could be downloaded."""


class DamagedDataError(Exception):
    """There is data, but it is not what it should be."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images are uint8 ``[N, height, width, channels]``, labels int32 ``[N]``."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    mirrors: bool  # whether a mirrored image still shows its class: a dog does, a 7 does not

    def __str__(self) -> str:
        height, width, channels = self.train_images.shape[1:]
        return (
            f"{self.name}: {len(self.train_labels):,} images to train on, "
            f"{len(self.test_labels):,} to test on, {height}x{width}x{channels}"
        )

    def first(self, train_examples: int | None, test_examples: int | None) -> Dataset:
        """At most so many examples of each split; None means all."""
        return dataclasses.replace(
            self,
            train_images=self.train_images[:train_examples],
            train_labels=self.train_labels[:train_examples],
            test_images=self.test_images[:test_examples],
            test_labels=self.test_labels[:test_examples],
        )


def load(data_dir: Path, console: Console) -> Dataset:
    """CIFAR-10 from ``data_dir``, downloaded to it if need be; failing both, scikit-learn's digits.

    Damaged data is an error and never a reason to fall back: it would go unnoticed.
    """
    try:
        return load_cifar10(data_dir, console)
    except DataUnavailableError as problem:
        console.print(
            f"{problem}\n"
            f"Training on scikit-learn's bundled 8x8 digits instead. For CIFAR-10, put {ARCHIVE} "
            f"(from {URL}) or the folder {FOLDER} in a directory and name it with --data-dir.",
            style="yellow",
            highlight=False,
        )
        return load_digits()


def load_cifar10(data_dir: Path, console: Console) -> Dataset:
    if data_dir.exists() and not data_dir.is_dir():
        raise UsageError(f"--data-dir: expected a folder, got {data_dir}, which is a file.")
    folder = find(data_dir)
    if folder is None:
        archive = data_dir / ARCHIVE
        if archive.exists():
            check_md5(archive)
        else:
            download(archive, console)
        folder = unpack(archive, data_dir)

    train = [read_batch(folder / name) for name in TRAIN_FILES]
    test_images, test_labels = read_batch(folder / TEST_FILE)
    return Dataset(
        name="CIFAR-10",
        train_images=np.concatenate([images for images, _ in train]),
        train_labels=np.concatenate([labels for _, labels in train]),
        test_images=test_images,
        test_labels=test_labels,
        class_names=CIFAR10_CLASSES,
        mirrors=True,
    )


def load_digits() -> Dataset:
    """1797 grey 8x8 digits that come with scikit-learn: 1437 to train on, 360 to test."""
    from sklearn.datasets import load_digits as bundled_digits  # slow to import, seldom needed

    digits = bundled_digits()
    # The last digits are other writers' than the first, so the split is drawn at random.
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, :, :, None] * (255 / 16)).astype(np.uint8)
    labels = digits.target[order].astype(np.int32)
    names = tuple(map(str, digits.target_names))
    return Dataset("digits", images[:1437], labels[:1437], images[1437:], labels[1437:], names, mirrors=False)


def find(data_dir: Path) -> Path | None:
    """The folder of the batches: the one that the archive makes in ``data_dir``, or that itself.

    It need not be complete: what is missing is reported when it is read.
    """
    if (data_dir / FOLDER).is_dir():
        return data_dir / FOLDER
    if any((data_dir / name).is_file() for name in (*TRAIN_FILES, TEST_FILE)):
        return data_dir
    return None


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[N, 32, 32, 3]`` and labels of one file of the binary version."""
    expected = RECORDS_PER_FILE * RECORD_BYTES
    got = path.stat().st_size if path.is_file() else None
    if got != expected:
        raise DamagedDataError(
            f"{path}: expected {expected:,} bytes ({RECORDS_PER_FILE:,} records of {RECORD_BYTES:,}"
            f"), got {'no such file' if got is None else f'{got:,} bytes'}. "
            f"Delete {path.parent} and run again to unpack or download it anew."
        )
    records = np.fromfile(path, np.uint8).reshape(-1, RECORD_BYTES)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= NUM_CLASSES:
        row = int(np.argmax(labels >= NUM_CLASSES))
        raise DamagedDataError(
            f"{path}: expected labels from 0 to {NUM_CLASSES - 1}, got {labels[row]} in record "
            f"{row}. Delete {path.parent} and run again to unpack or download it anew."
        )
    planes = records[:, 1:].reshape(-1, *IMAGE_SHAPE)
    # Channels last is the layout XLA's CPU convolutions are fast in.
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def download(archive: Path, console: Console) -> None:
    """Fetch the archive. It gets its name when its checksum is right, and is deleted otherwise."""
    partial = archive.with_name(archive.name + ".part")
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            archive.parent.mkdir(parents=True, exist_ok=True)
            size = int(response.headers.get("Content-Length", 0))
            bar = wrap_file(response, size, description="Downloading CIFAR-10", console=console)
            with bar as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        check_md5(partial)
        partial.replace(archive)
    except (OSError, http.client.HTTPException) as problem:
        raise DataUnavailableError(
            f"{archive.parent} holds neither {FOLDER} nor {ARCHIVE}, "
            f"and downloading {URL} failed: {getattr(problem, 'reason', problem)}."
        ) from problem
    finally:
        partial.unlink(missing_ok=True)


def check_md5(archive: Path) -> None:
    with archive.open("rb") as file:
        got = hashlib.file_digest(file, "md5").hexdigest()
    if got != ARCHIVE_MD5:
        raise DamagedDataError(
            f"{archive}: expected md5 {ARCHIVE_MD5}, got {got} ({archive.stat().st_size:,} bytes). "
            f"The download was cut short or changed on its way: fetch {URL} again."
        )


def unpack(archive: Path, data_dir: Path) -> Path:
    """Unpack the batches next to the archive, all or nothing, and return their folder. What else it holds stays in."""
    try:
        with tempfile.TemporaryDirectory(dir=data_dir) as scratch, tarfile.open(archive) as tar:
            folder = Path(scratch) / FOLDER
            folder.mkdir()
            missing = {f"{FOLDER}/{name}" for name in (*TRAIN_FILES, TEST_FILE)}
            for member in tar:
                if member.name in missing and (source := tar.extractfile(member) if member.isfile() else None):
                    with source, (Path(scratch) / member.name).open("wb") as sink:
                        shutil.copyfileobj(source, sink)
                    missing.remove(member.name)
            if missing:
                raise tarfile.TarError(f"no file {min(missing)}")
            return folder.rename(data_dir / FOLDER)
    except (tarfile.TarError, EOFError) as problem:
        raise DamagedDataError(
            f"{archive}: expected an archive of the folder {FOLDER}, got: {problem}. Delete it and fetch {URL} again."
        ) from problem
    except OSError as problem:
        raise UsageError(f"--data-dir: expected a folder to unpack {archive} in: {problem.strerror}.") from problem
