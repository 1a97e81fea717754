"""DPO against its equation, and against a real TRL trainer on the same batch: loss and every gradient."""

import math

import pytest
import torch

from lecturekit.alignment import dpo


def batch_of(batch=3, seq=7, vocab=11, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, seq, vocab, generator=generator)).to(dtype)
    tokens = torch.randint(0, vocab, (batch, seq), generator=generator)
    mask = torch.rand(batch, seq, generator=generator) < 0.6
    return logits, tokens, mask


@pytest.mark.parametrize("seed", range(5))
def test_sequence_logprob_token_by_token(seed):
    logits, tokens, mask = batch_of(seed=seed)
    result = dpo.sequence_logprob(logits, tokens, mask)
    for b in range(3):
        total = 0.0
        for t in range(1, 7):
            if mask[b, t]:
                scores = logits[b, t - 1].tolist()  # position t - 1 predicts token t
                total += scores[tokens[b, t]] - math.log(sum(math.exp(s) for s in scores))
        assert result[b].item() == pytest.approx(total, rel=1e-5, abs=1e-5)  # 6 float32 terms of order 10


def test_probabilities_of_all_continuations_add_up_to_one():
    vocab, seq = 3, 4
    tokens = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), *[torch.arange(vocab)] * (seq - 1))
    table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)).double()  # a model of pairs
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    total = dpo.sequence_logprob(table[tokens], tokens, mask).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_padding_the_prompt_and_the_first_position_do_not_count():
    logits, tokens, mask = batch_of()
    result = dpo.sequence_logprob(logits, tokens, mask)
    other = tokens.clone()
    other[~mask] = -100
    other[:, 0] = -100
    first = mask.clone()
    first[:, 0] = ~first[:, 0]
    noise = logits.clone()
    noise[:, -1] = 1e9  # the last position predicts nothing here
    assert torch.equal(dpo.sequence_logprob(noise, other, first), result)
    assert torch.equal(dpo.sequence_logprob(logits, tokens, torch.zeros_like(mask)), torch.zeros(3))
    longer = torch.cat([logits, torch.full((3, 2, 11), math.nan)], 1)  # NaN where nobody looks
    padded = torch.cat([tokens, torch.zeros(3, 2, dtype=torch.long)], 1)
    masked = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    assert torch.equal(dpo.sequence_logprob(longer, padded, masked), result)


def test_sequence_logprob_gradients():
    logits, tokens, mask = batch_of(2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: dpo.sequence_logprob(x, tokens, mask), [logits.requires_grad_()])


def test_half_precision_logits_are_summed_in_float32():
    logits, tokens, mask = batch_of(dtype=torch.bfloat16)
    result = dpo.sequence_logprob(logits, tokens, mask)
    assert result.dtype == torch.float32
    assert torch.equal(result, dpo.sequence_logprob(logits.float(), tokens, mask))


def test_large_logits_do_not_overflow():
    logits, tokens, mask = batch_of()
    torch.testing.assert_close(
        dpo.sequence_logprob(logits + 1000, tokens, mask),
        dpo.sequence_logprob(logits, tokens, mask),
        rtol=0,
        atol=6 * 1.3e-4,  # float32 near 1000 has steps of 6e-5; each of at most 6 terms carries two roundings
    )


def test_an_infinite_logit_is_named_wherever_it_stands_and_an_impossible_word_is_none():
    logits, tokens, mask = batch_of()
    row, place = mask[:, 1:].nonzero()[0].tolist()
    chosen = int(tokens[row, place + 1])
    for word in (chosen, (chosen + 1) % 11):
        spoilt = logits.clone()
        spoilt[row, place, word] = math.inf
        with pytest.raises(ValueError, match="free of NaN and \\+infinity"):
            dpo.sequence_logprob(spoilt, tokens, mask)
    impossible = logits.clone()
    impossible[row, place, (chosen + 1) % 11] = -math.inf
    assert dpo.sequence_logprob(impossible, tokens, mask).isfinite().all()
    impossible[row, place, chosen] = -math.inf
    assert dpo.sequence_logprob(impossible, tokens, mask)[row] == -math.inf


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_loss_is_the_papers_equation(beta):
    terms = [t.double() for t in 20 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))]
    expected = 0.0
    for pc, pr, rc, rr in zip(*(t.tolist() for t in terms), strict=True):
        expected += math.log1p(math.exp(-beta * ((pc - rc) - (pr - rr)))) / 6
    loss = dpo.dpo_loss(*terms, beta)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_policy_that_is_its_reference_has_the_loss_of_a_coin():
    chosen, rejected = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert dpo.dpo_loss(chosen, rejected, chosen, rejected, 0.3).item() == pytest.approx(math.log(2), rel=1e-6)


def test_loss_gradients():
    terms = [t.double().requires_grad_() for t in torch.randn(4, 5, generator=torch.Generator().manual_seed(0))]
    assert torch.autograd.gradcheck(lambda *t: dpo.dpo_loss(*t, 0.7), terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loss_and_gradients_stay_finite_for_margins_of_ten_thousand(dtype):
    zeros = torch.zeros(1, dtype=dtype)
    for margin, beta in ((1e4, 1.0), (-1e4, 1.0), (1e4, 0.1), (-1e4, 0.1), (1e4, 50.0), (-1e4, 50.0)):
        chosen, rejected = (torch.zeros(1, dtype=dtype).requires_grad_() for _ in range(2))
        loss = dpo.dpo_loss(chosen + margin, rejected, zeros, zeros, beta)
        loss.backward()
        came = float((zeros + margin).double())  # 1e4 as bfloat16 holds it
        assert loss.item() == pytest.approx(max(0.0, -beta * came), rel=1e-6)
        expected = -beta if margin < 0 else 0.0  # -beta sigmoid(-beta margin)
        assert chosen.grad.item() == pytest.approx(expected, rel=4e-3)  # bfloat16 keeps 8 bits
        assert rejected.grad.item() == -chosen.grad.item()


WORDS = 30


def tiny_model(seed):
    """A Llama of one layer, always the same for a seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS + 3,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def tiny_trainer(folder, beta, pairs=2, steps=-1, lr=5e-5, nll=0.0):
    """A DPOTrainer of TRL on pairs of made-up words, with a policy that already left its reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

    rows = {
        "prompt": ["w1 w2 w3", "w4 w5"],
        "chosen": [" w6 w7", " w8 w9 w10 w11"],
        "rejected": [" w12", " w13 w14"],
    }
    for extra in range(2, pairs):
        first = 3 * extra
        rows["prompt"].append(f"w{first % 30} w{(first + 7) % 30}")
        rows["chosen"].append("".join(f" w{(first + place) % 30}" for place in range(1, 2 + extra % 3)))
        rows["rejected"].append("".join(f" w{(first + 11 * place) % 30}" for place in range(1, 3 + extra % 2)))
    settings = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=2, beta=beta, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, max_steps=steps, learning_rate=lr, lr_scheduler_type="constant", max_grad_norm=0.0,
        optim="sgd", weight_decay=0.0, save_strategy="no", logging_strategy="no",
        **({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, nll]} if nll else {}),
    )  # fmt: skip
    return DPOTrainer(
        model=tiny_model(0),
        ref_model=tiny_model(1),
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=fast,
    )


def test_loss_and_gradients_equal_trls_trainer(tmp_path):
    beta = 0.3
    trainer = tiny_trainer(tmp_path, beta)
    policy, reference = trainer.accelerator.unwrap_model(trainer.model), trainer.ref_model
    assert trainer.loss_types == ["sigmoid"]
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert inputs["completion_mask"].sum() == 13  # 3 + 5 chosen and 2 + 3 rejected tokens, each with its end
    theirs = trainer.compute_loss(trainer.model, dict(inputs))
    theirs.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()

    def logprobs(model):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        # TRL stacks the chosen answers over the rejected ones.
        return dpo.sequence_logprob(logits, inputs["input_ids"], inputs["completion_mask"].bool()).chunk(2)

    with torch.no_grad():
        reference_chosen, reference_rejected = logprobs(reference)
    ours = dpo.dpo_loss(*logprobs(policy), reference_chosen, reference_rejected, beta)
    assert abs(ours.item() - math.log(2)) > 0.01  # not the trivial loss of two equal models
    # Sums of 13 float32 terms of order 10, and gradients of order 1 through one small layer.
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)
    ours.backward()
    assert set(gradients) == {name for name, p in policy.named_parameters() if p.grad is not None}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.01
    for name, parameter in policy.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


LOGITS, TOKENS, MASK = batch_of(2, 4, 5)
ALL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1.0], TOKENS, MASK), TypeError, "logits must be a torch.Tensor"),
        ((LOGITS[0], TOKENS, MASK), ValueError, "logits must have 3 dimension"),
        ((LOGITS.long(), TOKENS, MASK), TypeError, "logits must have a floating-point dtype"),
        ((LOGITS[:, :0], TOKENS[:, :0], MASK[:, :0]), ValueError, "logits must not be empty"),
        ((LOGITS[:, :1], TOKENS[:, :1], MASK[:, :1]), ValueError, "logits must cover at least 2 positions"),
        ((LOGITS, TOKENS.float(), MASK), TypeError, "tokens must have an integer dtype, got torch.float32"),
        ((LOGITS, TOKENS[:, :3], MASK), ValueError, r"tokens must be \(batch, seq\) = \(2, 4\).* got \(2, 3\)"),
        ((LOGITS, TOKENS + 5, ALL), ValueError, r"tokens must be in 0\.\.4 where mask is true"),
        ((LOGITS, TOKENS - 5, ALL), ValueError, r"tokens must be in 0\.\.4 where mask is true"),
        ((LOGITS, TOKENS, MASK.float()), TypeError, "mask must have dtype torch.bool, got torch.float32"),
        ((LOGITS, TOKENS, MASK.T), ValueError, r"mask must be \(batch, seq\) = \(2, 4\)"),
        ((LOGITS * math.nan, TOKENS, ALL), ValueError, "logits must be free of NaN"),
        ((LOGITS * -math.inf, TOKENS, ALL), ValueError, "logits must be free of NaN"),  # both infinities
        ((torch.full_like(LOGITS, -math.inf), TOKENS, ALL), ValueError, "not all -infinity there"),
        ((LOGITS, TOKENS > 1, MASK), TypeError, "tokens must have an integer dtype, got torch.bool"),
    ],
)
def test_bad_arguments_of_sequence_logprob_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        dpo.sequence_logprob(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"policy_chosen": 1.0}, TypeError, "policy_chosen must be a torch.Tensor"),
        ({"policy_chosen": torch.ones(0)}, ValueError, "policy_chosen must not be empty"),
        ({"policy_rejected": torch.ones(3, 1)}, ValueError, "policy_rejected must have 1 dimension"),
        ({"policy_rejected": torch.ones(1)}, ValueError, r"policy_rejected must be \(batch,\) = \(3,\), got \(1,\)"),
        ({"reference_chosen": torch.ones(3).long()}, TypeError, "reference_chosen must have a floating-point dtype"),
        ({"reference_rejected": torch.full((3,), math.nan)}, ValueError, "reference_rejected must be finite"),
        ({"beta": 0}, ValueError, "beta must be above 0, got 0"),
        ({"beta": None}, TypeError, "beta must be a number"),
        ({"beta": math.inf}, ValueError, "beta must be finite"),
    ],
)
def test_bad_arguments_of_the_loss_are_named(change, error, words):
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    with pytest.raises(error, match=words):
        dpo.dpo_loss(**{**{name: torch.ones(3) for name in names}, "beta": 0.1, **change})


# the derivation: optimum, implicit reward, gradient ------------------------------------------------------------------


def distributions(rows=3, answers=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, answers, generator=generator).double().softmax(-1)
    return reference, torch.randn(rows, answers, generator=generator).double()


def objective(policy, reference, rewards, beta):
    return (policy * rewards).sum(-1) - beta * (policy * (policy.log() - reference.log())).sum(-1)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_no_policy_beats_the_optimum(beta):
    reference, rewards = distributions()
    best = dpo.optimal_policy(reference, rewards, beta)
    reached = objective(best, reference, rewards, beta)
    # its value is beta log Z, which needs no policy at all
    log_z = (reference * (rewards / beta).exp()).sum(-1).log()
    torch.testing.assert_close(reached, beta * log_z, rtol=1e-10, atol=1e-10)
    generator = torch.Generator().manual_seed(1)
    for size in (0.01, 0.3, 3.0):
        noise = size * torch.randn(200, *best.shape, generator=generator).double()
        others = (best.log() + noise).softmax(-1)
        assert (objective(others, reference, rewards, beta) < reached).all()


def test_the_optimum_keeps_its_edges():
    reference, rewards = distributions()
    torch.testing.assert_close(dpo.optimal_policy(reference, torch.full_like(rewards, 7.0), 0.3), reference)
    reference[:, 0] = 0
    reference /= reference.sum(-1, keepdim=True)
    found = dpo.optimal_policy(reference.float(), 1e5 * rewards.float(), 0.1)
    assert found.isfinite().all() and (found[:, 0] == 0).all()
    assert (found.argmax(-1) == rewards[:, 1:].argmax(-1) + 1).all()
    assert dpo.optimal_policy(reference.bfloat16(), rewards.bfloat16(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_implicit_reward_of_the_optimum_is_the_reward_up_to_a_constant_a_prompt(beta):
    reference, rewards = distributions()
    policy = dpo.optimal_policy(reference, rewards, beta)
    shift = rewards - dpo.implicit_reward(policy.log(), reference.log(), beta)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=1e-9, atol=1e-9)
    log_z = (reference * (rewards / beta).exp()).sum(-1).log()
    torch.testing.assert_close(shift[:, 0], beta * log_z, rtol=1e-9, atol=1e-9)  # eq. 5


def test_the_loss_is_that_of_bradley_terry_on_implicit_rewards():
    pc, pr, rc, rr = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    chosen, rejected = dpo.implicit_reward(pc, rc, 0.4), dpo.implicit_reward(pr, rr, 0.4)
    expected = -(chosen.exp() / (chosen.exp() + rejected.exp())).log().mean()
    torch.testing.assert_close(dpo.dpo_loss(pc, pr, rc, rr, 0.4), expected, rtol=1e-12, atol=0)


def test_the_gradient_weighs_pairs_as_the_paper_says():
    terms = [t.double().requires_grad_() for t in 5 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))]
    beta = 0.3
    dpo.dpo_loss(*terms, beta).backward()
    weight = dpo.gradient_weight(*(t.detach() for t in terms), beta)
    torch.testing.assert_close(terms[0].grad, -beta * weight / 6, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms[1].grad, beta * weight / 6, rtol=1e-12, atol=0)
    assert weight.max() > 0.6 and weight.min() < 0.4


def test_the_nll_term_is_the_mean_over_all_tokens_of_the_winners():
    terms = -torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) * 9
    lengths = torch.tensor([2, 5, 1])
    loss = dpo.dpo_nll_loss(*terms, lengths, 0.1, 0.7)
    expected = dpo.dpo_loss(*terms, 0.1) - 0.7 * terms[0].sum() / 8
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(dpo.dpo_nll_loss(*terms, lengths, 0.1, 0), dpo.dpo_loss(*terms, 0.1))


class Noisy(torch.nn.Module):
    """A reference with dropout that counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout, self.calls = torch.nn.Linear(4, 2), torch.nn.Dropout(0.5), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(self.dropout(x)).log_softmax(-1).unbind(1)


def test_the_reference_is_asked_once_without_noise_or_graph_and_left_as_it_was():
    reference = Noisy()
    batches = list(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)))
    cached = dpo.reference_logprobs(reference, iter(batches))
    assert reference.calls == 3 and reference.training
    assert not any(term.requires_grad for pair in cached for term in pair)
    reference.eval()
    for batch, pair in zip(batches, cached, strict=True):
        assert all(torch.equal(*both) for both in zip(reference(batch), pair, strict=True))
    function = dpo.reference_logprobs(lambda x: (x[:, 0], x[:, 1]), batches)  # needs not be a module
    assert torch.equal(function[1][0], batches[1][:, 0])
    with pytest.raises(TypeError, match="reference must be callable, got int"):
        dpo.reference_logprobs(3, batches)


REFERENCE, REWARDS = torch.full((2, 4), 0.25), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0.5], REWARDS, 1.0), TypeError, "reference must be a torch.Tensor"),
        ((REFERENCE, REWARDS[:1], 1.0), ValueError, r"rewards must have reference's shape \(2, 4\), got \(1, 4\)"),
        ((2 * REFERENCE, REWARDS, 1.0), ValueError, "reference must hold probabilities"),
        ((torch.tensor([[1.5, -0.5]]), torch.ones(1, 2), 1.0), ValueError, "reference must hold probabilities"),
        ((REFERENCE, REWARDS * math.nan, 1.0), ValueError, "rewards must be finite"),
        ((REFERENCE, REWARDS, 0), ValueError, "beta must be above 0"),
        ((torch.tensor(1.0), torch.tensor(1.0), 1.0), ValueError, "reference must have a dimension of answers"),
    ],
)
def test_bad_arguments_of_the_optimum_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        dpo.optimal_policy(*arguments)


@pytest.mark.parametrize(
    ("lengths", "weight", "error", "words"),
    [
        (torch.ones(3), 1.0, TypeError, "chosen_tokens must have an integer dtype, got torch.float32"),
        (torch.ones(2).long(), 1.0, ValueError, r"chosen_tokens must have policy_chosen's shape \(3,\)"),
        (torch.zeros(3).long(), 1.0, ValueError, "chosen_tokens must be at least 1"),
        (torch.ones(3).long(), -1.0, ValueError, "weight must not be negative"),
    ],
)
def test_bad_arguments_of_the_nll_term_are_named(lengths, weight, error, words):
    with pytest.raises(error, match=words):
        dpo.dpo_nll_loss(*(torch.ones(3) for _ in range(4)), lengths, 0.1, weight)
    with pytest.raises(ValueError, match=r"reference must have policy's shape \(3,\), got \(2,\)"):
        dpo.implicit_reward(torch.ones(3), torch.ones(2), 0.1)


# a run beside TRL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nll", [0.0, 0.5])
def test_a_run_tracks_trls_trainer_step_by_step(tmp_path, nll):
    """Ours starts from the same weights and is shown the batches that TRL drew; then losses and weights must agree."""
    from transformers import TrainerCallback

    beta, lr, steps = 0.3, 0.1, 8
    trainer = tiny_trainer(tmp_path, beta, pairs=8, steps=steps, lr=lr, nll=nll)
    ours, reference = tiny_model(0), tiny_model(1)
    seen, theirs, snapshots = [], [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            snapshots.append([p.detach().clone() for p in trainer.model.parameters()])

    compute = trainer.compute_loss

    def watched(model, inputs, *arguments, **options):
        seen.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        loss = compute(model, inputs, *arguments, **options)
        theirs.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    trainer.compute_loss = watched
    trainer.add_callback(Watch())
    trainer.train()
    assert len(seen) == len(snapshots) == steps
    assert len({tuple(batch["input_ids"].flatten().tolist()) for batch in seen}) > 2  # not one batch again and again

    def logprobs(model):
        def both(batch):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return dpo.sequence_logprob(logits, batch["input_ids"], batch["completion_mask"].bool()).chunk(2)

        return both

    cached = dpo.reference_logprobs(logprobs(reference), seen)
    ours.train()
    optimizer = torch.optim.SGD(ours.parameters(), lr=lr)
    losses, drift = [], 0.0
    for step, (batch, terms) in enumerate(zip(seen, cached, strict=True)):
        lengths = batch["completion_mask"].sum(1).chunk(2)[0]
        loss = dpo.dpo_nll_loss(*logprobs(ours)(batch), *terms, lengths, beta, nll)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        # plain SGD, whose steps show a gradient as it is: Adam would make a rounding of a zero gradient a step of lr
        # what a step adds: each weight is rounded, and so is lr times a gradient, whose longest sums run over the
        # vocabulary and the width of 16
        weight = max(float(p.detach().abs().max()) for p in ours.parameters())
        gradient = max(float(p.grad.abs().max()) for p in ours.parameters() if p.grad is not None)
        drift += torch.finfo(torch.float32).eps * (weight + lr * (WORDS + 3 + 16) * gradient)
        for mine, other in zip(ours.parameters(), snapshots[step], strict=True):
            torch.testing.assert_close(mine.detach(), other, rtol=0, atol=drift)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
    assert max(losses) - min(losses) > 0.05  # it learned something
