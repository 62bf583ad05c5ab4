"""Learned masks and objectives: what is trained together with the weights.

A learner is a plain value; ``drive.training.learned.Learned`` puts it to work in a training loop.
"""

from secateur.learn.attacks import Attack, DeepFoolCutoff, Fgsm, Pgd
from secateur.learn.energy import Branches, energy_prune, learned_branches
from secateur.learn.grouped import Grouped
from secateur.learn.grouping import GroupLearning
from secateur.learn.leap import Leap
from secateur.learn.learner import Learner, Learning
from secateur.learn.movement import SoftMovement
from secateur.learn.objectives import Adversarial, Distill, Objectives, Task
from secateur.learn.slimming import Slimming
from secateur.learn.soft_threshold import Str

LEARNERS: dict[str, type[Learner]] = {
    "leap": Leap,
    "soft_movement": SoftMovement,
    "str": Str,
    "slimming": Slimming,
    "group_learning": GroupLearning,
}

__all__ = [
    "LEARNERS",
    "Adversarial",
    "Attack",
    "Branches",
    "DeepFoolCutoff",
    "Distill",
    "Fgsm",
    "GroupLearning",
    "Grouped",
    "Leap",
    "Learner",
    "Learning",
    "Objectives",
    "Pgd",
    "Slimming",
    "SoftMovement",
    "Str",
    "Task",
    "energy_prune",
    "learned_branches",
]
