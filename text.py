"""Texts as tokens: WikiText-2 by words, a text file or a generated text by characters.

    text = load_text("wikitext2", "data")               # or "grammar", or Path("book.txt")
    for x, y in windows(text.train, 64, 32, seed=0, epoch=0):      # each (32, 64)
    for x, y in all_windows(text.valid, 64, 32):

A text lives on the device whole; a batch is one gather out of it.
"""
import collections
import gzip
import io
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from download import (FILES, MIRRORS, DataError, expand, fetch_any, fingerprint, matches,
                      one_at_a_time, verify)

WIKITEXT = ("train.txt", "valid.txt", "test.txt")
TEXTS = ("wikitext2", "grammar")
GRAMMAR_SEED = 0


class Text(NamedTuple):
    """Two texts as tokens, on the CPU."""
    train: torch.Tensor  # (N,) of the smallest integer type; windows() makes int64 of it
    valid: torch.Tensor  # (M,) likewise
    vocabulary: list     # token number -> character or word
    unit: str            # "character" or "word"
    source: str          # where it was read from

    @property
    def fingerprint(self):
        """A checksum of what is trained and measured on."""
        return fingerprint(self.train.cpu().numpy(), self.valid.cpu().numpy(),
                           "\n".join(self.vocabulary))


def load_text(name, data_dir="data", train_file=None, valid_file=None, train_size=None,
              valid_size=None):
    """Return a text as `Text`.

    name: 'wikitext2', by words; 'grammar', generated, by characters; or the Path of a text file
    (plain or .gz, UTF-8), by characters, of which the last tenth is for validation. train_file and
    valid_file choose among wikitext2's files (default train.txt and valid.txt), or name others in
    its folder. train_size, valid_size: keep only the first so many tokens; the vocabulary stays
    that of all. Raises DataError with a message for the user.
    """
    try:
        if name == "wikitext2":
            files = train_file or WIKITEXT[0], valid_file or WIKITEXT[1]
            text = load_wikitext(Path(expand(data_dir)), files)
        elif name == "grammar":
            text = split_characters(write_grammar(), f"generated, seed {GRAMMAR_SEED}")
        else:
            path = Path(expand(name))
            text = split_characters(decode(path.read_bytes(), path), str(path))
    except OSError as error:
        raise DataError(f"cannot use {error.filename or name}: {error.strerror or error}. Give "
                        f"another file, or one of {', '.join(TEXTS)}.") from error
    for part, size in (("train", train_size), ("valid", valid_size)):
        tokens = getattr(text, part)
        if size is not None and size > len(tokens):
            raise DataError(f"{part}_size is {size}, but {text.source} has only {len(tokens)} "
                            "such tokens.")
        text = text._replace(**{part: tokens[:size].clone()})
    return text


def decode(blob, where):
    """The text in a file's bytes, which gzip may have compressed."""
    try:
        if blob[:2] == b"\x1f\x8b":
            blob = gzip.decompress(blob)
        return blob.decode("utf-8-sig")  # without the mark that some editors put in front
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{where} is no UTF-8 text, plain or gzipped ({error}); give another "
                        "file.") from error


def split_characters(text, source, piece=1 << 20):
    """A Text by characters: the first nine tenths for training, the rest for validation.

    Goes through the text twice, `piece` characters at a time: besides the text itself (a byte a
    character, mostly) only the tokens take memory.
    """
    def pieces():
        for i in range(0, len(text), piece):
            yield i, np.frombuffer(text[i:i + piece].encode("utf-32-le"), "<u4")
    used = np.zeros(sys.maxunicode + 1, bool)
    for _, codes in pieces():
        used[codes] = True
    vocabulary = np.flatnonzero(used)
    if len(vocabulary) < 2:
        raise DataError(f"{source} holds {len(text)} characters, {len(vocabulary)} different ones: "
                        "there is nothing to learn in it; give another file.")
    number = (used.cumsum() - 1).astype(smallest_type(len(vocabulary)))
    tokens = np.empty(len(text), number.dtype)
    for i, codes in pieces():
        tokens[i:i + len(codes)] = number[codes]
    tokens, cut = torch.from_numpy(tokens), len(tokens) * 9 // 10
    return Text(tokens[:cut], tokens[cut:], list(map(chr, vocabulary)), "character", source)


def smallest_type(count):
    """The smallest integer type, of those that torch can index, for the numbers below count."""
    return np.uint8 if count <= 1 << 8 else np.int16 if count <= 1 << 15 else np.int32


def load_wikitext(data_dir, files):
    """A Text of two of WikiText-2's files, or of others in its folder, by words.

    The vocabulary is that of the training text, most frequent first, with `<unk>`, which also
    stands for what only the validation text has.
    """
    folder = data_dir / "wikitext-2"
    if data_dir.name == folder.name or all((data_dir / file).is_file() for file in files):
        folder = data_dir
    archive = folder.parent / "wikitext-2-v1.zip"
    find_wikitext(folder, archive, files)
    (train, source), (valid, other) = (read_wikitext(folder, archive, file) for file in files)
    train, valid = words(train), words(valid)
    counts = collections.Counter(train)
    vocabulary = [word for word, _ in counts.most_common()]
    if "<unk>" not in counts:
        vocabulary.append("<unk>")
    number = {word: i for i, word in enumerate(vocabulary)}
    tokens = [torch.from_numpy(np.array([number.get(word, number["<unk>"]) for word in text],
                                        smallest_type(len(vocabulary))))
              for text in (train, valid)]
    return Text(*tokens, vocabulary, "word", f"{source} and {other}")


def words(text):
    """A text's words, with `<eos>` for each end of a line (also of an empty one), as published."""
    return [word for line in io.StringIO(text) for word in (*line.split(), "<eos>")]


def spell(tokens, text):
    """The text that tokens, numbers in text.vocabulary, stand for."""
    parts = [text.vocabulary[i] for i in tokens]
    if text.unit == "character":
        return "".join(parts)
    return " ".join(parts).replace(" <eos>", "\n").replace("<eos>", "\n").replace("\n ", "\n")


def find_wikitext(folder, archive, files):
    """See to it that the folder has the files, or that there is the archive."""
    def missing():
        return [file for file in files if not (archive.exists() or (folder / file).is_file())]
    if not missing():
        return
    hint = (f"Put {' and '.join(files)} into {folder} or {archive.name} into {archive.parent} by "
            "hand, choose files that are there with --train_file and --valid_file, or use "
            "--dataset grammar, which needs no download.")
    if not set(missing()) <= set(WIKITEXT):
        raise DataError(f"{folder} lacks {', '.join(missing())}. {hint}")
    with one_at_a_time(folder):
        try:
            for file in missing():  # none if another process was faster
                fetch_any(MIRRORS[f"wikitext2/{file}"], folder,
                          f"{file} of wikitext2 could not be downloaded.", hint)
        except DataError as error:
            problem = "\n".join(str(error).splitlines()[:-1])    # without the hint
            fetch_any(MIRRORS["wikitext2"], archive.parent, f"{problem}\nThe archive neither.",
                      hint)


def read_wikitext(folder, archive, file):
    """(text, where from): what lies in the folder is the user's, and comes first."""
    path = folder / file
    if path.is_file():
        known = file in WIKITEXT and matches(path, FILES[file][1])
        how = "checksum verified" if known else "not as published"
        return decode(path.read_bytes(), path), f"{path} ({how})"
    verify(archive)
    name = f"wikitext-2/wiki.{file.removesuffix('.txt')}.tokens"
    with zipfile.ZipFile(archive) as members:
        if name not in members.namelist():
            raise DataError(f"{archive} does not contain {name}; choose from "
                            f"{', '.join(WIKITEXT)}.")
        return decode(members.read(name), archive), f"{name} in {archive} (checksum verified)"


def write_grammar():
    """A text of invented words, 365,132 characters, the same on all machines.

    What there is to learn, from easy to hard: spelling; which words are frequent and which
    stand where; that verbs agree with their subject's number across a clause in between; and
    the name of a paragraph's hero, drawn anew for each and only to be copied.
    """
    rng = np.random.Generator(np.random.PCG64(GRAMMAR_SEED))

    def pick(items):             # the first ones more often
        u = rng.random()
        return items[int(len(items) * (u * u))]

    def invent(syllables):
        return "".join("bdfgklmnprstv"[rng.integers(13)] + "aeiou"[rng.integers(5)]
                       for _ in range(syllables))

    nouns, verbs, adjectives = ([invent(2 + i % 2) for i in range(n)] for n in (60, 40, 30))

    def noun_phrase(plural):
        phrase = ["some" if plural else "a"]
        if rng.random() < 0.4:
            phrase.append(pick(adjectives) + "l")
        return phrase + [pick(nouns) + ("n" if plural else "")]

    def sentence(hero):
        plural = rng.random() < 0.5
        named = rng.random() < 0.4
        subject = [hero] if named else noun_phrase(plural)
        ending = "t" if plural and not named else "s"       # the verb's, for its subject's number
        if rng.random() < 0.3:
            subject += ["that", pick(verbs) + ending, *noun_phrase(rng.random() < 0.5)]
        goal = [hero] if not named and rng.random() < 0.3 else noun_phrase(rng.random() < 0.5)
        return " ".join(subject + [pick(verbs) + ending] + goal) + "."

    lines = []
    for _ in range(1500):            # paragraphs
        hero = invent(3).capitalize()
        lines.append(" ".join(sentence(hero) for _ in range(3 + int(rng.integers(8)))))
    return "\n".join(lines) + "\n"


def num_windows(tokens, context):
    """How many training windows of `context` tokens, each with the token after it, fit."""
    return max(0, (len(tokens) - context) // context)


def windows(tokens, context, batch_size, *, seed, epoch):
    """Yield the batches (x, y), each (batch_size, context) int64, of one pass over the text.

    y is x one token on. The text is cut into windows that begin at a random offset, so that each
    epoch cuts elsewhere, and shuffled; `seed` and `epoch` alone decide. What is left over (fewer
    than `context` tokens at either end, fewer windows than a batch) is not used.
    """
    state = np.random.SeedSequence((seed, epoch)).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    offset = int(torch.randint(context, (), generator=generator))
    count = num_windows(tokens, context)
    starts = offset + context * torch.randperm(count, generator=generator)
    inside = torch.arange(context + 1)
    for chunk in starts.split(batch_size):
        if len(chunk) == batch_size:
            both = tokens[(chunk[:, None] + inside).to(tokens.device)].long()  # (B, context + 1)
            yield both[:, :-1], both[:, 1:]


def all_windows(tokens, context, batch_size):
    """Yield batches (x, y) that predict every token but the first exactly once, in order.

    x and y are (up to batch_size, context); the last one is the rest, (1, less than context).
    """
    step = batch_size * context
    whole = (len(tokens) - 1) // context * context
    for i in range(0, whole, step):
        both = tokens[i:min(i + step, whole) + 1].long()
        yield both[:-1].view(-1, context), both[1:].view(-1, context)
    if len(tokens) - 1 > whole:
        both = tokens[None, whole:].long()
        yield both[:, :-1], both[:, 1:]
