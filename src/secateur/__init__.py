"""secateur: prune neural networks, and prove what was gained.

**Score** what matters, choose a **pattern**, **allocate** how much goes where, follow a **schedule**,
**recover** the rest.

Example:
    >>> import torch, secateur
    >>> net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> pruned = secateur.prune(net, secateur.recipes.magnitude(0.9))
    >>> f"{pruned.facts.sparsity:.0%}"
    '90%'
"""

from secateur.core.batches import Data
from secateur.core.budget import Target
from secateur.core.errors import SecateurError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.drive import methods as recipes
from secateur.drive.oneshot import prune, prune_
from secateur.drive.plan import plan
from secateur.drive.pruned import Pruned, load
from secateur.drive.recipe import Recipe, Scope
from secateur.drive.recipe_file import read_recipe
from secateur.drive.structural.branches import pack_branches
from secateur.drive.structural.depth import drop_blocks
from secateur.drive.structural.experts import drop_experts
from secateur.drive.structural.heads import prune_heads
from secateur.drive.structural.pace import Pace
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.structural.shrink import shrink, shrink_
from secateur.drive.structural.shrinking import Shrinking, train_and_shrink
from secateur.drive.training.finetune import FineTune, finetune
from secateur.drive.training.gradual import Gradual
from secateur.drive.training.held import attach_, detach_, masks_of
from secateur.drive.training.hosts import LightningCallback, TransformersCallback
from secateur.drive.training.learn_masks import learn_masks
from secateur.drive.training.learned import Learned
from secateur.drive.training.order import Shuffled
from secateur.drive.training.recorder import Checkpoints
from secateur.drive.training.regrow import Regrow, TopKast
from secateur.drive.training.resume import resume_, save_checkpoint
from secateur.evaluate import compare, measure
from secateur.evaluate.robustness import robustness
from secateur.experiments import TicketPlan, find_ticket
from secateur.frontends import export_onnx
from secateur.frontends.transformers_save import load_transformers, save_transformers

__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "Data",
    "Facts",
    "FineTune",
    "Gradual",
    "Learned",
    "LightningCallback",
    "Masks",
    "Pace",
    "Pruned",
    "Recipe",
    "Regrow",
    "Scope",
    "SecateurError",
    "ShrinkRecipe",
    "Shrinking",
    "Shuffled",
    "Target",
    "TicketPlan",
    "TopKast",
    "TransformersCallback",
    "attach_",
    "compare",
    "detach_",
    "drop_blocks",
    "drop_experts",
    "export_onnx",
    "find_ticket",
    "finetune",
    "learn_masks",
    "load",
    "load_transformers",
    "masks_of",
    "measure",
    "pack_branches",
    "plan",
    "prune",
    "prune_",
    "prune_heads",
    "read_recipe",
    "recipes",
    "resume_",
    "robustness",
    "save_checkpoint",
    "save_transformers",
    "shrink",
    "shrink_",
    "train_and_shrink",
]
