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


def tiny_trainer(folder, beta):
    """A DPOTrainer of TRL on two pairs of made-up words, with a policy that already left its reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

    def model(seed):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                initializer_range=0.3,
                pad_token_id=0,
                eos_token_id=1,
            )
        )

    pairs = {
        "prompt": ["w1 w2 w3", "w4 w5"],
        "chosen": [" w6 w7", " w8 w9 w10 w11"],
        "rejected": [" w12", " w13 w14"],
    }
    settings = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=2, beta=beta, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    return DPOTrainer(
        model=model(0), ref_model=model(1), args=settings, train_dataset=Dataset.from_dict(pairs), processing_class=fast
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
