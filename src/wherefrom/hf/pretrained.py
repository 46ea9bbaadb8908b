"""From a Hugging Face checkpoint directory and a dataset to a study.

This module is above `study`: it reads what a `Trainer` or TRL's `SFTTrainer` has saved, a whole model or an adapter,
and chooses the task that its architecture was trained for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from wherefrom.hf.preparation import Preparation, RawExamples, Target, read_examples
from wherefrom.hf.refusals import ADAPTER, refuse_imports
from wherefrom.hf.text import load_config, load_model, load_tokenizer, local_path
from wherefrom.runtime.distributed import join_ranks
from wherefrom.runtime.errors import InputError, first_line, require
from wherefrom.runtime.placement import execution_device
from wherefrom.store.files import read_json
from wherefrom.store.fingerprint import Dataset
from wherefrom.study import Study
from wherefrom.tasks.classification import SequenceClassification, TokenClassification
from wherefrom.tasks.language import CausalLM, MaskedLM, Seq2Seq
from wherefrom.tasks.preference.tasks import Preference, RewardModel
from wherefrom.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What LoRA trains; the layers that it adapts are frozen.
_ADAPTER_LAYERS = ("*.lora_A.*", "*.lora_B.*")


class PretrainedStudy(Study[Any]):
    """A study that prepares queries as it has prepared its training examples."""

    def __init__(
        self,
        path: str | Path,
        model: PreTrainedModel,
        task: Task[Any],
        *,
        train: RawExamples,
        preparation: Preparation,
        **options: Any,
    ) -> None:
        super().__init__(path, model, task, train=preparation.prepare(train), **options)
        self._preparation = preparation

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, for `report`."""
        return self._preparation.tokens

    def prepare(self, examples: RawExamples, split: str = "train") -> Dataset[object]:
        """Make queries of examples like those that `study_from_pretrained` takes for training, in their order.

        Args:
            split: of a saved or hub dataset.

        Raises:
            InputError: there are no examples, or not the columns that the task needs.
        """
        return self._preparation.prepare(examples, split)


def study_from_pretrained(
    folder: str | Path,
    train: RawExamples,
    *,
    run: str | Path | None = None,
    base: PreTrainedModel | None = None,
    task: Task[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    end_token: bool = True,
    device: str | torch.device | None = None,
    **options: Any,
) -> PretrainedStudy:
    """Make a study of a checkpoint, or of a model on the hub, and the dataset that it was trained on.

    Args:
        folder: what `save_pretrained`, a Trainer or TRL's SFTTrainer has written: a whole model, or a peft adapter, of
            which the adapter's own layers are tracked unless the task names others; or a hub name.
        train: examples, or the name of a file or saved dataset of them. They have `input_ids`, and stay as they are, or

            - for a causal language model: `messages`; `prompt` and `completion`, of which the completion is counted;
              or `text`. Of messages, the assistant's turns are counted if the chat template marks them;
            - for a masked language model: `text`, of which 15% of the tokens are masked;
            - for an encoder-decoder: `prompt` and `completion`;
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
        max_length: texts are cut off after so many tokens; None is what the model can take.
        end_token: put the end-of-sequence token after a text or completion, as TRL does.
        device: None is where `base` is, or else a GPU if there is one, under torchrun this process's own.
        **options: of `Study`: history, execution.

    Raises:
        InputError: the folder holds no model, the architecture has no task here, or the examples lack columns.
        LayerError: no layer can be tracked.
    """
    if base is not None and device is None:
        device = execution_device(base)
    device, adapted = checked_device(device), _adapted_model(folder)
    if run is None and not Path(folder).is_dir():
        raise InputError(f"run=None with the model {str(folder)!r}, which is no folder: expected a run directory.")
    if base is not None and adapted is None:
        raise InputError(f"base is given, and {str(folder)!r} holds no adapter ({ADAPTER}): give base=None.")
    name = str(adapted or folder)
    config = load_config(name) if base is None else base.config
    train = read_examples(train)
    kind = _kind(config, task, train[0])
    tokenizer = tokenizer or _tokenizer([str(folder), *([adapted] if adapted else [])])
    preparation = Preparation(kind.target, tokenizer, max_length or _longest(config, tokenizer), end_token)
    model = load_model(name, kind.auto_class) if base is None else base
    task = task or _default_task(kind, config)
    if adapted is not None:
        model = _with_adapter(model, folder)
        if task.layers is None:
            task = copy.copy(task)
            task.layers = _ADAPTER_LAYERS
    torch.nn.Module.to(model, device)
    return PretrainedStudy(
        run or Path(folder, "wherefrom"), model, task, train=train, preparation=preparation, **options
    )


def checked_device(device: str | torch.device | None) -> torch.device:
    """A device that a model can be on; None is a GPU if there is one, under torchrun this process's own.

    Raises:
        InputError: it is not available, or holds no numbers.
    """
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
# Encoder-decoders come first: some of them can also fill masks.
_KINDS = (
    _Kind("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "seq2seq", Seq2Seq),
    _CAUSAL,
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


def _default_task(kind: _Kind, config: PreTrainedConfig) -> Task[Any]:
    if kind.task is Preference:
        raise InputError(
            "The dataset has pairs of chosen and rejected completions, and nothing says with which loss the model was "
            "trained on them: give task=wf.Preference(wf.DPO(beta=...), reference=...), or another of its losses."
        )
    if kind.task in (SequenceClassification, RewardModel):
        return kind.task(pad_token=getattr(config, "pad_token_id", None) or 0)
    return kind.task()


def _kind(config: PreTrainedConfig, task: Task[Any] | None, example: Mapping[str, object]) -> _Kind:
    """The kind of model that a task is for; of another task or none, the kind of the architecture and the example."""
    for kind in (*_KINDS, *_PAIRED.values()):
        if isinstance(task, kind.task):
            return kind
    architecture = (config.architectures or ["none"])[0]
    auto = require("transformers.models.auto.modeling_auto")
    for kind in _KINDS:
        if architecture in getattr(auto, kind.architectures).values():
            alone = example.keys() & {"input_ids", "messages", "text", "completion"}  # what is trained on without pairs
            paired = not alone and bool(example.keys() & {"rejected", "rejected_ids"})
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


def _tokenizer(names: list[str]) -> PreTrainedTokenizerBase | None:
    """The first tokenizer that is there; without one, tokenised examples can still be studied."""
    for name in names:
        try:
            return load_tokenizer(name)
        except InputError:
            continue
    return None


def _longest(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """How many tokens the model can take; None when nothing says so."""
    # A tokenizer that knows no limit says 1e30.
    known = [getattr(config, "max_position_embeddings", None), tokenizer and tokenizer.model_max_length]
    return min((int(each) for each in known if each and each < 1e9), default=None)
