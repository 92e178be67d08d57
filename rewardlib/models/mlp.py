"""The reward MLP as scikit-learn estimators: BT_MLP and CLF_MLP, also importable from networks."""

import numpy as np
import torch
import torch.nn.functional as F

from rewardlib.models.base import RewardModel
from rewardlib.nets import mlp
from rewardlib.nets.training import Training, default_batch_size, train_ensemble


class _PairwiseMLP(RewardModel):
    """One reward MLP, fitted to preference pairs; see BT_MLP and CLF_MLP.

    hidden: sizes of the two hidden layers. epochs, learning_rate, patience: as in nets.training.
    batch_size: pairs per step; None: default_batch_size. validation_share: share of the groups of
    pairs (without groups, of the pairs) that chooses the best epoch; 0 keeps the last epoch.
    precision: "fp32", "bf16" or "auto", as in nets.mlp.choose_precision.
    """

    def __init__(
        self,
        hidden: tuple[int, int] = mlp.HIDDEN,
        epochs: int = 2,
        learning_rate: float = 1e-3,
        batch_size: int | None = None,
        patience: int = 5,
        validation_share: float = 0.1,
        precision: str = "auto",
        random_state: int | None = 0,
    ):
        self.hidden = hidden
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.patience = patience
        self.validation_share = validation_share
        self.precision = precision
        self.random_state = random_state

    def _fit(self, rows, index, labels, groups):
        rows = _writable(rows).to(self._type())
        rng = np.random.default_rng(self.random_state)
        n_held = round(self.validation_share * (groups.max() + 1))
        held = np.isin(groups, rng.permutation(groups.max() + 1)[:n_held])
        member = (np.flatnonzero(~held), np.flatnonzero(held), int(rng.integers(2**62)))
        batch_size = self.batch_size or default_batch_size(len(member[0]))
        settings = Training(self.epochs, self.learning_rate, batch_size, self.patience)
        trained = train_ensemble(
            rows, index, labels, [member], self._objective, settings, self.hidden
        )
        self.model_, self.log_ = next(trained)

    def _score(self, rows):
        return mlp.predict(self.model_, _writable(rows), self._type())

    def _type(self):
        return mlp.TYPES[mlp.choose_precision(self.precision)]

    def features(self, embeddings: np.ndarray) -> np.ndarray:
        """Activations of the last hidden layer: (N, K, H) of (N, K, D), or (M, H) of (M, D)."""

        def last_hidden(rows):
            with torch.inference_mode():
                x = F.relu(self.model_.fc1(_writable(rows)))
                return F.relu(self.model_.fc2(x)).numpy()

        return self._by_rows(last_hidden, embeddings)

    def output_weights(self) -> np.ndarray:
        """Weights (H,) with which the last hidden layer enters the score."""
        return self.model_.fc3.weight.detach().numpy()[0].astype(float)


def _writable(rows):
    """Tensor of rows (m, D), which are copied only where they are read-only, as torch needs."""
    return torch.from_numpy(np.require(rows, requirements="W"))


class BT_MLP(_PairwiseMLP):
    """Bradley-Terry reward model: P(side 0 preferred) = sigmoid(s_0 - s_1).

    arXiv 2411.04991, section 3. Parameters as in _PairwiseMLP.
    """

    _objective = "bt"


class CLF_MLP(_PairwiseMLP):
    """Classification reward model: preferred or not, response by response; the logit is the score.

    arXiv 2411.04991. Parameters as in _PairwiseMLP.
    """

    _objective = "clf"
