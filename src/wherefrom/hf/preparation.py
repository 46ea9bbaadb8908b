"""From files and datasets of raw examples (texts, prompts, conversations) to datasets of token sequences.

The one place where examples are read for the command and for `study_from_pretrained`. What examples look like is
`formats`', how they become tokens `encoding`'s; this module knows nothing of models, tasks or the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

from wherefrom.engine.loading import indexed
from wherefrom.hf.encoding import Encoder
from wherefrom.hf.formats import Count, Example, Format, Reading, Target, readable, recognized
from wherefrom.hf.text import as_blocks, chosen_split, read_dataset
from wherefrom.runtime.errors import InputError, check_argument, first_line, require
from wherefrom.store.fingerprint import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("wherefrom")

RawExamples = str | Path | Sequence[str] | Dataset[object]

_LONGEST_BLOCK = 1024  # as transformers' own script for language models has it
_SHOWN = ("title", "label")  # columns that reports show
_COUNTED: Mapping[Count, str] = {
    "all": "all tokens are counted",
    "completion": "the completion's tokens are counted",
    "assistant": "the assistant's tokens are counted",
}
_COUNTED_OTHERWISE: Mapping[Target, str] = {
    "masked": "15% of its tokens are masked and counted",
    "classification": "its label is counted",
    "tokens": "the label of each word is counted",
    "preference": "the completions are judged",
    "reward": "the rewards of both are compared",
}


@dataclass(frozen=True)
class Preparation:
    """How raw examples become token sequences.

    Attributes:
        format: what examples are; found by their columns unless given.
        column: the column that holds the text or the conversation; that of the format, or the only one of strings.
        count: the tokens whose loss is meant: "all"; those of the "completion", of a conversation its last answer; or
            those of all turns of the "assistant". By default the completion's, the assistant's, and all of a text.
        unit: one sequence a document, or all text joined and cut into blocks.
        max_length: the longest sequence, or the length of each block, in tokens; what the model takes by default, and
            of blocks no more than 1024.
        end_token: put the end-of-sequence token after a text or completion, as TRL does.
        source_column: the column that says where an example comes from; by default the file, if there are several.
    """

    format: Format | None = None
    column: str | None = None
    count: Count | None = None
    unit: Literal["documents", "blocks"] = "documents"
    max_length: int | None = None
    end_token: bool = True
    source_column: str | None = None

    def __post_init__(self) -> None:
        choices = {"format": (*get_args(Format), None), "count": (*get_args(Count), None)}
        for name, known in {**choices, "unit": ("documents", "blocks")}.items():
            value = getattr(self, name)
            check_argument(value in known, name, value, f"one of {', '.join(map(str, known))}")
        if self.max_length is not None:
            fits = self.max_length >= 2
            check_argument(fits, "max_length", self.max_length, "2 or more: a sequence needs a next token to predict")
        if self.unit == "blocks" and (self.source_column or self.format not in (None, "text")):
            raise InputError("unit='blocks' joins texts: expected no source_column, and no format but 'text'.")

    def prepare(
        self,
        sources: Sequence[Source],
        target: Target = "causal",
        tokenizer: PreTrainedTokenizerBase | None = None,
        longest: int | None = None,
    ) -> Dataset[object]:
        """Token sequences, in the order of the examples; those that are tokenised stay as they are.

        Args:
            sources: what `read_examples` has read.
            target: what the model predicts.
            tokenizer: the model's; None where only tokenised examples are to be prepared.
            longest: how many tokens the model takes; None when nothing says so.

        Returns:
            A dataset with the columns of the task; for readers `text`, in which the answer to a prompt begins at the
            character `answer_start`, and `title` and `label` where there are any; and, of several sources, their names
            in `source`.

        Raises:
            InputError: there is not what the target needs.
        """
        found: list[Example] = []
        for source in sources:
            reading = recognized(target, source.examples[0], self.format, self.column)
            with _in_utf8(source.called):
                encoded = self._prepared(source, reading, target, tokenizer, longest)
            if not reading.counts and not source.name and self.source_column is None:
                return cast(Dataset[object], source.examples)
            for number, example in enumerate(encoded):
                name = source.name if self.source_column is None else source.examples[number].get(self.source_column)
                if name is None:
                    raise InputError(
                        f"Example {number} of {source.called} has no {self.source_column!r}; leave it out."
                    )
                found.append({**example, "source": str(name)} if name else example)
        names = dict.fromkeys(chain.from_iterable(found))
        table = {name: [example.get(name) for example in found] for name in names}
        made: Dataset[object] = require("datasets").Dataset.from_dict(table)
        return made

    def _prepared(
        self,
        source: Source,
        reading: Reading,
        target: Target,
        tokenizer: PreTrainedTokenizerBase | None,
        longest: int | None,
    ) -> Iterable[Example]:
        """The examples of one source, prepared; says what they were taken for, and what was lost."""
        counts = reading.counts if target == "causal" else reading.counts[:1]
        if self.count not in (None, *counts):
            expected = " or ".join(map(repr, counts)) or "labels, or a mask, in the examples"
            raise InputError(f"count={self.count!r} of {reading.called}: expected {expected}.")
        examples = (source.examples[number] for number in range(len(source.examples)))
        if not counts:
            return examples
        count = self.count or counts[0]
        used = {*reading.columns, *reading.also, *_SHOWN, "labels", self.source_column}
        unused = ", ".join(sorted(source.examples[0].keys() - used))
        logger.info(
            f"Read {source.called} as {reading.called}: {_COUNTED_OTHERWISE.get(target) or _COUNTED[count]}"
            f"{unused and f'; not used: {unused}'}."
        )
        if tokenizer is None:
            raise InputError(
                f"{source.called} has text, and the model's directory no tokenizer: pass tokenizer=, or examples with "
                "'input_ids'."
            )
        if self.unit == "blocks":
            if reading.called != "text" or target != "causal":
                raise InputError(f"unit='blocks' of {reading.called}: expected text for a causal language model.")
            size = self.max_length or min(longest or _LONGEST_BLOCK, _LONGEST_BLOCK)
            blocks: Iterable[Example] = as_blocks(
                [each[reading.columns[0]] or "" for each in examples], tokenizer, size
            )
            return blocks
        encoder = Encoder(target, tokenizer, self.max_length or longest, self.end_token, count)
        found = [_encoded(encoder, reading, each, number, source.called) for number, each in enumerate(examples)]
        for what, numbers in encoder.notes.items():
            logger.warning(
                f"{len(numbers):,} of the {len(found):,} examples of {source.called} {what}; the first is {numbers[0]}."
            )
        return found


class Source(NamedTuple):
    """Examples that are dicts, from one place.

    Attributes:
        name: of one of several; empty where it is alone.
        place: the file, saved dataset or hub name that they were read from; empty where they were given themselves.
    """

    name: str
    place: str
    examples: Dataset[Example]

    @property
    def called(self) -> str:
        """By messages."""
        return self.place or self.name or "the dataset"


def read_examples(given: RawExamples | Mapping[str, RawExamples], split: str = "train") -> list[Source]:
    """Read examples: dicts, or texts, which become dicts with a `text`, or where they are; or several by their names.

    Args:
        given: examples, or a file, a saved dataset or a hub name, as `text.read_dataset` takes them; or a mapping of
            names to these.
        split: of a saved or hub dataset, or of several that are given.

    Raises:
        InputError: there are none, or they are neither.
    """
    if isinstance(given, Mapping) and not isinstance(given, require("datasets").DatasetDict):
        indexed("The dataset", [*given])  # refuses to have no sources
        return [one._replace(name=name) for name, each in given.items() for one in read_examples(each, split)]
    place, data = "", cast(Any, given)
    if isinstance(given, str | Path):
        place, data = str(given), read_dataset(str(given), split)
    elif isinstance(given, Mapping):
        data = chosen_split(given, split, "The dataset")
    examples: Any = indexed("The dataset", data)
    with _in_utf8(place or "the dataset"):
        first = examples[0]
    if isinstance(first, str):
        return [Source("", place, [{"text": text} for text in examples])]
    if not isinstance(first, Mapping):
        raise InputError(f"The dataset has examples of type {type(first).__name__}: expected dicts or texts.")
    return [Source("", place, examples)]


@contextmanager
def _in_utf8(called: str) -> Iterator[None]:
    """Within it, texts are read, which may have been written in something else."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{called}: not UTF-8 text ({error}); convert the file to UTF-8.") from error


def _encoded(encoder: Encoder, reading: Reading, example: Example, number: int, called: str) -> Example:
    """One example, with what readers are shown of it."""
    which = f"Example {number} of {called}"
    lacking = next((name for name in reading.columns if example.get(name) is None), None)
    if lacking is not None:
        raise InputError(f"{which} has no {lacking!r}; leave it out.")
    try:
        content = reading.read(example, reading.columns[0])
        encoded = encoder.encode(content, example, number)
        said = {} if "text" in encoded else readable(content)
    except InputError as error:
        raise InputError(f"{which}: {error}") from error
    except Exception as error:  # whatever tokenizers, chat templates and json make of examples that are not theirs
        raise InputError(
            f"{which} makes no tokens ({type(error).__name__}: {first_line(error)}). Check its columns "
            f"{', '.join(reading.columns)}, and the tokenizer's chat template."
        ) from error
    if not encoded.get("input_ids", True):
        raise InputError(f"{which} has no token; leave it out.")
    shown = {name: example[name] for name in _SHOWN if example.get(name) is not None and name not in encoded}
    return {**shown, **said, **encoded}
