"""Which training examples made a PyTorch model do what it did: influence functions on Kronecker-factored curvature."""

from wherefrom.curvature import Factors
from wherefrom.errors import WherefromError
from wherefrom.fingerprint import LIBRARY as __version__  # noqa: N811
from wherefrom.language import CausalLM, ChosenToken, MaskedLM, Seq2Seq, SequenceClassification
from wherefrom.sampling import Sampler
from wherefrom.scores import Hit, Scores
from wherefrom.study import Study
from wherefrom.task import Classification, Regression, Task
from wherefrom.tokens import TokenScores

__all__ = [
    "CausalLM",
    "ChosenToken",
    "Classification",
    "Factors",
    "Hit",
    "MaskedLM",
    "Regression",
    "Sampler",
    "Scores",
    "Seq2Seq",
    "SequenceClassification",
    "Study",
    "Task",
    "TokenScores",
    "WherefromError",
    "__version__",
]
