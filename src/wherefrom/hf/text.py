"""From text to sequences of tokens, and Hugging Face models by name.

Nothing here knows of the engine, and nothing there needs this module: `transformers` and `datasets` (the `text` extra)
are imported where they are used, since the engine runs on torch alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from wherefrom.hf.refusals import refuse_imports, refuse_kernels
from wherefrom.runtime.errors import InputError, check_argument, first_line, require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# A file's ending, and the builder of the `datasets` library that reads it.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
FILES = (".txt", *BUILDERS)

TEXTS_PER_GROUP = 1000  # the `datasets` library's batch size, which the published blocks were cut with


def read_dataset(source: str, split: str = "train") -> Dataset:
    """Read a file, a saved dataset or a dataset on the Hugging Face hub.

    Args:
        source: one of
            - a `.txt` file in UTF-8, whose texts are separated by blank lines: the column `text`;
            - a `.jsonl`, `.json`, `.parquet` or `.csv` file;
            - a directory written by `save_to_disk` of the `datasets` library;
            - a hub name, with or without a configuration: `owner/name`, `owner/name/config`, or `name/config` as in
              `wikitext/wikitext-2-raw-v1`.
        split: the split to read of a saved or hub dataset; a file has one split, whatever this says.
    """
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


def chosen_split(splits: Mapping[str, Dataset], split: str, called: str) -> Dataset:
    """One split of several; refuses another, by what they are `called`."""
    if split not in splits:
        raise InputError(f"split={split!r}: {called} has the splits {sorted(splits)}; choose one of them.")
    return splits[split]


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
    check_argument(block_size >= 2, "block_size", block_size, "2 or more: a sequence needs a next token to predict")
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
            "block; choose a smaller size, or one sequence for each text."
        )
    return _sequences(blocks, tokenizer)


@dataclass(frozen=True)
class ModelLoading:
    """How a model's weights are loaded.

    Attributes:
        dtype: of the weights. A checkpoint's own is often bfloat16, which is coarse for factors.
        quantization: "4bit" (NF4) or "8bit", by bitsandbytes: the base of an adapter that was trained so. In Python
            also transformers' `BitsAndBytesConfig`.
        device_map: where the parts of a large model go, as in transformers: "auto" spreads them over all GPUs.
        trust_remote_code: run Python code that comes with the model. Only for a model whose author you trust.
    """

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    quantization: Literal["4bit", "8bit"] | None = None
    device_map: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_argument(
            self.dtype in ("float32", "bfloat16", "float64"), "dtype", self.dtype, "float32, bfloat16, float64"
        )
        fits = not isinstance(self.quantization, str) or self.quantization in ("4bit", "8bit")
        check_argument(fits, "quantization", self.quantization, "4bit, 8bit or a BitsAndBytesConfig")

    def check_installed(self) -> None:
        """Refuse what needs a library that is not installed, with an `InputError`."""
        if self.quantization is not None and find_spec("bitsandbytes") is None:
            raise InputError("A model in 4 or 8 bits needs bitsandbytes: pip install bitsandbytes accelerate.")
        if self.quantization is not None or self.device_map is not None:
            require("accelerate", "lora")

    def options(self, config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
        """What transformers' `from_pretrained` is given."""
        quantization: Any = self.quantization
        dtype = getattr(torch, self.dtype)
        if isinstance(quantization, str):
            given = {"4bit": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}, "8bit": {}}[quantization]
            made = require("transformers").BitsAndBytesConfig
            quantization = made(**{f"load_in_{quantization}": True}, **given)
        quantized = quantization is not None or getattr(config, "quantization_config", None) is not None
        placed = self.device_map or ({"": device} if quantized else None)  # quantized weights cannot always be moved
        found = {"dtype": dtype, "quantization_config": quantization, "device_map": placed}
        return {name: value for name, value in found.items() if value is not None}


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub name.

    As `transformers.AutoTokenizer`, but answers within seconds, in one line, when the hub cannot be reached or the
    directory is no model.
    """
    tokenizer: PreTrainedTokenizerBase = _pretrained("AutoTokenizer", name, trust_remote_code=trust_remote_code)
    if not tokenizer.vocab_size:  # what transformers makes of a directory without the tokenizer's files
        raise InputError(f"{name}: holds a model but no tokenizer; save the tokenizer there or name another one.")
    return tokenizer


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model directory or hub name, with the errors of `load_tokenizer`."""
    config: PreTrainedConfig = _pretrained("AutoConfig", name, trust_remote_code=trust_remote_code)
    refuse_kernels(name, config)
    return config


def load_model(
    name: str,
    auto_class: str = "AutoModelForCausalLM",
    loading: ModelLoading = ModelLoading(),
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> PreTrainedModel:
    """Load a model in evaluation mode from a model directory or hub name, with the errors of `load_tokenizer`.

    Args:
        loading: how; by default in float32, which the class of transformers would take from the checkpoint.
        device: where it goes, unless `loading` has a `device_map`.
    """
    config = load_config(name, loading.trust_remote_code)
    options = loading.options(config, device)
    trust = loading.trust_remote_code
    model: PreTrainedModel = _pretrained(auto_class, name, config=config, trust_remote_code=trust, **options)
    model.train(False)
    return model if "device_map" in options else torch.nn.Module.to(model, device)


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
    return chosen_split(saved, split, str(path)) if isinstance(saved, Mapping) else saved


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


# The hub


def _pretrained(auto_class: str, name: str, **options: Any) -> Any:
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
                f"{path} brings Python code of its own, which is not run. If you trust it, pass trust_remote_code=True."
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
