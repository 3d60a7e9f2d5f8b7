"""Mix transformers are SegFormer's encoders; two of them with what joins them are as large as published."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from trainer.config.mit import VARIANTS
from trainer.fusion import FusedPyramid
from trainer.launch.compose import checked, compose, compose_run
from trainer.mit import MixTransformer
from trainer.run import train
from trainer.rundir import RunDirectory
from trainer.task import Batch, Progress, StepOutput, Task

STRIDES = (4, 8, 16, 32)
RENAMED = [  # transformers' names -> ours, in this order
    (r"patch_embeddings\.proj", "patches.proj"),
    (r"patch_embeddings\.layer_norm", "patches.norm"),
    (r"^stages\.(\d)\.layer_norm", r"stages.\1.norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.q_proj", "attn.q"),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.sequence_reduction\.sequence_reduction", "attn.reduce"),
    (r"attention\.sequence_reduction\.layer_norm", "attn.norm"),
    (r"dwconv\.dwconv", "dwconv"),
]


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in state.items():
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        found[name] = value
    for key in [k for k in found if ".attention.k_proj." in k]:
        place, kind = key.split("attention.k_proj.")
        found[f"{place}attn.kv.{kind}"] = torch.cat([found.pop(key), found.pop(f"{place}attention.v_proj.{kind}")])
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_transformers_in_parameters_and_with_the_same_weights_in_output(name):
    transformers = pytest.importorskip("transformers")
    depths, widths = VARIANTS[name]
    with torch.device("meta"):  # drawing 80 million weights twice would take longer than using them
        theirs = transformers.SegformerModel(transformers.SegformerConfig(depths=list(depths), hidden_sizes=list(widths))).eval()
        ours = MixTransformer(depths, widths).eval()
    theirs.to_empty(device="cpu")
    g = torch.Generator().manual_seed(0)
    for name_, parameter in theirs.named_parameters():  # scales of norms too are other than one
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1 and name_.endswith("weight")), 0.03, generator=g)
    state = renamed(theirs.state_dict())
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict(state, strict=True, assign=True)
    images = torch.rand(2, 3, 64, 96, generator=g)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states
        for map_, other in zip(ours.maps(images), expected, strict=True):
            assert other.std() > 0.01, "something goes through"
            torch.testing.assert_close(map_, other, atol=1e-5, rtol=1e-5)


def test_each_stream_hears_the_other_and_every_parameter_learns():
    torch.manual_seed(0)
    network = FusedPyramid((1, 1, 1, 1), (32, 64, 160, 256), STRIDES, in_channels=5, drop_path_rate=0.0).train()
    images = torch.rand(2, 5, 64, 64, requires_grad=True)
    maps = network(images)
    assert [tuple(m.shape) for m in maps] == [(2, c, 64 // s, 64 // s) for c, s in zip(network.channels, STRIDES, strict=True)]
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum((0, 2, 3)) > 0).all(), "every channel is looked at"
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


SHORT = ["model=mit_b0", "loop.batch_size=8", "loop.epochs=null", "loop.steps=1", "loop.progress=none", "logger.plots=false", "dataset.num_workers=0",
         "loop.max_validation_batches=1", "dataset.image_size=64", "scheduler.warmup_epochs=0", "optimizer.lr=0.01"]  # fmt: skip
TASKS = {
    "classification": [],
    "kd": ["task=kd", "task.teacher=timm:test_resnet@{weights}", "task.teacher_size=32"],
    "dino": ["task=dino", "augmentation.local_size=32", "augmentation.local_crops=1", "task.out_dim=16", "task.hidden_dim=16",
             "task.bottleneck_dim=8", "loop.max_reference_images=16"],
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_it_serves_other_tasks(task, tmp_path):
    """A step, in which every parameter learns, and a validation."""
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "weights.pt")
    overrides = [text.format(weights=tmp_path / "weights.pt") for text in TASKS[task]]
    first: dict[str, torch.Tensor] = {}
    forward = Task.forward

    def remembered(made: Task, batch: Batch, progress: Progress) -> StepOutput:
        found = {n: p.detach().clone() for n, p in made.named_parameters() if p.requires_grad and ".stages." in n}
        first.update({n: p for n, p in found.items() if n not in first})
        return forward(made, batch, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "forward", remembered)
        done = train(compose_run(*SHORT, *overrides), RunDirectory(tmp_path / "run"))
    assert done["steps"] == 1 and any(name.startswith("val/") for name in done["last"])
    after = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["task"]
    assert len(first) > 100 and [n for n, weights in first.items() if torch.equal(weights, after[n])] == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.name=mit_b9"], "model.name"),
        (["model.pretrained=true"], "model.pretrained"),
        (["model.fusion=concatenation"], "model.fusion"),
        (["model.fusion=cross_attention"], "model.fusion"),  # digits are grey, repeated to three channels
        (["model.patch_size=7"], "model.patch_size"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(overrides, key):
    _, problems = checked(compose(["model=mit_b0", "dataset.image_size=64", *overrides]))
    assert key in [p.key for p in problems]
