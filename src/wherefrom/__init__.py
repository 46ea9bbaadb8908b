"""Which training examples made a PyTorch model do what it did: influence functions on Kronecker-factored curvature."""

from wherefrom.curvature import Factors
from wherefrom.errors import WherefromError
from wherefrom.fingerprint import LIBRARY as __version__  # noqa: N811
from wherefrom.ranks import join_ranks
from wherefrom.sampling import Sampler
from wherefrom.scores import Hit, Scores, TopScores
from wherefrom.study import Study
from wherefrom.task import CausalLM, Classification, Regression, Task
from wherefrom.tokens import TokenScores

__all__ = [
    "CausalLM",
    "Classification",
    "Factors",
    "Hit",
    "Regression",
    "Sampler",
    "Scores",
    "Study",
    "Task",
    "TokenScores",
    "TopScores",
    "WherefromError",
    "__version__",
    "join_ranks",
]
