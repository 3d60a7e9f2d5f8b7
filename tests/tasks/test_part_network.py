"""The two stages as networks: gradients as asked for, pruning without a difference, twelve groups, what is frozen."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tasks.part_discovery import groups, losses, maps
from tasks.part_discovery.attention import divisible
from tasks.part_discovery.backbones import feature_map
from tasks.part_discovery.maps import Mask
from tasks.part_discovery.network import Modulation
from tasks.part_discovery.task import PartDiscovery
from trainer.build import build_data, build_task
from trainer.errors import ConfigError
from trainer.launch.compose import compose_run
from trainer.optim import parameter_groups
from trainer.task import Batch, Progress

SMALL = [
    "task=part_discovery",
    "task.num_parts=4",
    "dataset.image_size=40",
    "loop.batch_size=4",
    "dataset.num_train=16",
    "dataset.num_val=8",
]
TINY = [*SMALL, "model=timm", "model.name=test_vit", "model.patch_size=8", "+model.args.depth=2"]
STEM = [*SMALL, "model.args.depth=1", "model.conv_stem=[8,16,24]"]  # as the default network, convolutions before the blocks
PROGRESS = Progress(5, 10, 5.0)  # when all terms have their weights


def make(*overrides: str, base: list[str] = TINY) -> PartDiscovery:
    run = compose_run(*base, *overrides)
    task = build_task(run, build_data(run), torch.device("cpu"), 1)
    assert isinstance(task, PartDiscovery)
    return task


def batch(count: int = 4, size: int = 40) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(count, 3, size, size, generator=generator), "label": torch.arange(count) % 8,
        "key": torch.arange(count) * 101, "index": torch.arange(count),
    }  # fmt: skip


def only_stage_2() -> list[str]:
    """Every loss but the second stage's classification is off."""
    others = ("stage_1", "orthogonality", "equivariance", "presence", "enforced_presence", "total_variation", "entropy", "concentration")
    return [f"task.{name}_weight=0" for name in others]


@pytest.mark.parametrize(("gradient", "reaches"), [("straight_through", True), ("none", False), ("soft", True)])
def test_stage_2_teaches_stage_1_exactly_as_mask_gradient_says(gradient, reaches):
    task = make(f"task.mask_gradient={gradient}", *only_stage_2())
    task.train()
    task(batch(), PROGRESS).loss.backward()
    found = [p.grad for p in task.model.stage_1.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert bool(found) == reaches
    if reaches:
        assert task.model.stage_1.prototypes.grad is not None
        assert all(g.isfinite().all() for g in found)
    assert task.model.stage_2 is not None
    assert all(p.grad is not None for p in task.model.stage_2.parameters())


def test_the_straight_through_gradient_is_that_of_attention_weighted_by_the_mask():
    """The loss as a function of a mask between 0 and 1 that multiplies attention: its slope at the hard mask, by differences."""
    task = make(*only_stage_2()).double()
    task.train()
    stage_2, images = task.model.stage_2, batch(2)["image"].double()
    assert stage_2 is not None
    from tasks.part_discovery.backbones import seen_tokens

    hard = (torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(3)) > 0.4).double()

    def loss(mask: Tensor) -> Tensor:
        return seen_tokens(stage_2.backbone, images, mask, bias=1e-10, prune=False).square().sum()  # type: ignore[arg-type]

    hard.requires_grad_()
    (slope,) = torch.autograd.grad(loss(hard), hard)
    for i in ((0, 1, 2), (1, 3, 3), (0, 0, 0)):
        inward = -1 if hard[i] > 0.5 else 1
        moved = hard.detach().clone()
        moved[i] += inward * 1e-4
        difference = (loss(moved) - loss(hard.detach())) / (inward * 1e-4)
        assert slope[i].item() == pytest.approx(difference.item(), rel=0.02, abs=1e-3)


def test_a_bounded_gradient_lets_no_hidden_place_drown_the_others():
    """Queries that one hidden token fits: unbounded, what it would be shown for is all that the first stage learns."""
    sizes = {}
    for bounded in (False, True):
        task = make(*only_stage_2(), f"task.bounded_mask_gradient={str(bounded).lower()}").train()
        assert task.model.stage_2 is not None
        with torch.no_grad():
            for block in cast(Any, task.model.stage_2.backbone).blocks:
                block.attn.qkv.weight *= 30  # sharp attention, as it grows in training
        output = task(batch(), PROGRESS)
        output.loss.backward()
        gradients = [p.grad for p in task.model.stage_1.parameters() if p.grad is not None]
        sizes[bounded] = (output.loss.item(), torch.stack([g.norm() for g in gradients]).norm().item())
    assert sizes[True][0] == sizes[False][0], "the loss is the same"
    assert 0 < sizes[True][1] < 0.1 * sizes[False][1]


def test_the_bound_is_each_images_own_and_seen_places_keep_their_gradient():
    gradient = torch.tensor([[[0.5, -0.2], [1e6, -1e6]], [[3.0, 0.1], [-0.2, 4.0]]])
    seen = torch.tensor([[[True, True], [False, False]], [[True, False], [False, False]]])
    expected = torch.tensor([[[0.5, -0.2], [0.5, -0.5]], [[3.0, 0.1], [-0.2, 3.0]]])
    assert torch.equal(maps.no_larger_than_seen(gradient, seen), expected)
    assert not maps.no_larger_than_seen(gradient, torch.zeros_like(seen)).any(), "where nothing is seen there is nothing to compare with"


@pytest.mark.parametrize("base", [TINY, STEM], ids=["patches", "convolutions"])
def test_hidden_patches_have_no_influence_and_prefix_tokens_always_have(base):
    stage_2, images = make(base=base).eval().model.stage_2, batch()["image"]
    assert stage_2 is not None
    shown = (torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    hidden = (shown == 0).repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    with torch.no_grad():
        noise = torch.where(hidden, torch.randn_like(images) * 10, images)
        torch.testing.assert_close(stage_2(noise, Mask(shown, shown)), stage_2(images, Mask(shown, shown)), atol=1e-5, rtol=0)
        nothing = torch.zeros_like(shown)
        assert stage_2(images, Mask(nothing, nothing)).isfinite().all(), "an image without parts still has its prefix tokens"


@pytest.mark.parametrize(("share", "base"), [(0.0, TINY), (0.1, TINY), (0.5, TINY), (1.0, TINY), (0.5, STEM)])
def test_pruned_tokens_change_nothing(share, base):
    """Images that see different numbers of patches, in one batch."""
    images = batch(6)["image"]
    mask = torch.rand(6, 5, 5, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, share, 6).view(6, 1, 1)
    logits = []
    for prune in ("true", "false"):
        task = make(f"task.prune={prune}", base=base).eval()
        assert task.model.stage_2 is not None
        with torch.no_grad():
            logits.append(task.model.stage_2(images, Mask(mask.float(), mask.float())))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("gradient", "base"), [("none", TINY), ("straight_through", TINY), ("straight_through", STEM)])
def test_pruning_in_training_changes_neither_loss_nor_gradients(gradient, base):
    """Where the mask passes nothing on, a hidden token has no part in either; otherwise it teaches the mask alone, up to the 1e-10
    that it weighs. Everything is compared with timm's own blocks on all tokens."""
    found = []
    for prune in (True, False):
        task = make(f"task.mask_gradient={gradient}", f"task.prune={str(prune).lower()}", base=base).train()
        assert task.model.stage_2 is not None
        if not prune:
            cast(Any, task.model.stage_2.backbone).grad_checkpointing = True  # so that timm's own forward passes run
        widths: list[int] = []
        task.model.get_submodule("stage_2.backbone.blocks.0.mlp").register_forward_hook(lambda _, x, y: widths.append(x[0].shape[1]))  # noqa: B023
        output = task(batch(), PROGRESS)
        output.loss.backward()
        found.append((widths[-1], output.loss.detach(), {name: p.grad for name, p in task.named_parameters()}))
    (fewer, *ours), (all_of_them, *theirs) = found
    assert fewer < all_of_them
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_blocks_that_draw_or_are_out_of_the_ordinary_are_run_whole():
    stage_2 = make("task.drop_path_stage_2=0.5").model.stage_2
    assert stage_2 is not None
    network: Any = stage_2.backbone
    assert divisible(network.eval())
    assert not divisible(network.train())
    network.eval().blocks[0].compile()
    assert not divisible(network)


def test_registers_and_class_token_are_prefix_tokens():
    task = make("+model.args.reg_tokens=4").eval()
    assert feature_map(task.model.stage_1.backbone, batch()["image"]).shape == (4, 64, 5, 5)
    task.train()
    task(batch(), PROGRESS).loss.backward()
    assert all(p.grad is not None for p in task.parameters())


def test_evaluation_has_no_noise_unless_asked_for():
    data = batch()
    with torch.no_grad():
        quiet = make().eval()
        assert torch.equal(quiet.model.classify(data["image"], data["key"])[0].maps, quiet.model.classify(data["image"])[0].maps)
        noisy = make("task.gumbel=true", "task.gumbel_at_eval=true").eval()
        first, again = (noisy.model.classify(data["image"], data["key"])[0].maps for _ in range(2))
        assert torch.equal(first, again), "the noise is each image's own"
        assert (first - quiet.model.classify(data["image"])[0].maps).abs().max() > 0.1


def test_noise_and_dropout_do_not_depend_on_who_shares_the_batch():
    task = make("task.gumbel=true").train()
    data = batch()
    with torch.no_grad():
        whole, _ = task.model.classify(data["image"], data["key"])
        half, _ = task.model.classify(data["image"][2:], data["key"][2:])
    torch.testing.assert_close(half.maps, whole.maps[2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(half.logits, whole.logits[2:], atol=1e-5, rtol=0)
    assert whole.mask is not None
    assert half.mask is not None
    assert torch.equal(half.mask.hard, whole.mask.hard[2:])


def test_without_blocks_a_place_knows_its_surroundings_only():
    """As after convolutions by default; with blocks every place knows the whole image."""
    images = batch()["image"]
    for blocks, knows in (("null", False), ("0", False), ("1", True)):
        task = make(f"task.stage_1_blocks={blocks}", base=STEM).eval()
        moved = images.clone()
        moved[..., :8, :8] += 1
        with torch.no_grad():
            before, after = (feature_map(task.model.stage_1.backbone, x) for x in (images, moved))
        assert bool((before[..., -1, -1] != after[..., -1, -1]).any()) == knows
        assert (before[..., 0, 0] != after[..., 0, 0]).any()
        task.train()(batch(), PROGRESS).loss.backward()
        assert all(p.grad is not None for p in task.parameters()), "tokens that reach no patch are gone"
    whole = make().model.stage_1.backbone
    assert isinstance(whole.blocks, nn.Sequential)
    assert len(whole.blocks) == 2


def test_equivariance_runs_stage_1_alone_on_the_turned_images():
    task = make()
    seen: dict[str, int] = {}
    assert task.model.stage_2 is not None
    for name in ("stage_1", "stage_2"):
        backbone = task.model.get_submodule(f"{name}.backbone.patch_embed")
        backbone.register_forward_hook(lambda *_, name=name: seen.update({name: seen.get(name, 0) + 1}))
    task.train()
    task(batch(), PROGRESS)
    assert seen == {"stage_1": 2, "stage_2": 1}
    task.cfg = dataclasses.replace(task.cfg, equivariance_weight=0.0)
    task(batch(), PROGRESS)
    assert seen == {"stage_1": 3, "stage_2": 2}, "0 is not computed"


@pytest.mark.parametrize(("dtype", "teaches"), [(torch.bfloat16, True), (torch.float16, False)])
def test_hidden_tokens_teach_the_mask_where_their_weight_is_no_zero(dtype, teaches):
    """1e-10 is less than the least number of float16: what a warning before the run says of precision=fp16."""
    stage_2 = make().train().model.stage_2
    assert stage_2 is not None
    mask = (torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(2)) > 0.5).float().requires_grad_()
    with torch.autocast("cpu", dtype):
        stage_2.features(batch()["image"], Mask(mask, mask)).float().square().sum().backward()
    assert mask.grad is not None
    seen = mask.detach() > 0.5
    assert mask.grad[seen].abs().max() > 0
    assert (mask.grad[~seen].abs().max() > 0) == teaches


@pytest.mark.parametrize("kind", ["layer_norm", "original", "none", "parallel_mlp"])
def test_modulations(kind):
    x = torch.randn(3, 5, 8)
    y = Modulation(kind, 5, 8)(x)
    assert y.shape == x.shape
    if kind == "layer_norm":  # over parts and channels together
        torch.testing.assert_close(y, (x - x.mean((1, 2), keepdim=True)) / (x.var((1, 2), keepdim=True, correction=0) + 1e-5).sqrt())
    elif kind != "parallel_mlp":
        assert torch.equal(y, x)
    else:  # a part's output depends on that part alone
        moved = x.clone()
        moved[:, 0] += 1
        torch.manual_seed(0)
        modulation = Modulation(kind, 5, 8)
        assert torch.equal(modulation(moved)[:, 1:], modulation(x)[:, 1:])
        assert not torch.equal(modulation(moved)[:, 0], modulation(x)[:, 0])


FACTORS = ["task.scratch_lr_factor=1e4", "task.modulation_lr_factor=1e4", "task.finer_lr_factor=1e3", "task.stage_two_lr_factor=2"]
GROUPS = {  # group: (factor, decays, one of its parameters)
    "classifier_1": (1e4, True, "model.stage_1.classifier.weight"),
    "classifier_1_undecayed": (1e4, False, None),
    "classifier_2": (1e4, True, "model.stage_2.head.weight"),
    "classifier_2_undecayed": (1e4, False, "model.stage_2.head_norm.weight"),
    "modulation": (1e4, False, "model.stage_1.modulation.norm.weight"),
    "prototypes": (1e3, False, "model.stage_1.prototypes"),
    "tokens_1": (1.0, False, "model.stage_1.backbone.reg_token"),
    "tokens_2": (2.0, False, "model.stage_2.backbone.pos_embed"),
    "backbone_2": (2.0, True, "model.stage_2.backbone.blocks.0.attn.qkv.weight"),
    "backbone_2_undecayed": (2.0, False, "model.stage_2.backbone.blocks.1.norm1.weight"),
    "backbone_1": (1.0, True, "model.stage_1.backbone.patch_embed.proj.weight"),
    "backbone_1_undecayed": (1.0, False, "model.stage_1.backbone.blocks.0.mlp.fc1.bias"),
}


def test_twelve_groups_by_name_with_their_factors():
    """At the published rate, 1e-6 at 16 images: 2.828e-6 at 128, prototypes 2.828e-3, heads and modulation 2.828e-2."""
    run = compose_run(
        *TINY, "+model.args.reg_tokens=4", *FACTORS, "loop.batch_size=128", "dataset.num_train=128", "optimizer.lr=1e-6",
        "optimizer.lr_scaling=sqrt", "optimizer.base_batch_size=16", "optimizer.weight_decay=0.05",
    )  # fmt: skip
    task = build_task(run, build_data(run), torch.device("cpu"), 1)
    found = groups.groups(task)
    assert list(found) == list(GROUPS)
    assert sum(map(len, found.values())) == sum(1 for _ in task.parameters())
    of = {id(p): (g["lr"], g["weight_decay"]) for g in parameter_groups(task, run.optimizer, 128, task.param_rules()) for p in g["params"]}
    parameters = dict(task.named_parameters())
    for name, (factor, decays, example) in GROUPS.items():
        assert example is None or example in found[name]
        for parameter in found[name]:
            lr, decay = of[id(parameters[parameter])]
            assert lr == pytest.approx(2.828e-6 * factor, rel=1e-3), parameter
            assert decay == (0.05 if decays else 0), parameter


SWITCHES = {
    (): set(),
    ("freeze_stage_1",): {"backbone_1", "backbone_1_undecayed"},
    ("freeze_stage_1", "freeze_stage_1_tokens"): {"backbone_1", "backbone_1_undecayed", "tokens_1"},
    ("freeze_stage_2",): {"backbone_2", "backbone_2_undecayed"},
    ("freeze_stage_2", "freeze_stage_2_tokens"): {"backbone_2", "backbone_2_undecayed", "tokens_2"},
}


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_what_the_four_switches_freeze(switches):
    task = make(*(f"task.{switch}=true" for switch in switches))
    frozen = {name for name, p in task.named_parameters() if not p.requires_grad}
    found = groups.groups(task)
    assert frozen == {name for group in SWITCHES[switches] for name in found[group]}
    task.train()
    task(batch(), PROGRESS).loss.backward()
    assert all((p.grad is None) == (name in frozen) for name, p in task.named_parameters())


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for recompute in ("false", "true"):
        task = make(f"loop.activation_checkpointing={recompute}").train()
        task(batch(), PROGRESS).loss.backward()
        found.append([p.grad for p in task.parameters()])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_a_frozen_network_stays_as_it_is_in_every_way():
    """Its batch statistics too."""
    task = make("task.freeze_stage_1=true", base=STEM).train()
    before = {name: value.clone() for name, value in task.model.stage_1.backbone.named_buffers()}
    assert before
    task(batch(), PROGRESS)
    assert all(torch.equal(value, before[name]) for name, value in task.model.stage_1.backbone.named_buffers())


def test_features_are_what_the_last_head_sees():
    task, images = make().eval(), batch()["image"]
    assert task.model.stage_2 is not None
    with torch.no_grad():
        torch.testing.assert_close(task.model.stage_2.head(task.features(images)), task.model(images))
        one = make("task.stages=1").eval()
        torch.testing.assert_close(one.model.stage_1.classifier(one.features(images)), one.model(images))


def test_removed_parts_are_not_seen_and_do_not_vote():
    data = batch()
    with torch.no_grad():
        whole = make().eval().model.classify(data["image"])[0]
        owner = whole.maps.argmax(1)
        part = int(owner[owner < 4].mode().values)
        less = make(f"task.remove_parts=[{part}]").eval().model.classify(data["image"])[0]
    assert whole.mask is not None
    assert less.mask is not None
    assert not less.mask.hard[owner == part].any()
    assert torch.equal(less.maps.argmax(1), torch.where(owner == part, 4, owner))
    left = [k for k in range(4) if k != part]
    torch.testing.assert_close(less.logits, less.part_logits[:, left].mean(1))


def test_one_stage_takes_networks_that_are_no_transformers():
    for name in ("test_resnet", "test_convnext"):
        task = make("task.stages=1", "dataset.image_size=128", base=[*SMALL, "model=timm", f"model.name={name}"]).train()
        data = batch(size=128)
        assert feature_map(task.model.stage_1.backbone, data["image"]).shape[2:] == (4, 4)
        task(data, PROGRESS).loss.backward()
        assert all(p.grad is not None for p in task.parameters())
    for model, name in (("timm", "test_resnet"), ("timm", "test_convnext"), ("torchvision", "resnet18"), ("torchvision", "convnext_tiny")):
        finer = make(
            "task.stages=1", "+model.args.output_stride=16", "dataset.image_size=64", base=[*SMALL, f"model={model}", f"model.name={name}"]
        ).train()
        assert feature_map(finer.model.stage_1.backbone, torch.zeros(1, 3, 64, 64)).shape[2:] == (4, 4)
        finer(batch(size=64), PROGRESS).loss.backward()
        assert all(p.grad is not None for p in finer.parameters()), "nothing of the classifier is left"


def test_one_stage_has_the_first_stages_logits():
    task = make("task.stages=1")
    assert task.model.stage_2 is None
    task.train()
    output = task(batch(), PROGRESS)
    assert {"stage_1", "orthogonality", "equivariance", "presence"} <= output.metrics.keys()
    assert "stage_2" not in output.metrics
    output.loss.backward()
    assert all(p.grad is not None for p in task.parameters())


TERMS = {  # of the loss, and the function that would compute each
    "stage_1": "cross_entropy", "stage_2": "cross_entropy", "orthogonality": "orthogonality", "equivariance": "equivariance", "presence": "presence",
    "enforced_presence": "enforced_presence", "total_variation": "total_variation", "entropy": "entropy", "concentration": "concentration",
}  # fmt: skip


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_weight_0_is_not_computed(term, monkeypatch):
    task, data, computed = make("task.concentration_weight=1").train(), batch(), []
    assert set(TERMS) == set(task.cfg.weights())
    place = torch.nn.functional if TERMS[term] == "cross_entropy" else losses
    function = getattr(place, TERMS[term])
    monkeypatch.setattr(place, TERMS[term], lambda *a, **k: (computed.append(term), function(*a, **k))[1])
    counts = []
    for weight in (1.0, 0.0):
        task.cfg = dataclasses.replace(task.cfg, **{f"{term}_weight": weight})
        output = task(data, PROGRESS)
        assert (term in output.metrics) == (weight > 0)
        counts.append(len(computed))
        computed.clear()
    assert counts == ([2, 1] if TERMS[term] == "cross_entropy" else [1, 0])


def test_the_total_is_the_weighted_sum_of_its_terms():
    task = make("task.presence_weight=0.5", "task.concentration_weight=3", "task.terms_warmup=0.5")
    task.train()
    weights = task.cfg.weights()
    for fraction, grown in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        output = task(batch(), Progress(int(fraction * 100), 100, 5.0))
        assert set(weights) <= output.metrics.keys()
        expected = sum(w * (1 if name in ("stage_1", "stage_2") else grown) * output.metrics[name].item() for name, w in weights.items())
        assert output.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.name=test_resnet", "model.patch_size=null"], "model.name"),
        (["+model.args.class_token=false", "+model.args.global_pool=avg"], "model.name"),
        (["+model.args.patch_drop_rate=0.5"], "model.args.patch_drop_rate"),
        (["task.stages=1", "model.name=test_resnet", "model.patch_size=null"], "dataset.image_size"),
        (["task.stage_1_blocks=99"], "task.stage_1_blocks"),
        (["task.stages=1", "task.stage_1_blocks=1", "model.name=test_resnet", "model.patch_size=null"], "task.stage_1_blocks"),
    ],
)
def test_networks_that_will_not_do_are_refused(overrides, key):
    run = compose_run(*SMALL, "model=timm", "model.name=test_vit", "model.patch_size=8", *overrides)
    with pytest.raises(ConfigError) as refused:
        build_task(run, build_data(run), torch.device("cpu"), 1)
    assert refused.value.problems[0].key == key  # type: ignore[union-attr]
