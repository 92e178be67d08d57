"""Doorway to the networks of rewardlib: the reward MLP, its losses and its training.

    from networks import MLP, BT_MLP, CLF_MLP

Published code of this field keeps its MLP in networks.py. The code itself is in rewardlib.nets and,
for the two estimators BT_MLP and CLF_MLP, in rewardlib.models.mlp.
"""

from rewardlib.models.mlp import BT_MLP, CLF_MLP
from rewardlib.nets.gate import Gate, gated_rewards, predict_gate, train_gate
from rewardlib.nets.mlp import MLP, choose_precision, predict
from rewardlib.nets.student import train_student
from rewardlib.nets.training import LOSSES, Training, bt_loss, clf_loss, train, train_ensemble

__all__ = [
    "BT_MLP",
    "CLF_MLP",
    "LOSSES",
    "MLP",
    "Gate",
    "Training",
    "bt_loss",
    "choose_precision",
    "clf_loss",
    "gated_rewards",
    "predict",
    "predict_gate",
    "train",
    "train_ensemble",
    "train_gate",
    "train_student",
]
