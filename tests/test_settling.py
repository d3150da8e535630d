"""Gates that settle: their noise fades, the choice is fixed, what goes fades out, and the small model goes on."""

import json
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import GATES, ROBUST, SHAPE, TARGET, metrics, run, with_labels
from processes import fresh, script
from safetensors.torch import load_file
from test_masks import SOURCE, random_masks
from test_masks import TARGET as SMALL
from test_model import random_llama
from torch import nn

import train
from eval import domain_losses
from masks import PruningMasks, extract, kept_indices
from model import Gates, Llama
from plumbing import choices, cut
from plumbing.data import TokenData
from plumbing.models import load_model
from plumbing.settings import Settings


def masks_that_settle(**settings) -> PruningMasks:
    masks = PruningMasks(SOURCE, SMALL, 0, **settings)
    masks.load_state_dict(random_masks(SOURCE, SMALL).state_dict())
    return masks


def test_noise_fades_out_in_a_straight_line():
    masks, paper = masks_that_settle(noise_from=10, noise_to=30), masks_that_settle()
    for step, share in ((0, 1.0), (10, 1.0), (15, 0.75), (30, 0.0), (99, 0.0)):
        for name, distribution in masks.distributions().items():
            drawn = getattr(paper.sample(0, step, 0), name).detach().double()  # the paper's draw, with all of the noise
            log_alpha = distribution.log_alpha.detach().double()
            logit = torch.logit((drawn + 0.1) / 1.2) * 2 / 3  # back to noise + log_alpha, where nothing is clipped
            expected = torch.sigmoid((share * (logit - log_alpha) + log_alpha) * 1.5) * 1.2 - 0.1
            inside = (drawn > 0.01) & (drawn < 0.99)
            z = getattr(masks.sample(0, step, 0), name).detach().double()
            assert name != "ffn" or inside.any()
            torch.testing.assert_close(z[inside], expected.clamp(0, 1)[inside], atol=1e-4, rtol=0)


def test_what_goes_fades_out_and_what_stays_comes_to_one():
    masks = masks_that_settle(settle_at=20, fade=10)
    start, kept = masks.settling(20), kept_indices(masks)
    for step, share in ((20, 0.0), (25, 0.5), (30, 1.0), (77, 1.0)):
        for name, z in zip(Gates._fields, masks.settling(step)):
            end = torch.zeros_like(z).scatter_(-1, kept[name], 1.0)
            torch.testing.assert_close(z, (1 - share) * getattr(start, name) + share * end)
    for name, distribution in masks.distributions().items():  # it begins where gates without noise are
        z = torch.sigmoid(distribution.log_alpha.detach() * 1.5) * 1.2 - 0.1
        torch.testing.assert_close(getattr(start, name), z.clamp(0, 1))
        # the gates of a step are those that its update leads to, and have no gradient
        assert torch.equal(getattr(masks.sample(0, 24, 3), name), getattr(masks.settling(25), name))
        assert not getattr(masks.sample(0, 24, 3), name).requires_grad
        assert torch.equal(getattr(masks.evaluated(20), name), getattr(start, name))  # measured with what is trained
    assert masks.expected_params(30) == SMALL.n_params()
    assert masks.sparsity(30) == pytest.approx({"layer": 0.5, "hidden": 10 / 24, "head": 0.5, "ffn": 19 / 40})
    # on the way, what stays counts whole and what goes fades: P never falls below the target's, to rise again
    for name, going in masks.sparsity(25).items():
        gates, stays = getattr(start, name), torch.zeros_like(getattr(start, name)).scatter_(-1, kept[name], 1.0)
        assert going == pytest.approx(((1 - stays) * (1 - 0.5 * gates)).mean().item())
    params = [masks.expected_params(step) for step in range(20, 31)]
    assert params == sorted(params, reverse=True) and params[0] > params[-1] == SMALL.n_params()


@pytest.mark.parametrize("tied", [False, True])
def test_the_small_model_gets_the_updates_of_the_gated_one(tied, tmp_path):
    """In float64: five updates of the gated model, and two of it and three of the small model with its moments."""
    source = replace(SOURCE, tie_embeddings=tied, n_kv_head=2)
    masks = PruningMasks(source, replace(SMALL, tie_embeddings=tied, n_kv_head=1), 0, settle_at=0).double()
    choices.choose_(masks, choices.random_scores(masks, 0))
    model = random_llama(source).double()
    tokens = torch.randint(61, (5, 3, 16), generator=torch.Generator().manual_seed(0))
    make = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def update(model, optimizer, step, z=None):
        model(tokens[step, :, :-1], z, targets=tokens[step, :, 1:]).mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    optimizer = torch.optim.AdamW(model.parameters(), **make)
    for step in range(2):
        update(model, optimizer, step, masks.sample(0, step, 0))
    cut.write(tmp_path / "cut", nn.ModuleDict({"model": model}), optimizer, masks)
    small = Llama.from_pretrained(tmp_path / "cut" / cut.WEIGHTS, torch.float64)
    small_optimizer = torch.optim.AdamW(small.parameters(), **make)
    cut.read_moments(tmp_path / "cut", small, small_optimizer, step=2)
    for step in range(2, 5):
        norm = update(model, optimizer, step, masks.sample(0, step, 0))
        torch.testing.assert_close(update(small, small_optimizer, step), norm, atol=0, rtol=1e-12)
    for ours, gated in zip(small.parameters(), extract(model, masks).parameters()):
        torch.testing.assert_close(ours, gated, atol=1e-13, rtol=1e-11)


SETTLING = [*GATES, "--sparsity_warmup=8", "--noise_from=4", "--noise_to=10", "--settle_at=12", "--fade=8"]


@pytest.fixture(scope="module")
def settled(chain, tiny_data, tmp_path_factory):
    """A run that settles at step 12, is cut after 20 steps, and ends after 30; and how to start it elsewhere."""
    out, patch = tmp_path_factory.mktemp("settled") / "run", pytest.MonkeyPatch()
    source = chain[0]["pretrain"]
    args = [f"--data={tiny_data}", f"--init_from={source}", *TARGET, *SETTLING, *ROBUST]
    args += [f"--reference_model={source}", "--steps=30", "--save_interval=2", "--keep_checkpoints=99"]
    assert run(patch, *args, f"--out={out}") == 0
    patch.undo()
    return out, args


def test_a_run_that_settles_is_whole(settled, tiny_data):
    out, _ = settled
    evals = {line["step"]: line for line in metrics(out, "eval")}
    end, small = metrics(out, "end")[0], Llama.from_pretrained(out / "model")
    assert end["parameters"] == small.config.n_params() == evals[20]["parameters"] == evals[30]["parameters"]
    for step in (20, 18):  # at the cut all gates are 0 or 1
        assert (set(np.ravel(evals[step]["gates"]["head"])) == {0.0, 1.0}) == (step == 20)
    assert "gates" not in evals[22] and end["loss"] == pytest.approx(evals[30]["loss"], rel=1e-6)
    assert all("lambda" in line for line in metrics(out, "train") if line["step"] <= 12)
    assert not any("lambda" in line for line in metrics(out, "train") if line["step"] > 15)
    kept = json.loads((out / "model" / "pruning.json").read_text())
    assert set(np.ravel(kept["ffn"]["gates"])) == {1.0} and len(kept["hidden"]["kept"]) == 24
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokens, labels = with_labels(TokenData(tiny_data), "sums", "val", 64, 4)
    with torch.no_grad():
        assert end["loss"]["sums"] == pytest.approx(theirs(tokens, labels=labels).loss.item(), rel=1e-5)


def test_the_loss_is_the_same_before_and_after_the_cut(settled, tiny_data):
    """The checkpoint at the cut is the gated model's: what is cut out of it has the loss that its gates gave."""
    out, _ = settled
    small = load_model(out / "checkpoints" / "step_000020")
    losses = domain_losses(small, TokenData(tiny_data), "val", 64, 4, 4)
    measured = {line["step"]: line["loss"] for line in metrics(out, "eval")}[20]
    assert small.config.d_model == 24 and losses == pytest.approx(measured, rel=1e-5)


def test_a_run_that_ends_where_it_has_settled(settled, tmp_path, monkeypatch):
    """Its last gates are 0 or 1, and what is written is the model that they gave."""
    _, args = settled
    mine = "--noise_from=2 --noise_to=5 --sparsity_warmup=4 --settle_at=6 --fade=4 --steps=10".split()
    assert run(monkeypatch, *args, *mine, f"--out={tmp_path / 'x'}") == 0
    (end,), last = metrics(tmp_path / "x", "end"), metrics(tmp_path / "x", "eval")[-1]
    assert end["loss"] == pytest.approx(last["loss"], rel=1e-5)
    kept = json.loads((tmp_path / "x" / "model" / "pruning.json").read_text())
    assert set(np.ravel(kept["ffn"]["gates"])) == {1.0}


def test_a_fading_choice_goes_on(settled, tmp_path, monkeypatch):
    """One that is not learned: its gates are in the checkpoint, as they were chosen."""
    _, args = settled
    mine = [*args, "--gates=taylor", "--noise_from=0", "--noise_to=0", "--settle_at=0", "--steps=14"]
    for name, stops in (("alone", []), ("stopped", ["--stop_at=5"])):
        for stop in [stops, []] if stops else [[]]:
            assert run(monkeypatch, *mine, *stop, f"--out={tmp_path / name / 'run'}") == 0
        assert load_model(tmp_path / name / "run" / "checkpoints" / "step_000014").config.d_model == 24
    for name in ("metrics.jsonl", "model/model.safetensors", "model/pruning.json"):
        assert (tmp_path / "stopped/run" / name).read_bytes() == (tmp_path / "alone/run" / name).read_bytes()


def test_a_choice_fades_from_the_source(settled, tmp_path, monkeypatch):
    """log_alpha is where learned gates begin; a choice begins with all gates at 1, where the source is."""
    _, args = settled
    mine = [*args, "--gates=random", "--noise_from=0", "--noise_to=0", "--settle_at=0", "--log_alpha=0", "--stop_at=1"]
    assert run(monkeypatch, *mine, f"--out={tmp_path / 'x'}") == 0
    first = metrics(tmp_path / "x", "eval")[0]
    assert first["loss"] == pytest.approx(first["reference"], rel=1e-6)


@pytest.mark.parametrize(
    "at, other, message",
    [
        (14, "--settle_at=13", "settle_at must be as in .*: its choice is fixed"),
        (14, "--target_d_ffn=16", "target_d_ffn must be as in .*: its choice is fixed"),
        (20, "--fade=9", "fade must be as in"),
        (30, "--settle_at=13", "settle_at must be as in"),
        (10, "--settle_at=9 --fade=0", "settle_at = 9: .* has 10 steps already"),
        (10, "--settle_at=9 --fade=9", "settle_at = 9: .* has 10 steps already"),
        (10, "--gates=random --settle_at=0 --noise_from=0 --noise_to=0", "gates must be 'learned', as in"),
        (10, "--phi=9 --log_alpha=1", "log_alpha, phi must be as in .*: an initial value acts only at step 0"),
    ],
)
def test_what_is_fixed_stays(settled, at, other, message, tmp_path, monkeypatch, capsys):
    out, args = settled
    again = [*args, "--steps=40", *other.split(), f"--resume={out / 'checkpoints' / f'step_{at:06d}'}"]
    assert run(monkeypatch, *again, f"--out={tmp_path / 'x'}") == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "x").exists()


def test_the_large_model_is_gone_after_the_cut(settled, tmp_path, monkeypatch):
    """Its weights, gradients and moments would be most of the memory. Its moments are gone before those of the small
    model are made: else the cut would need more memory than any step."""
    _, args = settled
    gone, train_on, read_moments = [], train.Trainer.train, cut.read_moments

    def reading(*how):
        gone.append(not train.alive[1]().state)
        read_moments(*how)

    monkeypatch.setattr(cut, "read_moments", reading)

    def watched(trainer, *how):
        if trainer.masks is not None:
            monkeypatch.setattr(
                train, "alive", [weakref.ref(trainer.model), weakref.ref(trainer.optimizer)], raising=False
            )
        end = train_on(trainer, *how)
        if trainer.masks is None:
            gone.extend(ref() is None for ref in train.alive)
        return end

    monkeypatch.setattr(train.Trainer, "train", watched)
    assert run(monkeypatch, *args, f"--out={tmp_path / 'x'}") == 0
    assert gone == [True, True, True]


def test_the_moments_outlive_the_cut(chain, tiny_data, tmp_path, monkeypatch):
    """In the checkpoints before it and after the first step of the small model: v falls by beta2 a step at most."""
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", f"--init_from={chain[0]['pretrain']}", *TARGET]
    args += ["--gates=random", "--fade=3", "--steps=4", "--save_interval=1", "--keep_checkpoints=9"]
    assert run(monkeypatch, *args) == 0
    read = {}
    for step in (3, 4):
        read[step] = load_file(tmp_path / f"x/checkpoints/step_{step:06d}/optimizer-1-of-1.safetensors")
    assert {x.item() for name, x in read[4].items() if name.endswith(".step")} == {4}
    kept = json.loads((tmp_path / "x/model/pruning.json").read_text())["hidden"]["kept"]
    before, after = (read[step]["model.norm.weight.exp_avg_sq"] for step in (3, 4))
    assert (before[kept] > 0).all() and (after >= 0.95 * before[kept] * (1 - 1e-5)).all()


@pytest.mark.parametrize("stop_at", [14, 20, 23])  # while it fades, at the cut, after it
def test_it_goes_on_from_anywhere(settled, stop_at, tmp_path, monkeypatch):
    out, args = settled
    again = tmp_path / out.name
    assert run(monkeypatch, *args, f"--out={again}", f"--stop_at={stop_at}") == 0
    assert not (again / "model").exists()
    assert run(monkeypatch, *args, f"--out={again}") == 0
    for name in ("metrics.jsonl", "model/model.safetensors", "model/pruning.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_sharded_processes_settle_as_one(settled, tmp_path):
    """FSDP with two processes, which are stopped after the cut and go on."""
    out, args = settled
    for stop in (["--stop_at=23"], []):
        done = fresh(script, "train.py", *SHAPE, *args, f"--out={tmp_path / out.name}", "--parallel=fsdp", *stop, n=2)
        assert done.returncode == 0, done.stderr
    for one, ours in zip(metrics(out, "eval"), metrics(tmp_path / out.name, "eval"), strict=True):
        assert ours["loss"] == pytest.approx(one["loss"], rel=1e-4)
    kept = (json.loads((path / "model" / "pruning.json").read_text()) for path in (out, tmp_path / out.name))
    assert next(kept) == next(kept)


def test_a_choice_that_is_not_learned_fades_out_too(chain, tiny_data, tmp_path, monkeypatch):
    args = [f"--data={tiny_data}", f"--init_from={chain[0]['pretrain']}", *TARGET, "--steps=8", "--eval_interval=2"]
    fading = [*args, "--gates=taylor", "--fade=6", f"--out={tmp_path / 'fading'}"]
    assert run(monkeypatch, *fading) == 0
    evals = {line["step"]: line for line in metrics(tmp_path / "fading", "eval")}
    source = metrics(chain[0]["pretrain"], "end")[0]["loss"]
    assert evals[0]["loss"] == pytest.approx(source, rel=1e-5)  # nothing is gone yet
    assert sorted(evals[2]["gates"]["layer"]) == pytest.approx([2 / 3, 1, 1])
    assert "gates" not in evals[8]


TARGETS_OF_0 = [f"--target_{name}=0" for name in ("n_layer", "d_model", "n_head", "d_ffn")]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--settle_at=25", "--fade=6"], "settle_at + fade = 31 must not be above steps = 30"),
        (["--settle_at=8"], "sparsity_warmup = 8 must be below settle_at = 8"),
        (["--settle_at=0"], "fade = 8 needs settle_at"),
        (["--noise_from=10"], "noise_from = 10 must be below noise_to = 10"),
        (["--gates=random"], "settle_at = 12 is for gates = 'learned', not 'random'"),
        (TARGETS_OF_0, "settle_at = 12 needs a target shape; fade = 8 needs a target shape"),
    ],
)
def test_settings_that_cannot_be(wrong, message, settled, tmp_path, monkeypatch, capsys):
    _, args = settled
    assert run(monkeypatch, *args, *wrong, f"--out={tmp_path / 'x'}") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_fading_choice_is_pruned_when_it_has_faded():
    """There the scaling law's P is the target's; learned gates are there when the target sparsity is."""
    s = Settings(steps=999, init_from="x", target_n_layer=1, gates="taylor", fade=30)
    assert (s.pruned_at, replace(s, gates="learned", fade=0).pruned_at) == (30, s.sparsity_warmup)


# -- choices that look at text ----------------------------------------------------------------------------------------


def test_taylor_scores_are_what_closing_a_gate_a_little_changes():
    """By central differences, in float64, one sequence and some gates of each kind."""
    model, size = random_llama(SOURCE).double(), 1e-5
    tokens = torch.randint(61, (1, 17), generator=torch.Generator().manual_seed(1))
    scores = choices.taylor_scores(model, [tokens])
    with torch.no_grad():
        for i, name in enumerate(Gates._fields):
            for place in ((0,), (3,)) if getattr(scores, name).dim() == 1 else ((0, 1), (2, 3)):
                losses = []
                for moved in (1 - size, 1 + size):
                    gates = [torch.ones_like(z, dtype=torch.float64) for z in scores]
                    gates[i][place] = moved
                    losses.append(model(tokens[:, :-1], Gates(*gates), targets=tokens[:, 1:]).mean().item())
                slope = abs(losses[1] - losses[0]) / (2 * size)
                assert getattr(scores, name)[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("scores_of", [choices.taylor_scores, choices.activation_scores])
def test_scores_are_means_over_the_text(scores_of):
    model, tokens = random_llama(SOURCE), torch.randint(61, (4, 17))
    once, again = scores_of(model, [tokens]), scores_of(model, [tokens[:1], tokens[1:], tokens])
    parts = [scores_of(model, [sequence]) for sequence in tokens.split(1)]
    for all_at_once, twice, *alone in zip(once, again, *parts):
        torch.testing.assert_close(all_at_once, torch.stack(alone).mean(0))
        torch.testing.assert_close(all_at_once, twice)


def test_activation_scores_are_those_of_transformers(tmp_path):
    """The same activations by hooks on the library's model."""
    config = replace(SOURCE, n_kv_head=2)
    model = random_llama(config)
    model.save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))
    seen = {}
    for i, layer in enumerate(theirs.model.layers):
        for name, module in (("head", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _, x, key=(name, i): seen.update({key: x[0].abs().mean((0, 1))}))
    norms = [norm for layer in theirs.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in norms:
        norm.register_forward_hook(lambda module, _, y: seen.update({module: y.abs().mean((0, 1))}))
    with torch.no_grad():
        states = theirs(tokens[:, :-1], output_hidden_states=True).hidden_states
    scores = choices.activation_scores(model, [tokens])
    torch.testing.assert_close(scores.hidden, sum(seen[norm] for norm in norms))
    for i in range(config.n_layer):
        torch.testing.assert_close(scores.head[i], seen["head", i].view(2, -1).mean(1))
        torch.testing.assert_close(scores.ffn[i], seen["ffn", i])
    influence = 1 - torch.cosine_similarity(states[0], states[1], dim=-1).mean()
    torch.testing.assert_close(scores.layer[0], influence)
