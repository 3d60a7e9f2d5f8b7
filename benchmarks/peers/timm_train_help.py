"""What timm's train.py does before it can print its help: these imports, and an argument parser.

The script itself is not in timm's wheel. This is a lower bound of it: wandb, which it imports too where it is
installed, and its 150 options are left out.
"""

import argparse

import torch  # noqa: F401
import torchvision.utils  # noqa: F401
import yaml  # noqa: F401
from timm import utils  # noqa: F401
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config  # noqa: F401
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm  # noqa: F401
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: F401
from timm.models import create_model, load_checkpoint, model_parameters, resume_checkpoint, safe_model_name  # noqa: F401
from timm.optim import create_optimizer_v2, optimizer_kwargs  # noqa: F401
from timm.scheduler import create_scheduler_v2, scheduler_kwargs  # noqa: F401
from timm.utils import NativeScaler  # noqa: F401
from torch.nn.parallel import DistributedDataParallel  # noqa: F401

argparse.ArgumentParser(description="PyTorch ImageNet Training").parse_args()
