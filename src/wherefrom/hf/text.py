"""From text to sequences of tokens, and Hugging Face models by name.

Nothing here knows of the engine, and nothing there needs this module: `transformers` and `datasets` (the `text` extra)
are imported where they are used, since the engine runs on torch alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wherefrom.hf.refusals import refuse_imports, refuse_kernels
from wherefrom.runtime.errors import InputError, check_argument, first_line, require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# A file's ending, and the builder of the `datasets` library that reads it.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
FILES = (".txt", *BUILDERS)

_STRING_TYPES = ("string", "large_string")

TEXTS_PER_GROUP = 1000  # the `datasets` library's batch size, which the published blocks were cut with


def read_texts(source: str, *, split: str = "train", column: str | None = None) -> list[str]:
    """Read the texts of a file, of a saved dataset or of a dataset on the Hugging Face hub.

    Args:
        source: one of
            - a `.txt` file in UTF-8, whose texts are separated by blank lines;
            - a `.jsonl`, `.json`, `.parquet` or `.csv` file, one text an example;
            - a directory written by `save_to_disk` of the `datasets` library;
            - a hub name, with or without a configuration: `owner/name`, `owner/name/config`, or `name/config` as in
              `wikitext/wikitext-2-raw-v1`.
        split: the split to read of a saved or hub dataset; a file has one split, whatever this says.
        column: the column that holds the text. None takes `text`, or else the only column of strings.

    Returns:
        The texts in their order. Empty ones stay, as empty strings: `as_blocks` counts them.
    """
    dataset = read_dataset(source, split)
    strings = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", None) in _STRING_TYPES]
    if column is None:
        column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column not in strings:
        wanted = "no column named text" if column is None else f"column={column!r} is not a column of strings"
        raise InputError(
            f"{source}: {wanted}; columns of strings: {strings}, all columns: {dataset.column_names}. Pass column=NAME."
        )
    try:
        texts = [text or "" for text in dataset[column]]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: column {column!r} is not UTF-8 text ({error}); convert the file to UTF-8."
        ) from error
    if not any(texts):
        raise InputError(f"{source}: column {column!r} holds no text in {len(texts)} examples.")
    return texts


def read_dataset(source: str, split: str = "train") -> Dataset:
    """Read a file, a saved dataset or a dataset on the Hugging Face hub, as `read_texts` does, with all its columns."""
    path = local_path(source)
    if path.is_dir():
        return _saved_dataset(path, split)
    if path.suffix == ".txt" and path.is_file():
        return require("datasets").Dataset.from_dict({"text": _paragraphs(path)})
    if path.is_file():
        return _file_dataset(path)
    if path.suffix in FILES or not _is_hub_name(source):
        raise InputError(
            f"source={source!r}: no such file or directory; "
            f"expected a {', '.join(FILES)} file, a saved dataset or a hub name such as owner/name."
        )
    return _hub_dataset(source, split)


def as_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Make one sequence out of each text, cut off after `max_length` tokens.

    The unit to choose when a text is what a reader would want cited. Nothing is padded: a task pads when it collates.
    A text of fewer than two tokens is left out, because it has no next token to predict and so neither loss nor
    gradient; `document` tells which texts are left.

    Returns:
        A dataset with columns `input_ids`, `attention_mask`, `text` (of these tokens, decoded) and `document` (the
        position in `texts`).
    """
    _check_length("max_length", max_length)
    limit = min(max_length, 2**31)  # what tokenizers can count to
    encoded = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if texts else []
    chosen = [index for index, ids in enumerate(encoded) if len(ids) >= 2 and texts[index].strip()]
    if not chosen:
        raise InputError(f"texts: none of the {len(texts)} has two tokens or more; check the source and the column.")
    dataset = _sequences([encoded[index] for index in chosen], tokenizer)
    return dataset.add_column("document", chosen)


def as_blocks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int, texts_per_group: int = TEXTS_PER_GROUP
) -> Dataset:
    """Join the texts and cut them into blocks of exactly `block_size` tokens, as is usual for GPT-2 and WikiText.

    Texts are joined in groups of `texts_per_group` and the remainder of each group is dropped. With the default that
    makes the published 4656 training and 481 validation blocks of 512 tokens out of WikiText-2 (whose texts are lines,
    empty ones included); with `len(texts)` only one remainder is lost.

    Returns:
        A dataset with columns `input_ids`, `attention_mask` and `text` (the block, decoded).
    """
    _check_length("block_size", block_size)
    check_argument(texts_per_group >= 1, "texts_per_group", texts_per_group, "a positive number; the default is 1000")
    # verbose=False: a text longer than the model's context is no mistake here, it is cut below.
    encoded = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    blocks: list[list[int]] = []
    for start in range(0, len(encoded), texts_per_group):
        tokens = list(chain.from_iterable(encoded[start : start + texts_per_group]))
        blocks += [tokens[at : at + block_size] for at in range(0, len(tokens) - block_size + 1, block_size)]
    if not blocks:
        raise InputError(
            f"block_size={block_size}: the {len(texts)} texts have {sum(map(len, encoded))} tokens, which fill no "
            "block; choose a smaller block_size or use as_documents."
        )
    return _sequences(blocks, tokenizer)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub name.

    As `transformers.AutoTokenizer`, but answers within seconds, in one line, when the hub cannot be reached or the
    directory is no model.
    """
    tokenizer: PreTrainedTokenizerBase = _pretrained("AutoTokenizer", name)
    if not tokenizer.vocab_size:  # what transformers makes of a directory without the tokenizer's files
        raise InputError(f"{name}: holds a model but no tokenizer; save the tokenizer there or name another one.")
    return tokenizer


def load_config(name: str) -> PreTrainedConfig:
    """Load the configuration of a model directory or hub name, with the errors of `load_tokenizer`."""
    config: PreTrainedConfig = _pretrained("AutoConfig", name)
    refuse_kernels(name, config)
    return config


def load_model(name: str, auto_class: str = "AutoModelForCausalLM") -> PreTrainedModel:
    """Load a model in float32 and evaluation mode from a model directory or hub name.

    As the class of transformers does, which would keep the checkpoint's own type, often bfloat16, too coarse for
    factors; and with the errors of `load_tokenizer`.
    """
    config = load_config(name)
    model: PreTrainedModel = _pretrained(auto_class, name, config=config, dtype=torch.float32)
    model.train(False)
    return model


def local_path(name: str) -> Path:
    """A name as a path, whether there is something or not.

    Raises:
        InputError: no file can have this name, or may not be looked at.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, in an unknown user's home
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{name[:80]!r} is no usable path ({reason}); expected the name of a file or directory."
        ) from error
    return path


# Reading


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); convert the file to UTF-8.") from error
    texts = [part.strip("\n") for part in re.split(r"\n(?:[^\S\n]*\n)+", text) if part.strip()]
    if not texts:
        raise InputError(f"{path}: the file holds no text; expected texts separated by blank lines.")
    return texts


def _file_dataset(path: Path) -> Dataset:
    builder = BUILDERS.get(path.suffix)
    if builder is None:
        raise InputError(f"{path}: cannot read {path.suffix or 'this'} files; expected one of {', '.join(FILES)}.")
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty; expected {builder} rows with a column of text.")
    if builder == "json":
        _refuse_null(path)
    datasets = require("datasets")
    try:
        return datasets.load_dataset(builder, data_files=str(path), split="train")
    except Exception as error:  # whatever datasets, pandas and pyarrow make of files that are not theirs
        cause = error.__cause__ or error
        raise InputError(
            f"{path}: cannot be read as {builder} ({first_line(cause)}). Expected rows of the same columns, in UTF-8."
        ) from error


def _refuse_null(path: Path) -> None:
    """Refuse null instead of an object, which pyarrow ends the process on (apache/arrow, issue 47409)."""
    with path.open("rb") as stream:
        if stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):  # one array, which is read in another way
            return
        for number, line in enumerate(stream, 1):
            if line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"null"):
                raise InputError(
                    f"{path}: line {number} is null; expected an object with a column of text. Delete the line."
                )


def _saved_dataset(path: Path, split: str) -> Dataset:
    datasets = require("datasets")
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever datasets and pyarrow make of files that are not theirs
        raise InputError(
            f"{path}: not a dataset written by save_to_disk ({first_line(error)}); expected one, or a file's name."
        ) from error
    if not isinstance(saved, Mapping):
        return saved
    if split not in saved:
        raise InputError(f"split={split!r}: {path} has the splits {sorted(saved)}; choose one of them.")
    return saved[split]


def _hub_dataset(source: str, split: str) -> Dataset:
    datasets = require("datasets")
    owner, _, config = source.rpartition("/")
    # Without asking the hub, owner/name and name/config look the same: the first that exists is meant.
    candidates: list[tuple[str, str | None]] = [(source, None)] if source.count("/") < 2 else []
    candidates += [(owner, config)] if owner else []
    with _hub(source) as reachable:
        for name, configuration in candidates:
            # Without the hub, `datasets` looks for what it has prepared itself, and not for what the hub's client has.
            for place in [name] if reachable else [name, *_snapshots(name)]:
                try:
                    return datasets.load_dataset(place, configuration, split=split)
                except (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError):
                    continue
                except ConnectionError:
                    if reachable:
                        raise
                except ValueError as error:  # a wrong configuration or split; the message lists the right ones
                    raise InputError(f"source={source!r}, split={split!r}: {first_line(error)}") from error
    if not reachable:
        raise _unreachable(f"source={source!r}")
    raise InputError(f"source={source!r}: neither a file here nor a dataset on the hub; check the name.")


def _snapshots(name: str) -> list[str]:
    """The folder of a dataset's files that the hub's client has in its cache, if there is one."""
    hub = require("huggingface_hub")
    try:
        return [hub.snapshot_download(name, repo_type="dataset", local_files_only=True)]
    except (OSError, ValueError):  # not there, or no name of a repository
        return []


# Cutting


def _sequences(sequences: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return require("datasets").Dataset.from_dict(
        {
            "input_ids": sequences,
            "attention_mask": [[1] * len(ids) for ids in sequences],
            "text": tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        }
    )


def _check_length(argument: str, length: int) -> None:
    check_argument(length >= 2, argument, length, "2 or more, since a sequence needs a next token to predict")


# The hub


def _pretrained(auto_class: str, name: str, **options: Any) -> Any:
    # Not left to its default, with which transformers asks on the terminal.
    options = {"trust_remote_code": False, **options}
    path = local_path(name)
    if path.is_dir():
        return _pretrained_directory(auto_class, path, **options)
    if not _is_hub_name(name) or name.count("/") > 1:
        raise InputError(f"{name!r} is neither a directory nor a hub name; expected a path or owner/name.")
    with _hub(name) as reachable:
        try:
            return getattr(require("transformers"), auto_class).from_pretrained(name, **options)
        except ImportError as error:
            raise _lacking(name, error) from error
        except (OSError, ValueError) as error:
            if not reachable:
                raise _unreachable(repr(name)) from error
            raise InputError(f"{name!r} cannot be loaded from the hub: {first_line(error)}") from error


def _pretrained_directory(auto_class: str, path: Path, **options: Any) -> Any:
    # An adapter's directory has a tokenizer and no model.
    needed = ("config.json", *(("tokenizer_config.json",) if auto_class == "AutoTokenizer" else ()))
    if not any((path / name).is_file() for name in needed):
        raise InputError(f"{path}: holds no config.json; expected a model directory written by save_pretrained.")
    refuse_imports(path)
    try:
        return getattr(require("transformers"), auto_class).from_pretrained(str(path), **options)
    except ImportError as error:
        raise _lacking(str(path), error) from error
    except Exception as error:  # whatever transformers, tokenizers and safetensors make of files that are not theirs
        if "custom code" in str(error):
            raise InputError(
                f"{path} brings Python code of its own, which is not run (trust_remote_code). If you trust it, load "
                "the model yourself and give it to wherefrom.Study."
            ) from error
        raise InputError(
            f"{path}: not a complete model directory ({type(error).__name__}: {first_line(error)}). Save the model "
            "and its tokenizer there again, with save_pretrained."
        ) from error


@contextmanager
def _hub(name: str) -> Iterator[bool]:
    """Within it, the hub's clients work from their cache alone if the hub does not answer; tells whether it does.

    Left to themselves they retry for half a minute, with a line for each attempt, before they look into the cache.
    """
    hub = require("huggingface_hub")
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=5)
        reachable = True
    except Exception:  # the client's HTTP library, and so the class of its errors, differs between versions
        reachable = False
    before = hub.constants.HF_HUB_OFFLINE
    hub.constants.HF_HUB_OFFLINE = before or not reachable
    try:
        yield reachable
    finally:
        hub.constants.HF_HUB_OFFLINE = before


def _unreachable(what: str) -> InputError:
    return InputError(
        f"{what}: the Hugging Face hub cannot be reached and no copy is cached; "
        "connect to it, or give a file or directory of yours instead."
    )


def _lacking(name: str, error: ImportError) -> InputError:
    """What is said of a quantized model, for example, whose library is not installed."""
    return InputError(f"{name} cannot be loaded without another package: {first_line(error)}")


def _is_hub_name(source: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*){0,2}", source, re.ASCII) is not None
