"""From a Hugging Face checkpoint directory and a dataset to a study.

This module is above `study`: it reads what a `Trainer` or TRL's `SFTTrainer` has saved, a whole model or an adapter,
and chooses the task that its architecture was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from wherefrom.hf.encoding import Encoder
from wherefrom.hf.formats import UNPAIRED, Chat, Pair, Target, answered, recognized
from wherefrom.hf.preparation import Preparation, RawExamples, Source, read_examples
from wherefrom.hf.refusals import ADAPTER, refuse_imports
from wherefrom.hf.text import ModelLoading, load_config, load_model, load_tokenizer, local_path
from wherefrom.runtime.distributed import join_ranks
from wherefrom.runtime.errors import InputError, first_line, require
from wherefrom.runtime.placement import execution_device
from wherefrom.store.files import read_json
from wherefrom.store.fingerprint import Dataset
from wherefrom.study import Study
from wherefrom.tasks.classification import SequenceClassification, TokenClassification
from wherefrom.tasks.language import CausalLM, MaskedLM, Seq2Seq
from wherefrom.tasks.preference.tasks import Preference, RewardModel
from wherefrom.tasks.preference.training import PreferenceTraining
from wherefrom.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Options = TypeVar("Options", Preparation, ModelLoading)


class Pretrained:
    """A checkpoint or a model on the hub and its training examples; its weights are loaded for a study alone.

    Args:
        folder: a model directory, an adapter's, or a hub name.
        train: the training examples.
        base: the model of an adapter, where it is loaded already.
        task: None chooses by the architecture and the examples' columns; of its layers `layers` are tracked.
        tokenizer: None loads that of the folder, or of the adapter's model.
        trained: how, where it was on preferences, and there is no task.
    """

    def __init__(
        self,
        folder: str | Path,
        train: Sequence[Source],
        preparation: Preparation,
        loading: ModelLoading,
        *,
        base: PreTrainedModel | None = None,
        task: Task[Any] | None = None,
        layers: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trained: PreferenceTraining | None = None,
    ) -> None:
        self.folder, self.preparation = folder, preparation
        self._trained = trained if trained and trained.preference else None
        self.sources, self.loading, self._task, self._layers = train, loading, task, layers
        self.base, self._adapted = base, _adapted_model(folder)
        if base is not None and self._adapted is None:
            raise InputError(f"base is given, and {str(folder)!r} holds no adapter ({ADAPTER}): give base=None.")
        self._name = str(self._adapted or folder)
        self._config = load_config(self._name, loading.trust_remote_code) if base is None else base.config
        self._kind = _kind(self._config, task, train[0].examples[0])
        if self._trained is not None:
            if self._kind not in (_CAUSAL, _PAIRED[_CAUSAL]):
                raise InputError(
                    f"preference={self._trained.preference!r} is a loss of causal language models, and {folder} "
                    f"predicts {self._kind.target!r}: leave it out."
                )
            self._kind = _PAIRED[_CAUSAL]
        self.tokenizer = tokenizer or self._found_tokenizer()

    @cached_property
    def train(self) -> Dataset[object]:
        """The training examples, prepared."""
        return self._prepared(self.sources, self.preparation)

    @property
    def target(self) -> Target:
        """What the model predicts."""
        return self._kind.target

    @cached_property
    def longest(self) -> int | None:
        """How many tokens the model can take; None when nothing says so."""
        return _longest(self._config, self.tokenizer)

    def answered(self, prompt: str, answer: str) -> Pair | Chat:
        """A prompt and its answer, in the format of the training examples."""
        first, said = self.sources[0].examples[0], self.preparation
        return answered(recognized(self.target, first, said.format, said.column), first, prompt, answer)

    def encoder(self) -> Encoder:
        """Makes tokens of a prompt and its answer, uncut and without an end.

        Raises:
            InputError: the model writes no answers, or has no tokenizer.
        """
        if self.target not in ("causal", "seq2seq"):
            raise InputError(
                f"{self.folder}: the model predicts {self.target!r}, and so writes no answer: expected a causal "
                "language model or an encoder-decoder. Score queries of its own kind with `wherefrom score`."
            )
        if self.tokenizer is None:
            raise InputError(f"{self.folder}: holds no tokenizer, and a question is a text: save it there.")
        return Encoder(self.target, self.tokenizer, None, False, "completion")

    def column(self, name: str, argument: str = "group") -> list[str]:
        """What each training example has in a column, of its own or of what it was prepared from.

        Args:
            argument: what an error calls the name.

        Raises:
            InputError: there is no such column.
        """
        datasets: list[Dataset[Any]] = [self.train]
        if self.preparation.unit == "documents" and name not in self.train[0]:  # type: ignore[operator]
            datasets = [each.examples for each in self.sources]
        known = datasets[0][0]
        if name not in known:
            raise InputError(f"{argument}={name!r}: the training examples have the columns {', '.join(sorted(known))}.")
        return [str(each[number].get(name)) for each in datasets for number in range(len(each))]

    @cached_property
    def groupings(self) -> list[str]:
        """Columns whose values many examples share, as the first thousand have them: `column` can group by these."""
        datasets: list[Dataset[Any]] = [self.train]
        if self.preparation.unit == "documents":
            datasets.append(self.sources[0].examples)
        found = dict[str, None]()
        for dataset in datasets:
            if not isinstance(dataset[0], Mapping):
                continue
            first = [dataset[number] for number in range(min(1000, len(dataset)))]
            for name in first[0]:
                values = [each.get(name) for each in first]
                words = name != "answer_start" and all(isinstance(each, str | int | None) for each in values)
                if words and 1 < len(set(values)) <= len(first) / 2:
                    found[name] = None
        return list(found)

    def prepare(
        self, examples: RawExamples, split: str = "train", preparation: Preparation | None = None
    ) -> Dataset[object]:
        """Queries, prepared as the training examples unless another preparation is given."""
        as_trained = replace(self.preparation, source_column=None)
        return self._prepared(read_examples(examples, split), preparation or as_trained)

    def study(self, run: str | Path, device: torch.device, **options: Any) -> PretrainedStudy:
        """Load the model and make a study of it and its training examples.

        Args:
            **options: of `Study`.
        """
        task, train = self._task or self.default_task(device), self.train
        model: Any = self.base
        if model is None:
            model = load_model(self._name, self._kind.auto_class, self.loading, device)
        elif device != execution_device(model):  # and one that is spread over devices stays so
            torch.nn.Module.to(model, device)
        if self._adapted is not None:
            model = _with_adapter(model, self.folder)
        return PretrainedStudy(run, model, task, train=train, pretrained=self, **options)

    def default_task(self, device: torch.device) -> Task[Any]:
        """The task that the architecture, the examples and what is said of the training tell."""
        kind, layers = self._kind, self._layers
        if self._trained is not None:
            return self._trained.task(lambda name: load_model(name, loading=self.loading, device=device), layers)
        if kind.task is Preference:
            raise InputError(
                "The dataset has pairs of chosen and rejected completions, and nothing says with which loss the model "
                "was trained on them: give preference='dpo' or another loss, with its numbers and its reference; in "
                "Python task=wf.Preference(wf.DPO(beta=...), reference=...)."
            )
        if kind.task in (SequenceClassification, RewardModel):
            return kind.task(layers, pad_token=getattr(self._config, "pad_token_id", None) or 0)
        return kind.task(layers)

    def _prepared(self, sources: Sequence[Source], preparation: Preparation) -> Dataset[object]:
        return preparation.prepare(sources, self._kind.target, self.tokenizer, self.longest)

    def _found_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The first tokenizer that is there; without one, tokenised examples can still be studied."""
        for name in dict.fromkeys((str(self.folder), self._name)):
            try:
                return load_tokenizer(name, self.loading.trust_remote_code)
            except InputError:
                continue
        return None


class PretrainedStudy(Study[Any]):
    """A study that prepares queries as it has prepared its training examples."""

    def __init__(
        self,
        path: str | Path,
        model: PreTrainedModel,
        task: Task[Any],
        *,
        train: Dataset[object],
        pretrained: Pretrained,
        **options: Any,
    ) -> None:
        super().__init__(path, model, task, train=train, **options)
        self.pretrained = pretrained

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, for `report`.

        Raises:
            InputError: there is none.
        """
        if self.pretrained.tokenizer is None:
            raise InputError(f"{self.pretrained.folder}: holds no tokenizer: pass tokenizer=.")
        return self.pretrained.tokenizer

    def prepare(
        self, examples: RawExamples, split: str = "train", preparation: Preparation | None = None
    ) -> Dataset[object]:
        """Make queries of examples like those that `study_from_pretrained` takes for training, in their order.

        Args:
            split: of a saved or hub dataset.
            preparation: how; as the training examples unless given.

        Raises:
            InputError: there are no examples, or not the columns that the task needs.
        """
        return self.pretrained.prepare(examples, split, preparation)


def study_from_pretrained(
    folder: str | Path,
    train: RawExamples | Mapping[str, RawExamples],
    *,
    run: str | Path | None = None,
    base: PreTrainedModel | None = None,
    task: Task[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> PretrainedStudy:
    """Make a study of a checkpoint, or of a model on the hub, and the dataset that it was trained on.

    Args:
        folder: what `save_pretrained`, a Trainer or TRL's SFTTrainer has written: a whole model, or a peft adapter, of
            which the adapter's own layers are tracked unless the task names others; or a hub name.
        train: examples, or the name of a file, of a saved dataset or on the hub; or a mapping of names to several of
            these, which reports add scores up by. Examples have `input_ids`, and stay as they are, or

            - for a causal language model: `messages` or ShareGPT's `conversations`, of which the assistant's turns are
              counted; `prompt` and `completion`, Alpaca's `instruction`, `input` and `output`, or `question` and
              `answer`, of which the completion is counted; or `text`;
            - for a masked language model: `text`, of which 15% of the tokens are masked;
            - for an encoder-decoder: a prompt and its completion, in one of these formats;
            - for a sequence classifier: `text` and `label` or `labels`; or `chosen` and `rejected`, with `prompt` or
              with the prompt in both, for one that is a reward model;
            - for a token classifier: `tokens`, which are words, and `labels` or `ner_tags`;
            - for `Preference`: `chosen` and `rejected` as for a reward model; for `KTO` `prompt`, `completion` and
              `label`.

            A string is a `text`. Where the model was trained on other tokens than these columns give, pass tokenised
            examples.
        run: the run directory; `folder/wherefrom` by default, where there is a folder.
        base: the model that an adapter was trained on, loaded as it was for that, such as in 4 bits; the adapter is put
            on it. None loads it in float32.
        task: `CausalLM`, `Preference`, `MaskedLM`, `Seq2Seq`, `SequenceClassification`, `RewardModel` or
            `TokenClassification`, whose kind of model is loaded; None chooses by the architecture and the columns, but
            for `Preference`, whose loss they do not tell.
        tokenizer: None loads that of the folder, or of the adapter's model.
        device: None is where `base` is, or else a GPU if there is one, under torchrun this process's own.
        **options: what `Preparation` has (`format`, `column`, `count`, `max_length`, ...), what `ModelLoading` has
            (`dtype`, `quantization`, `device_map`, `trust_remote_code`), and of `Study` the history and execution.

    Raises:
        InputError: the folder holds no model, the architecture has no task here, or the examples lack columns.
        LayerError: no layer can be tracked.
    """
    preparation, loading = _taken(Preparation, options), _taken(ModelLoading, options)
    if run is None and isinstance(folder, str) and not local_path(folder).is_dir():
        raise InputError(f"run=None with the model {folder!r}, which is no folder: expected a run directory.")
    if base is not None and device is None:
        device = execution_device(base)
    device = checked_device(device, loading)
    pretrained = Pretrained(
        folder, read_examples(train), preparation, loading, base=base, task=task, tokenizer=tokenizer
    )
    return pretrained.study(run or Path(folder, "wherefrom"), device, **options)


def _taken(kind: type[Options], options: dict[str, Any]) -> Options:
    """One of the dataclasses that options belong to, of those that it has, which are taken out of them."""
    return kind(**{each.name: options.pop(each.name) for each in fields(kind) if each.name in options})


def checked_device(device: str | torch.device | None, loading: ModelLoading) -> torch.device:
    """A device that a model can be loaded on; None is a GPU if there is one, under torchrun this process's own.

    Raises:
        InputError: it is not available, or holds no numbers; or a library that loading needs is not installed.
    """
    loading.check_installed()
    if device is not None and loading.device_map is not None:
        raise InputError(f"device={device!r} with device_map={loading.device_map!r}: leave one of them out.")
    if device is None:
        return join_ranks()
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        raise InputError(
            f"device={device!r} is not available here ({first_line(error)}). Give 'cpu' or 'cuda'."
        ) from error
    if found.type == "meta":
        raise InputError(
            "device='meta' holds no numbers. Give 'cpu' or 'cuda', or ask `wherefrom plan` what it would cost."
        )
    return found


class _Kind(NamedTuple):
    """One kind of model: how it is loaded, the mapping of transformers that lists it, what it predicts.

    Attributes:
        architectures: the name of a mapping in `transformers.models.auto.modeling_auto`.
        task: what it was trained for.
    """

    auto_class: str
    architectures: str
    target: Target
    task: type[Task[Any]]


_CAUSAL = _Kind("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal", CausalLM)
_CLASSIFIER = _Kind(
    "AutoModelForSequenceClassification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "classification",
    SequenceClassification,
)
_IMAGES = _CAUSAL._replace(
    auto_class="AutoModelForImageTextToText", architectures="MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
)
# Encoder-decoders come first: some of them can also fill masks.
_KINDS = (
    _Kind("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "seq2seq", Seq2Seq),
    _CAUSAL,
    _IMAGES,
    _Kind("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "masked", MaskedLM),
    _CLASSIFIER,
    _Kind(
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "tokens",
        TokenClassification,
    ),
)
# The same models, trained on pairs.
_PAIRED = {
    _CAUSAL: _CAUSAL._replace(target="preference", task=Preference),
    _CLASSIFIER: _CLASSIFIER._replace(target="reward", task=RewardModel),
}


def _kind(config: PreTrainedConfig, task: Task[Any] | None, example: Mapping[str, object]) -> _Kind:
    """The kind of model that a task is for; of another task or none, the kind of the architecture and the example."""
    architecture = (config.architectures or ["none"])[0]
    auto = require("transformers.models.auto.modeling_auto")
    of_task = [kind for kind in (*_KINDS, *_PAIRED.values()) if isinstance(task, kind.task)]
    if of_task:
        known = (kind for kind in of_task if architecture in getattr(auto, kind.architectures).values())
        return next(known, of_task[0])
    for kind in _KINDS:
        if architecture in getattr(auto, kind.architectures).values():
            paired = not example.keys() & UNPAIRED and bool(example.keys() & {"rejected", "rejected_ids"})
            return _PAIRED.get(kind, kind) if paired and task is None else kind
    raise InputError(
        f"The model's architecture is {architecture}: expected a causal or masked language model, an "
        "encoder-decoder, or a classifier of sequences or tokens. For others, load the model and give wherefrom.Study "
        "a Task of your own."
    )


def _adapted_model(folder: str | Path) -> str | None:
    """The model that an adapter belongs to; None where there is no folder with an adapter."""
    if isinstance(folder, Path) and not folder.is_dir():
        raise InputError(f"folder={str(folder)!r}: no such directory; expected a checkpoint that a Trainer has saved.")
    file = local_path(str(folder)) / ADAPTER
    if not file.is_file():
        return None
    refuse_imports(file.parent)
    base = read_json(file, "Save the adapter again.").get("base_model_name_or_path")
    if not base:
        raise InputError(f"{file}: does not name the model that the adapter belongs to (base_model_name_or_path).")
    return str(base)


def _with_adapter(model: PreTrainedModel, folder: str | Path) -> Any:
    peft = require("peft", "lora")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as error:  # whatever peft, torch and safetensors make of files that are not theirs
        raise InputError(
            f"{folder}: not an adapter of its model ({type(error).__name__}: {first_line(error)}). Save the adapter "
            "there again, with save_pretrained."
        ) from error


def _longest(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """How many tokens the model can take; None when nothing says so."""
    # A tokenizer that knows no limit says 1e30.
    known = [getattr(config, "max_position_embeddings", None), tokenizer and tokenizer.model_max_length]
    return min((int(each) for each in known if each and each < 1e9), default=None)
