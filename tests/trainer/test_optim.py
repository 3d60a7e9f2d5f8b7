"""Parameter groups against timm's own, rules, and every optimizer choice on a real step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from timm.optim import list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from tests.thresholds import LEARNS
from trainer.config.optimizer import AdamW, LrScaling, OptimizerConfig, ParamRule, Sgd, TimmOptimizer
from trainer.errors import ConfigError, Problem
from trainer.launch.store import tell_hydra
from trainer.optim import layer_scales, parameter_groups

NETWORKS = ["test_vit", "test_vit3", "test_resnet", "test_convnext", "test_efficientnet", "test_vit_relpos"]


class Task(nn.Module):
    """A task around a network: prefixed names and a head the network knows nothing of."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = timm.create_model(name, num_classes=7)
        self.own_head = nn.Linear(3, 2)


def adamw(**changes: Any) -> AdamW:
    return replace(AdamW(lr=1e-3, weight_decay=0.05), **changes)


def rates(module: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) by parameter name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[parameter]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}


def spared_by_itself(model: Any) -> set[str]:
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


# --- weight decay and layer decay, against timm ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_weight_decay_is_spared_where_timm_spares_it(name: str) -> None:
    model = timm.create_model(name)
    spared = spared_by_itself(model)
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {names[p]: g["weight_decay"] for g in theirs for p in g["params"]}
    assert {n: decay for n, (_, decay) in rates(model, parameter_groups(model, adamw(), 64)).items()} == expected
    assert set(expected.values()) == {0.0, 0.05}


@pytest.mark.parametrize(("images", "batch", "epochs", "decay"), [(5994, 128, 90, 7.77e-4), (1000, 10, 1, 5e-3)])
def test_normalised_weight_decay_is_adamws(images: int, batch: int, epochs: int, decay: float) -> None:
    """arXiv:1711.05101, sec. 3: w sqrt(b / (B T)). CUB: 46 updates an epoch, 4,140 in all."""
    cfg = adamw(weight_decay_scaling="normalized", rules=[ParamRule("own_head", weight_decay=0.1)])
    task = Task("test_vit")
    found = rates(task, parameter_groups(task, cfg, batch, total_steps=images // batch * epochs))
    assert found["model.head.weight"][1] == pytest.approx(decay, rel=1e-3)
    assert found["model.head.bias"][1] == 0
    assert found["own_head.weight"][1] == pytest.approx(2 * decay, rel=1e-3), "a rule's too"
    as_given = rates(task, parameter_groups(task, adamw(), batch, total_steps=100))
    assert as_given["model.head.weight"][1] == 0.05


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_decay_is_timms(name: str) -> None:
    model = timm.create_model(name)
    spared = spared_by_itself(model)
    theirs = param_groups_layer_decay(model, 0.05, no_weight_decay_list=spared, layer_decay=0.7)
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {names[p]: (1e-3 * g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    ours = rates(model, parameter_groups(model, adamw(layer_decay=0.7), 64))
    assert ours.keys() == expected.keys()
    assert all(ours[name] == pytest.approx(expected[name]) for name in expected)


def test_layer_decay_is_the_papers_formula_on_a_vit() -> None:
    # MAE (arXiv:2111.06377, app. A.2): d ** (L + 1 - id), id 0 the embedding, i + 1 block i, L + 1 the head.
    scales = layer_scales(timm.create_model("vit_tiny_patch16_224"), 0.65)
    assert scales["patch_embed.proj.weight"] == scales["pos_embed"] == scales["cls_token"] == 0.65**13
    for block in range(12):
        assert scales[f"blocks.{block}.mlp.fc1.weight"] == 0.65 ** (12 - block)
    assert scales["head.weight"] == 1.0


def test_layer_decay_inside_a_task() -> None:
    task = Task("test_vit")
    alone = rates(task.model, parameter_groups(task.model, adamw(layer_decay=0.5), 64))
    inside = rates(task, parameter_groups(task, adamw(layer_decay=0.5), 64))
    assert {f"model.{name}": pair for name, pair in alone.items()} == {n: p for n, p in inside.items() if n.startswith("model.")}
    assert inside["own_head.weight"] == (1e-3, 0.05)  # as far from the image as can be


def test_layer_decay_needs_a_network_that_tells_its_layers() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.layer_decay=0.5: no network .*\n.*optimizer.layer_decay=null"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), adamw(layer_decay=0.5), 64)


def test_what_is_spared_by_shape_kind_and_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm([3, 4, 4])  # three dimensions, and still a norm
            self.scale = nn.Parameter(torch.ones(5))
            self.mask_token = nn.Parameter(torch.ones(1, 1, 5))
            self.register_tokens = nn.Parameter(torch.ones(1, 4, 5))
            self.encoder_pos_embedding = nn.Parameter(torch.ones(1, 4, 5))
            self.attention = nn.Linear(5, 5)
            self.attention.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
            # Close to the patterns, and weights all the same.
            self.mlp_tokens = nn.Linear(5, 5)
            self.token_mixer = nn.Conv2d(3, 3, 1)
            self.pos_embed_proj = nn.Linear(5, 5)

    module = Odd()
    decayed = {name for name, (_, decay) in rates(module, parameter_groups(module, adamw(), 64)).items() if decay}
    assert decayed == {"attention.weight", "mlp_tokens.weight", "token_mixer.weight", "pos_embed_proj.weight"}


# --- rules ------------------------------------------------------------------------------------------------------------------


def test_rules_set_rates_and_the_first_match_wins() -> None:
    task = Task("test_vit")
    rules = [ParamRule(r"own_head\.weight", lr_factor=10.0, weight_decay=0.3), ParamRule("own_head", lr_factor=2.0)]
    found = rates(task, parameter_groups(task, adamw(rules=rules), 64))
    assert found["own_head.weight"] == (1e-2, 0.3)
    assert found["own_head.bias"] == (2e-3, 0.0)  # still spared: the rule says nothing of decay
    assert found["model.blocks.0.attn.qkv.weight"] == (1e-3, 0.05)


def test_a_rule_comes_on_top_of_layer_decay() -> None:
    task = Task("test_vit")
    plain = rates(task, parameter_groups(task, adamw(layer_decay=0.5), 64))
    ruled = rates(task, parameter_groups(task, adamw(layer_decay=0.5, rules=[ParamRule("patch_embed", lr_factor=3.0)]), 64))
    name = "model.patch_embed.proj.weight"
    assert ruled[name][0] == pytest.approx(3 * plain[name][0])
    assert all(ruled[n] == plain[n] for n in plain if "patch_embed" not in n)


def test_factor_zero_freezes() -> None:
    task = Task("test_vit")
    found = rates(task, parameter_groups(task, adamw(rules=[ParamRule(r"^model\.", lr_factor=0.0)]), 64))
    assert set(found) == {"own_head.weight", "own_head.bias"}
    assert not any(parameter.requires_grad for parameter in task.model.parameters())


def test_frozen_parameters_are_left_out() -> None:
    task = Task("test_vit")
    task.model.requires_grad_(False)
    assert set(rates(task, parameter_groups(task, adamw(), 64))) == {"own_head.weight", "own_head.bias"}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([ParamRule(r"patch_embd\.")], r"optimizer.rules\[0\].pattern=patch_embd\\.: matches the name of no parameter\n.*patch_embed, as in model.patch_embed"),
        ([ParamRule("own_head"), ParamRule("zzzzz")], r"optimizer.rules\[1\].pattern=zzzzz: .*\n.*model.blocks.*own_head"),
        ([ParamRule("head"), ParamRule(r"own_head\.bias")], r"optimizer.rules\[1\].*goes to optimizer.rules\[0\], which comes first"),
        ([ParamRule("", lr_factor=0.0)], "every parameter is frozen"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_meant(rules: list[ParamRule], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parameter_groups(Task("test_vit"), adamw(rules=rules), 64)


def test_equal_rates_share_a_group() -> None:
    task = Task("test_vit")
    groups = parameter_groups(task, adamw(), 64)
    assert [g["weight_decay"] for g in sorted(groups, key=lambda g: g["weight_decay"])] == [0.0, 0.05]
    # Layer decay on twelve blocks: two groups a layer, 14 layers, never one a tensor (152 of them).
    vit = timm.create_model("vit_tiny_patch16_224")
    assert len(parameter_groups(vit, adamw(layer_decay=0.7), 64)) == 2 * 14
    assert (
        len(parameter_groups(vit, adamw(layer_decay=0.7, rules=[ParamRule("head", lr_factor=0.7)]), 64)) == 2 * 13
    )  # the head joins the last block


def test_shared_parameters_are_grouped_once() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    assert sum(len(g["params"]) for g in parameter_groups(tied, adamw(), 64)) == 3


@pytest.mark.parametrize(("scaling", "lr"), [(LrScaling.none, 1e-3), (LrScaling.linear, 4e-3), (LrScaling.sqrt, 2e-3)])
def test_learning_rate_follows_the_batch(scaling: LrScaling, lr: float) -> None:
    (group,) = parameter_groups(nn.Linear(3, 3, bias=False), adamw(lr_scaling=scaling, base_batch_size=64), batch_size=256)
    assert group["lr"] == pytest.approx(lr)


def test_square_root_scaling_as_part_discovery_uses_it() -> None:
    cfg = adamw(lr=1e-6, lr_scaling=LrScaling.sqrt, base_batch_size=16)
    assert cfg.scaled_lr(128) == pytest.approx(2.828e-6, rel=1e-3)


# --- optimizers -------------------------------------------------------------------------------------------------------------


def choices(pytestconfig: pytest.Config) -> dict[str, OptimizerConfig]:
    folder = pytestconfig.rootpath / "conf"
    tell_hydra()
    with initialize_config_dir(str(folder), version_base="1.3"):
        names = sorted(path.stem for path in (folder / "optimizer").glob("*.yaml"))
        found = {name: OmegaConf.to_object(compose(overrides=[f"+optimizer={name}"]).optimizer) for name in names}
    assert all(isinstance(cfg, OptimizerConfig) for cfg in found.values())
    return found  # pyright: ignore[reportReturnType]


def train(cfg: OptimizerConfig, steps: int = 30) -> tuple[float, float]:
    """Loss before and after a few full-batch steps on a separable problem; the gradients are scaled to be of size one."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    x[torch.arange(64), y] += 4.0
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))
    optimizer = cfg.build(parameter_groups(model, cfg, 64))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_every_choice_learns(pytestconfig: pytest.Config) -> None:
    found = choices(pytestconfig)
    assert {"adamw", "sgd", "lars", "lamb", "timm"} <= set(found)
    for name, cfg in found.items():
        assert not list(cfg.problems())
        # LARS moves each layer by lr * trust_coeff (0.001) of its size a step, so it needs more of them.
        first, last = train(cfg, steps=300 if name == "lars" else 30)
        assert last < LEARNS * first, name


# Not here: packages of their own that need CUDA, a second-order one, and kron, which compiles itself for half a minute.
NOT_HERE = ("bnb", "fused", "adahessian", "kron")


@pytest.mark.filterwarnings("ignore::UserWarning")  # some of timm's optimizers call what torch deprecates
def test_every_optimizer_of_timm_makes_a_step_at_the_groups_rates() -> None:
    names = [str(name) for name in list_optimizers() if not str(name).startswith(NOT_HERE)]
    assert len(names) > 50
    for name in [*names, "lookahead_adamw"]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        cfg = TimmOptimizer(name=name, lr=1e-3, weight_decay=0.05, rules=[ParamRule(r"0\.weight", lr_factor=0.5)])
        optimizer = cfg.build(parameter_groups(model, cfg, 64))
        assert sorted((g["lr"], g["weight_decay"]) for g in optimizer.param_groups) == [(5e-4, 0.05), (1e-3, 0.0), (1e-3, 0.05)], name
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):  # some only look at the first gradient
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
        assert all(torch.isfinite(p).all() for p in model.parameters()), name
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), name


def problem(cfg: TimmOptimizer) -> Problem:
    with pytest.raises(ConfigError) as error:
        cfg.build(parameter_groups(nn.Linear(2, 2), cfg, 64))
    (found,) = error.value.problems
    assert isinstance(found, Problem)
    return found


@pytest.mark.parametrize(
    ("changes", "key", "fix"),
    [
        ({"name": "admw"}, "optimizer.name", "optimizer.name=adamw"),
        ({"name": "lookahead_lamp"}, "optimizer.name", "optimizer.name=lamb"),
        ({"name": "adahessian"}, "optimizer.name", "optimizer.name=adamw"),
        ({"name": "lamb", "momentum": 0.9}, "optimizer.momentum", "optimizer.momentum=null"),
        ({"name": "lars", "betas": [0.9, 0.99]}, "optimizer.betas", "optimizer.betas=null"),
        ({"name": "adan", "betas": [0.9, 0.99]}, "optimizer.betas", "optimizer.betas=null"),
        ({"name": "lion", "eps": 1e-6}, "optimizer.eps", "optimizer.eps=null"),
        ({"name": "lamb", "args": {"max_grad_nrom": 1.0}}, "optimizer.args.max_grad_nrom", "optimizer.args.max_grad_norm=1.0"),
    ],
)
def test_what_timm_does_not_take_is_a_config_error(changes: dict[str, Any], key: str, fix: str) -> None:
    found = problem(replace(TimmOptimizer(lr=1e-3, weight_decay=0.0), **changes))
    assert (found.key, found.fix) == (key, fix)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the package may be usable here")
def test_an_optimizer_of_an_absent_package_names_it() -> None:
    assert "bitsandbytes" in problem(TimmOptimizer(name="bnbadamw8bit", lr=1e-3, weight_decay=0.0)).reason


@pytest.mark.parametrize("cfg", [adamw(), Sgd(lr=0.1, weight_decay=0.0), TimmOptimizer(name="adamw", lr=1e-3, weight_decay=0.0)])
def test_fused_where_there_is_a_kernel_and_only_when_asked(cfg: OptimizerConfig) -> None:
    module = nn.Linear(2, 2)
    assert cfg.build(parameter_groups(module, cfg, 64)).defaults["fused"] is True
    unfused = replace(cfg, fused=False)
    assert not unfused.build(parameter_groups(module, unfused, 64)).defaults["fused"]


def test_fused_falls_back_with_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))  # a data type without a fused kernel
    optimizer = adamw().build(parameter_groups(module, adamw(), 64))
    assert not optimizer.defaults["fused"]
    assert "optimizer.fused=false" in caplog.text


def test_fused_is_the_same_optimizer() -> None:
    assert train(adamw(), 20) == pytest.approx(train(adamw(fused=False), 20), rel=1e-5)
    sgd = Sgd(lr=0.1, weight_decay=1e-4)
    assert train(sgd, 20) == pytest.approx(train(replace(sgd, fused=False), 20), rel=1e-5)


def test_nesterov_without_momentum_is_refused() -> None:
    assert [p.key for p in Sgd(lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=True).problems()] == ["optimizer.nesterov"]


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    found = list(adamw(no_decay=["("], rules=[ParamRule("[")]).problems())
    assert [p.key for p in found] == ["optimizer.no_decay[0]", "optimizer.rules[0].pattern"]


def test_weight_decay_of_zero_needs_one_group() -> None:
    assert len(parameter_groups(timm.create_model("test_vit"), adamw(weight_decay=0.0), 64)) == 1


def test_all_learning_rates_are_finite_for_deep_layer_decay() -> None:
    groups = parameter_groups(timm.create_model("vit_tiny_patch16_224"), adamw(layer_decay=0.01), 64)
    assert all(math.isfinite(g["lr"]) and g["lr"] > 0 for g in groups)


@pytest.mark.parametrize("fused", [True, False])
def test_sgd_takes_a_parameter_that_begins_later_than_others(fused):
    """A task may let a layer rest at first; torch's fused kernel alone fails there."""
    rests, moves = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Sgd(lr=0.1, weight_decay=0.0, momentum=0.9, fused=fused).build([{"params": [rests, moves], "lr": 0.1, "weight_decay": 0.0}])
    for step in range(3):
        moves.grad, rests.grad = torch.ones(3), torch.ones(3) if step else None
        optimizer.step()
    torch.testing.assert_close(rests.data, torch.full((3,), 1 - 0.1 * (1 + 1.9)))
    torch.testing.assert_close(moves.data, torch.full((3,), 1 - 0.1 * (1 + 1.9 + 2.71)))


def test_momentum_is_not_what_lay_in_memory_where_the_first_step_is_skipped():
    """As fp16's first steps are, until its scale fits."""
    weights = [torch.nn.Parameter(torch.ones(50_000)) for _ in range(4)]
    optimizer: Any = Sgd(lr=0.5, weight_decay=0.0, momentum=0.9).build([{"params": weights, "lr": 0.5, "weight_decay": 0.0}])
    garbage = [torch.full((50_000,), 7.0) for _ in range(16)]  # what the allocator then hands out again
    del garbage
    optimizer.grad_scale = None
    for bad, gradient in ((1.0, float("inf")), (0.0, 1.0)):
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
    assert all((weight == 0.5).all() for weight in weights)
