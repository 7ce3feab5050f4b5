"""The language-model example: text without leaks, tokens without loss, and the same curve with and without logits."""

import dataclasses
import importlib.metadata
import io
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs the extra: examples")
pytest.importorskip("tokenizers", reason="needs the extra: examples")
from flax import nnx
from jax.sharding import AxisType
from matplotlib.image import imread
from rich.console import Console

from jaxce.examples.common import UsageError
from jaxce.examples.language_model import __main__ as command
from jaxce.examples.language_model import data as texts
from jaxce.examples.language_model import model as networks
from jaxce.examples.language_model import program, report, training
from jaxce.examples.language_model.data import BytePairTokenizer, ByteTokenizer, UnusableTextError
from jaxce.examples.language_model.report import Measures, Yardsticks

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's schedules multiply integers by floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def console():
    return Console(file=io.StringIO(), soft_wrap=True)


def output(console):
    return console.file.getvalue()


# Text.


@pytest.fixture(scope="module")
def installed():
    return texts.load(None)


def paragraphs(text):
    return {" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)}


def test_there_is_text_wherever_python_is(installed):
    assert installed.files > 100
    assert 'The "for" statement' in installed.train + installed.validation
    assert "Apache License" in installed.train
    assert len(installed.train) + len(installed.validation) > 500_000
    assert f"{installed.file_bytes:,} bytes in {installed.files:,} files" in str(installed)
    assert texts.load(None) == installed


def test_nothing_held_out_was_trained_on(installed):
    train, validation = paragraphs(installed.train), paragraphs(installed.validation)
    assert not train & validation
    assert 0.05 < len(installed.validation) / (len(installed.train) + len(installed.validation)) < 0.15


def test_takes_documents_and_leaves_tables_and_programs():
    taken = ["a/LICENSE", "a/licenses/LICENSE-APACHE", "a/METADATA", "a/docs/guide.rst", "a/README.md", "a/NOTICE.txt"]
    left = ["a/metadata.py", "a/tests/data/numbers.txt", "a/RECORD", "a/code.py", "a/LICENSES_OF.so"]
    paths = map(importlib.metadata.PackagePath, taken + left)
    assert [texts.is_document(path) for path in paths] == [True] * len(taken) + [False] * len(left)


def test_holds_out_the_last_tenth_of_each_text():
    def text(name):
        return "\n\n".join(f"{name} {i:02}" for i in range(20))

    train, validation = texts.split([text("a"), text("b"), "c 0"])
    assert train.split() == [word for name in "ab" for i in range(18) for word in (name, f"{i:02}")] + ["c", "0"]
    assert validation == "a 18\n\na 19\n\n\nb 18\n\nb 19"


def test_keeps_a_paragraph_once_however_it_is_wrapped():
    terms = "You may do\nas you like.\n" * 9
    other_terms = "  You may do as you like." * 9
    train, validation = texts.split([f"Mine.\n\n{terms} \n\tNo\nwarranty.", f"Yours.\n\n{other_terms}\n\nNo warranty."])
    assert train == f"Mine.\n\n{terms.strip()}\n\n\nYours."
    assert validation == "\tNo\nwarranty."


@pytest.fixture
def folder(tmp_path):
    """Two texts, and files that are to be left alone."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_bytes("\ufeffThe first text,\r\nof two lines and a little more.\r\n\r\nnaïve".encode())
    (folder / "inner" / "a.md").write_text("".join(f"Paragraph {i} of many.\n\n" for i in range(400)))
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    (folder / "zeros.bin").write_bytes(bytes(10))
    (folder / ".hidden").write_text("secret")
    return folder


def test_reads_a_folder_of_ones_own(folder):
    corpus = texts.load(folder)
    assert corpus.train.startswith("The first text,\nof two lines and a little more.\n\n\nParagraph 0 of many.")
    assert corpus.validation.startswith("naïve\n\n\n")
    assert "secret" not in corpus.train + corpus.validation
    assert (corpus.files, corpus.skipped) == (2, 2)
    assert "2 files are not UTF-8 text" in str(corpus)
    one = texts.load(folder / "inner" / "a.md")
    assert one.train == corpus.train.removeprefix("The first text,\nof two lines and a little more.\n\n\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("One.\n\n\nTwo.")
    monkeypatch.setattr(type(tmp_path), "read_bytes", denied)
    for path in tmp_path, tmp_path / "a.txt":
        with pytest.raises(UnusableTextError, match=r"a\.txt: expected a file that can be read: Permission denied\."):
            texts.load(path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing", r"missing: expected a file or a folder, found neither"),
        ("texts/picture.png", r"picture\.png: expected UTF-8 text, found none in 1 files"),
        ("one.txt", r"one\.txt: expected several paragraphs, with blank lines between them.* got 19 characters"),
        ("empty", r"empty: expected UTF-8 text, found none in 0 files"),
    ],
)
def test_refuses_text_it_cannot_use(tmp_path, folder, name, complaint):
    (tmp_path / "one.txt").write_text("Just one paragraph.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableTextError, match=complaint):
        texts.load(tmp_path / name)


# Tokens.

ODD_TEXT = "  for x in range(3):\n\tprint('naïve ☃ 𝄞')\n\n\n\x01 e\u0301  "


@pytest.fixture(scope="module")
def byte_pairs(installed):
    return BytePairTokenizer(installed.train[:200_000], 600)


@pytest.mark.parametrize("kind", ["pairs", "bytes"])
def test_tokens_become_the_same_text_again(kind, byte_pairs, installed):
    tokenizer = byte_pairs if kind == "pairs" else ByteTokenizer()
    for text in (ODD_TEXT, installed.validation, "", "\n"):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokenizer.decode(tokens) == text
        assert tokenizer.byte_counts[tokens].sum() == len(text.encode())
    assert tokenizer.byte_counts.shape == (tokenizer.vocab_size,)


def test_bytes_that_make_no_character_are_shown_as_such():
    assert ByteTokenizer().decode(np.array([65, 0xC3, 66])) == "A\ufffdB"


def test_byte_pairs_are_fewer_tokens_learned_alike_every_time(byte_pairs, installed):
    assert byte_pairs.vocab_size == 600
    tokens = byte_pairs.encode(installed.validation)
    assert len(tokens) < 0.65 * len(installed.validation.encode())
    again = BytePairTokenizer(installed.train[:200_000], 600)
    np.testing.assert_array_equal(again.encode(installed.validation), tokens)


def test_a_short_text_has_a_small_vocabulary():
    assert BytePairTokenizer("abab", 4096).vocab_size == 256 + 2  # ab, abab


def test_unigram_entropy():
    data = texts.Dataset(ByteTokenizer(), np.array([7, 7, 7, 9]), np.array([7]))
    assert data.unigram_entropy == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


# Network.


@pytest.mark.slow
def test_the_network_looks_at_nothing_behind(rng):
    model = networks.LanguageModel(50, 16, 32, 2, nnx.Rngs(0))
    tokens = rng.integers(0, 50, (1, 16)).astype(np.int32)
    changed = tokens.copy()
    changed[0, 9] = (changed[0, 9] + 1) % 50
    hidden, other = np.asarray(model(tokens)), np.asarray(model(changed))
    np.testing.assert_array_equal(hidden[0, :9], other[0, :9])
    assert (np.abs(hidden[0, 9:] - other[0, 9:]).max(-1) > 1e-3).all()


@pytest.mark.slow
def test_generates_what_is_likely_also_beyond_the_context():
    """When it is cold, every token is the likeliest after the context before it."""
    model = networks.LanguageModel(50, 8, 32, 1, nnx.Rngs(0))
    prompt = np.array([3, 1], np.int32)
    tokens = networks.generate(model, prompt, 20, temperature=1e-4, seed=0)
    assert len(tokens) == 22
    np.testing.assert_array_equal(tokens[:2], prompt)
    logits_of = nnx.jit(lambda model, tokens: model(tokens[None])[0, -1] @ model.table.T)
    for end in (2, 8, 9, 21):
        logits = np.asarray(logits_of(model, tokens[max(0, end - 8) : end]))
        assert logits[tokens[end]] >= logits.max() - 0.01

    other = networks.generate(model, prompt, 20, temperature=1.0, seed=1)
    assert (other != tokens).any()


# Training.


def make_settings(**changes):
    plain = training.Settings(
        loss="fused",
        mode=None,
        tokens="pairs",
        vocab_size=300,
        context=16,
        width=32,
        layers=1,
        steps=30,
        batch_size=8,
        learning_rate=3e-3,
        seed=0,
        objective="sft",
        preference_steps=0,
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture(scope="module")
def dataset(installed):
    short = dataclasses.replace(installed, train=installed.train[:50_000], validation=installed.validation[:5_000])
    return texts.tokenize(short, 300)


def step_losses(trainer):
    return np.array([trainer.train_step(step) for step in range(1, trainer.settings.steps + 1)])


def nudged_step_losses(trainer, start, seed, roundings=1):
    """The same from ``start``, with each weight moved by so many roundings, up, down or not."""
    rng = np.random.default_rng(seed)

    def nudge(x):
        return x * (1 + roundings * EPS * rng.integers(-1, 2, x.shape).astype(np.float32))

    nnx.update((trainer.model, trainer.optimizer), jax.tree.map(jnp.array, start))
    nnx.update(trainer.model, jax.tree.map(nudge, nnx.state(trainer.model, nnx.Param)))
    return step_losses(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "recompute", "store"])
def test_fused_and_dense_follow_the_same_curve(dataset, mode):
    """To within the loss's own rounding, and what training makes of roundings, as for CIFAR-10 and optax."""
    trainer = training.Trainer(dataset, make_settings(loss="dense"))
    start = jax.tree.map(np.array, nnx.state((trainer.model, trainer.optimizer)))  # copies: training donates its own
    dense_losses = step_losses(trainer)
    nudged = [nudged_step_losses(trainer, start, seed) for seed in range(3)]
    spread = np.maximum.accumulate(np.max(np.abs(nudged - dense_losses), axis=0))
    allowed = 16 * EPS * dense_losses + 8 * spread

    fused_losses = step_losses(training.Trainer(dataset, make_settings(mode=mode)))
    assert len(fused_losses) == 30
    assert fused_losses[-1] < 0.95 * fused_losses[0]  # there is a curve to follow
    assert (np.abs(fused_losses - dense_losses) <= allowed).all()

    # The tolerance tells apart what it should: weights that differ in the third digit.
    other_losses = nudged_step_losses(trainer, start, seed=3, roundings=10_000)
    assert (np.abs(other_losses - dense_losses) > allowed).mean() > 0.5


def test_windows_hold_each_token_and_the_one_after(dataset):
    trainer = training.Trainer(dataset, make_settings())
    batch = trainer.batch(1)
    assert batch.shape == (8, 17)
    text = dataset.train.tobytes()
    assert all(window.tobytes() in text for window in batch)
    np.testing.assert_array_equal(batch, trainer.batch(1))
    assert (batch != trainer.batch(2)).any()

    windows = trainer.validation_windows()
    targets = windows[:, 1:].ravel()
    np.testing.assert_array_equal(targets, dataset.validation[1 : len(targets) + 1])
    assert len(dataset.validation) - len(targets) <= 16


@pytest.mark.parametrize("tokens", ["pairs", "bytes"])
def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_decoded_text(dataset, installed, tokens):
    if tokens == "bytes":
        short = dataclasses.replace(installed, train=installed.train[:50_000], validation=installed.validation[:5_000])
        dataset = texts.tokenize(short, None)
    trainer = training.Trainer(dataset, make_settings())
    loss, bits = trainer.test()
    targets = trainer.validation_windows()[:, 1:].ravel()
    text = dataset.tokenizer.decode(targets)
    assert "\ufffd" not in text  # the cut is not in a character, so the bytes of the text are those of the tokens
    assert bits == pytest.approx(loss * len(targets) / math.log(2) / len(text.encode()))
    if tokens == "bytes":
        assert bits == pytest.approx(loss / math.log(2))
        assert bits == pytest.approx(8, abs=0.2)  # it is guessing


def test_bits_per_byte_of_guessing_bytes_is_8():
    assert report.bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8)
    assert Measures(math.log(50), 0.0).perplexity == pytest.approx(50)
    assert Measures(1e4, 0.0).perplexity == math.inf  # of a run that diverges
    assert math.isnan(Measures(math.nan, 0.0).perplexity)


@pytest.mark.slow
def test_testing_weighs_tokens_alike_in_a_last_short_batch(dataset):
    trainer = training.Trainer(dataset, make_settings(batch_size=7))
    assert len(trainer.validation_windows()) % 7
    at_once = training.Trainer(dataset, make_settings(batch_size=len(trainer.validation_windows())))
    np.testing.assert_allclose(trainer.test(), at_once.test(), rtol=16 * EPS)


# The whole program.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny run on text of one's own: the rows, where it wrote, and what it printed."""
    path = tmp_path_factory.mktemp("run")
    (path / "text.txt").write_text("".join(f"There were {i} of [them] before.\n\n" for i in range(400)))
    console = Console(file=io.StringIO(), soft_wrap=True)
    with jax.numpy_dtype_promotion("standard"):
        rows = program.run(
            make_settings(steps=25), data=path / "text.txt", output_dir=path / "new" / "results", console=console
        )
    return rows, path / "new" / "results", output(console)


def test_learns_from_a_start_near_chance(finished):
    rows, _, printed = finished
    found = re.search(r"loss before training: ([\d.]+); of guessing: ln (\d+) = ([\d.]+)", printed)
    start, vocab_size, chance = (float(group) for group in found.groups())
    assert 256 < vocab_size <= 300
    assert chance == pytest.approx(math.log(vocab_size), abs=5e-5)
    assert start == pytest.approx(chance, abs=0.1)
    assert "Warning" not in printed
    assert rows[-1].validation.loss < 0.9 * start


def test_prints_a_row_now_and_then(finished):
    rows, _, printed = finished
    assert [row.step for row in rows] == [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    lines = printed.splitlines()
    table = lines[lines.index(report.HEADER) + 1 :][: len(rows)]
    for row, line in zip(rows, table, strict=True):
        step, train_loss, validation_loss, perplexity, bits, _ = map(float, line.split())
        assert step == row.step
        assert train_loss == pytest.approx(row.train_loss, abs=5e-5)
        assert validation_loss == pytest.approx(row.validation.loss, abs=5e-5)
        assert perplexity == pytest.approx(math.exp(row.validation.loss), abs=5e-3)
        assert bits == pytest.approx(row.validation.bits_per_byte, abs=5e-4)


def test_prints_the_memory_of_both_losses_and_the_plan(finished):
    _, path, printed = finished
    history = json.loads((path / "history.json").read_text())
    memory = history["temporary_bytes"]
    assert f"fused {memory['fused'] / 1e6:.2f} MB, dense {memory['dense'] / 1e6:.2f} MB" in printed
    assert history["plan"] in printed


@pytest.mark.slow
def test_memory_of_the_fused_loss_is_less():
    settings = make_settings(batch_size=64, context=128)
    vocab_size = 16384
    logits = 4 * 64 * 128 * vocab_size

    def memory(*loss):
        return training.temporary_bytes(training.make_loss(*loss), settings, vocab_size)

    assert memory("dense") >= logits
    for mode in (None, "recompute", "store"):
        assert memory("fused", mode) < logits


def test_writes_history_and_curves(finished):
    rows, path, _ = finished
    history = json.loads((path / "history.json").read_text())
    assert history["arguments"] == dataclasses.asdict(make_settings(steps=25))
    assert "text.txt: " in history["data"]
    assert history["versions"]["jax"] == jax.__version__
    assert history["versions"]["tokenizers"]
    assert history["start"]["loss"] == pytest.approx(history["chance_loss"], abs=0.1)
    assert history["unigram_entropy"] < history["chance_loss"]
    assert history["rows"] == [row.as_dict() for row in rows]
    assert history["rows"][-1]["perplexity"] == pytest.approx(math.exp(rows[-1].validation.loss))

    picture = imread(path / "curves.png")
    assert picture.shape[:2] == (480, 1200)
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10


@pytest.mark.slow
def test_ends_with_text_of_its_own(finished):
    _, path, printed = finished
    history = json.loads((path / "history.json").read_text())
    assert history["sample"].startswith("The")
    shown = "".join(character for character in history["sample"] if character.isprintable() or character == "\n")
    assert "".join(c for c in printed if c.isprintable() or c == "\n").endswith(shown + "\n")


@pytest.mark.parametrize(
    ("loss", "warning"),
    [(8.32, None), (8.81, None), (8.83, "too large"), (math.nan, "too large"), (7.83, None), (7.81, "seen nothing")],
)
def test_warns_when_the_loss_at_the_start_is_far_from_chance(loss, warning):
    message = Yardsticks(4096, 6.5).start_message(loss)
    assert "ln 4096 = 8.3178" in message
    assert "is: 6.5000" in message
    assert f"{loss:.4f}" in message
    assert ("Warning" in message) == (warning is not None)
    assert (warning or "") in message


# The command line.


def test_defaults():
    parse = command.make_parser().parse_args
    settings = command.settings_from(parse([]))
    assert (settings.loss, settings.mode, settings.vocab_size) == ("fused", None, command.VOCAB_SIZE)
    assert settings.width % networks.HEAD_SIZE == 0
    plain = command.settings_from(parse(["--tokens", "bytes"]))
    assert plain.vocab_size is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: expected a whole number from 1 up, got '0'"),
        (["--batch-size", "many"], "--batch-size: expected a whole number from 1 up, got 'many'"),
        (["--vocab-size", "255"], "--vocab-size: expected a whole number from 256 up, got '255'"),
        (["--learning-rate", "0"], "--learning-rate: expected a finite number above 0, got '0'"),
        (["--learning-rate", "inf"], "--learning-rate: expected a finite number above 0, got 'inf'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 2**63 - 1, got '-1'"),
        (["--loss", "torch"], "invalid choice: 'torch'"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_refuses_bad_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--loss", "dense", "--mode", "store"], "--mode: expected none with --loss dense"),
        (["--tokens", "bytes", "--vocab-size", "300"], "--vocab-size: expected none with --tokens bytes"),
        (["--width", "48"], "--width: expected a multiple of 32, the size of an attention head, got 48"),
        (["--context", "100000"], "--context: expected fewer than"),
        (["--data", "nowhere"], "nowhere: expected a file or a folder"),
    ],
)
def test_the_program_ends_with_one_line_for_a_mistake(tmp_path, folder, arguments, complaint, capsys):
    data = [] if "--data" in arguments else ["--data", str(folder)]
    assert command.main([*data, *arguments, "--output-dir", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {complaint}")
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_says_before_training_that_results_cannot_be_written(tmp_path, folder, capsys):
    blocked = ["--data", str(folder), "--context", "16", "--output-dir", str(folder / "b.txt" / "run")]
    assert command.main(blocked) == 2
    assert "error: --output-dir: expected a folder, got" in capsys.readouterr().err


# Several processes.


def test_more_processes_than_cores_are_refused_before_any_starts(monkeypatch, capsys):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(command, "launch", None)
    assert command.main(["--processes", "50"]) == 2
    assert capsys.readouterr().err == "error: --processes: expected at most 2, the cores here, got 50.\n"


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(tmp_path, folder, capfd, monkeypatch):
    """Each with half of the table; the first alone prints and writes."""
    assert len(jax.devices()) > 1  # of this process, and so for the tests to come
    monkeypatch.delenv("XLA_FLAGS")  # one device in each of them, not eight
    arguments = ["--data", str(folder), "--tokens", "bytes", "--steps", "6", "--layers", "1", "--width", "32"]
    arguments += ["--context", "16", "--batch-size", "2"]
    rows = {}
    for processes in ("1", "2"):
        output_dir = tmp_path / processes
        code = command.main([*arguments, "--processes", processes, "--output-dir", str(output_dir)])
        assert code == 0
        history = json.loads((output_dir / "history.json").read_text())
        rows[processes] = [(row["train_loss"], row["validation_loss"]) for row in history["rows"]]
    assert capfd.readouterr().out.count("wrote curves.png") == 2
    # A few steps of Adam, whose first ones amplify the rounding of gradients.
    np.testing.assert_allclose(rows["2"], rows["1"], rtol=1e-4)
    assert rows["1"][0] != rows["1"][-1]


@pytest.mark.slow
def test_a_step_is_compiled_once(dataset):
    mesh = jax.make_mesh((2,), ("vocabulary",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    trainer = training.Trainer(dataset, make_settings(), mesh)
    trainer.train_step(1)
    compiled = []

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        trainer.train_step(2)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_a_table_that_cannot_be_split(dataset):
    mesh = jax.make_mesh((7,), ("vocabulary",), devices=jax.devices()[:7])
    with pytest.raises(UsageError, match=r"--processes: expected a number that divides the 300 tokens"):
        training.Trainer(dataset, make_settings(), mesh)
