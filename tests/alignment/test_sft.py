"""The pieces of supervised fine-tuning against transformers and against the plain way: one dialogue a row."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from lecturekit import data
from lecturekit.alignment import sft

CHAT = [
    {"role": "user", "content": "My kettle leaks."},
    {"role": "assistant", "content": "Where does it drip?"},
    {"role": "user", "content": "At the lid."},
    {"role": "assistant", "content": "Then a new lid will do."},
]


@pytest.fixture(scope="module")
def smollm2():
    from lecturekit.models import load_language_model

    return load_language_model(device="cpu")


def tiny_llama(attention="sdpa", seed=0):
    """A Llama of two small layers with random weights, wide enough apart that a wrong mask shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def random_sequences(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 12, (count,), generator=generator).tolist()
    sequences = []
    for size in sizes:
        ids = torch.randint(3, 60, (size,), generator=generator).tolist()
        sequences.append((ids, [-100, *ids[1:]]))
    return sequences


# template ------------------------------------------------------------------------------------------------------------


def test_the_template_word_by_word():
    assert sft.render_chat(CHAT[:2]) == (
        "<|im_start|>user\nMy kettle leaks.<|im_end|>\n<|im_start|>assistant\nWhere does it drip?<|im_end|>\n"
    )
    assert sft.render_chat(CHAT[:1], add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.models
def test_text_and_tokens_are_the_tokenizers_own_on_every_dialogue_of_ours(smollm2):
    _, tokenizer = smollm2
    corpus = data.load("customer_service")
    dialogues = [row["messages"] for split in ("train", "test", "safety_train", "safety_test") for row in corpus[split]]
    dialogues.append([{"role": "system", "content": "Be brief."}, *CHAT])
    assert len(dialogues) > 600
    for messages in dialogues:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert sft.render_chat(messages) == text
        ids, mask = sft.encode_dialogue(tokenizer, messages)
        assert ids == tokenizer(text).input_ids and len(mask) == len(ids)


@pytest.mark.models
def test_what_is_learnt_is_what_generation_must_write(smollm2):
    _, tokenizer = smollm2
    ids, mask = sft.encode_dialogue(tokenizer, CHAT)
    runs = ["".join(tokenizer.decode([i]) for i, _ in run) for learnt, run in
            itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]) if learnt]  # fmt: skip
    assert runs == ["Where does it drip?<|im_end|>", "Then a new lid will do.<|im_end|>"]
    prompt = tokenizer(sft.render_chat(CHAT[:1], add_generation_prompt=True)).input_ids
    assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)


@pytest.mark.models
@pytest.mark.parametrize("content", [" starts with a space", "\n\nlines", "ends with one ", "Ünïcode – 12,345 €"])
def test_answers_are_tokenized_as_generation_would_see_them(smollm2, content):
    _, tokenizer = smollm2
    messages = [CHAT[0], {"role": "assistant", "content": content}]
    ids, mask = sft.encode_dialogue(tokenizer, messages)
    assert tokenizer.decode(ids) == sft.render_chat(messages)
    prompt = tokenizer(sft.render_chat(CHAT[:1], add_generation_prompt=True)).input_ids
    assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([], ValueError, "at least one message"),
        ("hello", TypeError, "messages must be a list of dicts"),
        ({"role": "user", "content": "x"}, TypeError, "messages must be a list of dicts"),
        ([{"role": "user"}], TypeError, r"messages\[0\] must be a dict with a role and a text"),
        ([{"role": "user", "content": None}], TypeError, r"messages\[0\] must be a dict"),
        ([CHAT[0], {"role": "bot", "content": "x"}], ValueError, r"messages\[1\] must have one of the roles"),
    ],
)
def test_a_dialogue_that_is_none_is_named(messages, error, words):
    with pytest.raises(error, match=words):
        sft.render_chat(messages)


# labels and batches --------------------------------------------------------------------------------------------------


def test_labels_are_the_tokens_that_are_learnt():
    ids = torch.tensor([[5, 6, 7, 8]], dtype=torch.int32)
    labels = sft.response_labels(ids, torch.tensor([[False, False, True, True]]))
    assert labels.tolist() == [[-100, -100, 7, 8]] and labels.dtype == torch.int64
    assert ids.tolist() == [[5, 6, 7, 8]]
    with pytest.raises(ValueError, match=r"mask must have the shape of ids, \(1, 4\), got \(1, 3\)"):
        sft.response_labels(ids, torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must have dtype torch.bool"):
        sft.response_labels(ids, torch.zeros(1, 4))


def test_ids_that_are_no_integers_are_named_and_not_cut():
    mask = torch.ones(1, 2, dtype=torch.bool)
    for ids in (torch.tensor([[1.7, 2.0]]), mask):
        with pytest.raises(TypeError, match="ids must have an integer dtype"):
            sft.response_labels(ids, mask)
    with pytest.raises(TypeError, match=r"the ids of dialogues\[1\] must have an integer dtype, got torch.float32"):
        sft.collate([([1], [True]), ([1.5, 2.0], [True, False])], pad=0)
    with pytest.raises(TypeError, match="the ids of every sequence must have an integer dtype"):
        sft.pack([([1.5], [1])], length=2)
    with pytest.raises(TypeError, match="the labels of every sequence must have an integer dtype"):
        sft.pack([([1, 2], [1, 2.5])], length=2)


def test_padding_with_the_end_of_turn_keeps_the_end_of_turn_learnt():
    end = 2
    ids, labels = sft.collate([([9, 8, 7, end], [False, True, True, True]), ([9, end], [False, True])], pad=end)
    assert ids.tolist() == [[9, 8, 7, end], [9, end, end, end]]
    assert labels.tolist() == [[-100, 8, 7, end], [-100, end, -100, -100]]
    with pytest.raises(ValueError, match="at least one pair"):
        sft.collate([], pad=0)
    with pytest.raises(ValueError, match=r"dialogues\[1\] must be two lists of one length.*3 ids and a mask of 2"):
        sft.collate([([1], [True]), ([1, 2, 3], [True, False])], pad=0)


# loss ----------------------------------------------------------------------------------------------------------------


def batch_of(rows=3, seq=9, vocab=13, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, seq, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (rows, seq), generator=generator)
    return logits, labels.masked_fill(torch.rand(rows, seq, generator=generator) < 0.4, -100)


@pytest.mark.parametrize("seed", range(5))
def test_loss_token_by_token(seed):
    logits, labels = batch_of(seed=seed)
    terms = []
    for row, t in itertools.product(range(3), range(1, 9)):
        if labels[row, t] != -100:
            scores = logits[row, t - 1].tolist()
            terms.append(math.log(sum(map(math.exp, scores))) - scores[labels[row, t]])
    # some 15 terms of order 10 in float32
    assert sft.response_loss(logits, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_loss_equals_transformers_with_labels():
    model = tiny_llama()
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 8:] = -100
    out = model(ids, labels=labels)
    torch.testing.assert_close(sft.response_loss(out.logits, labels), out.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.models
def test_loss_equals_transformers_on_the_real_model(smollm2):
    model, tokenizer = smollm2
    ids, labels = sft.collate([sft.encode_dialogue(tokenizer, CHAT), sft.encode_dialogue(tokenizer, CHAT[:2])], pad=2)
    with torch.no_grad():
        out = model(ids, labels=labels)  # causal: padding on the right is seen by nothing that counts
        ours = sft.response_loss(out.logits, labels)
    assert ours.item() == pytest.approx(out.loss.item(), rel=1e-5)  # thirty terms of order 10 in float32


def test_only_logits_that_predict_a_response_get_a_gradient():
    logits, labels = batch_of()
    logits.requires_grad_()
    sft.response_loss(logits, labels).backward()
    counted = F.pad(labels[:, 1:] != -100, (0, 1))
    assert bool((logits.grad[~counted] == 0).all()) and bool((logits.grad[counted].abs().amax(-1) > 0).all())


def test_loss_gradients_and_half_precision():
    logits, labels = batch_of(2, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sft.response_loss(x, labels), [logits.requires_grad_()])
    half, labels = batch_of(dtype=torch.bfloat16)
    loss = sft.response_loss(half, labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, sft.response_loss(half.float(), labels))


def test_padding_and_more_rows_of_it_change_nothing():
    logits, labels = batch_of()
    longer = torch.cat([logits, torch.full((3, 4, 13), math.nan)], dim=1)  # NaN where nobody looks
    padded = F.pad(labels, (0, 4), value=-100)
    assert torch.equal(sft.response_loss(longer, padded), sft.response_loss(logits, labels))


@pytest.mark.parametrize(
    ("logits", "labels", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), ValueError, "logits must have 3 dimension"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4).long(), ValueError, r"labels must be \(batch, seq\) = \(2, 3\)"),
        (torch.zeros(2, 3, 4), torch.full((2, 3), -100), ValueError, "all of them are -100"),
        ([1.0], torch.zeros(2, 3).long(), TypeError, "logits must be a torch.Tensor"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), TypeError, "labels must have an integer dtype, got torch.float32"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3).bool(), TypeError, "labels must have an integer dtype, got torch.bool"),
        (torch.zeros(2, 3, 4), torch.full((2, 3), 4), ValueError, r"labels must be in 0\.\.3 or -100, got one outside"),
        (torch.zeros(2, 3, 4), torch.full((2, 3), -1), ValueError, r"labels must be in 0\.\.3 or -100"),
    ],
)
def test_bad_arguments_of_the_loss_are_named(logits, labels, error, words):
    with pytest.raises(error, match=words):
        sft.response_loss(logits, labels)


# one step in parts ---------------------------------------------------------------------------------------------------


def test_a_batch_in_parts_moves_the_weights_as_the_batch_in_one_piece():
    ids, labels = sft.collate(
        [(ids, [label != -100 for label in labels]) for ids, labels in random_sequences(6)], pad=0
    )
    labels[0, 2:] = -100  # the parts must not count equally many
    parts = [(ids[:1], labels[:1]), (ids[1:3], labels[1:3]), (ids[3:], labels[3:])]
    found = []
    for given in (parts, [(ids, labels)]):
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = sft.train_step(model, optimizer, given)
        found.append((loss, [p.detach().clone() for p in model.parameters()]))
    (loss, weights), (whole_loss, whole_weights) = found
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for one, other in zip(weights, whole_weights, strict=True):
        # float32 sums over forty tokens in another order, times a learning rate of 0.1
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(weights, tiny_llama().parameters(), strict=True))


def test_a_part_without_a_label_is_no_trouble_and_a_batch_without_one_is():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    nothing = (ids, torch.full_like(ids, -100))
    assert sft.train_step(model, optimizer, [(ids, ids), nothing]) > 0
    with pytest.raises(ValueError, match="at least one labelled token"):
        sft.train_step(model, optimizer, [nothing])


def test_the_parts_may_come_from_a_generator():
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    parts = [(ids[:1], ids[:1]), (ids[1:], ids[1:])]
    found = []
    for given in (parts, iter(parts)):
        model = tiny_llama()
        loss = sft.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), given)
        found.append((loss, [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0] > 0
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        sft.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [(ids, ids.float())])


# packing -------------------------------------------------------------------------------------------------------------


def test_first_fit_by_hand():
    ids = {"a": [11, 12, 13], "b": [21, 22, 23, 24], "c": [31, 32], "d": [41]}
    packed = sft.pack([(i, list(i)) for i in ids.values()], length=5)
    assert packed.input_ids.tolist() == [[11, 12, 13, 31, 32], [21, 22, 23, 24, 41]]
    assert packed.labels.tolist() == [[-100, 12, 13, -100, 32], [-100, 22, 23, 24, -100]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 2]]


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_cut_or_doubled(seed):
    sequences = random_sequences(12, seed)
    packed = sft.pack(sequences, length=20, pad=1)
    found = []
    for row in range(len(packed.input_ids)):
        for segment in range(1, int(packed.segments[row].max()) + 1):
            here = packed.segments[row] == segment
            places = here.nonzero().flatten()
            assert places.tolist() == list(range(places[0], places[-1] + 1)), "a segment is one run"
            assert packed.position_ids[row][here].tolist() == list(range(len(places)))
            found.append((packed.input_ids[row][here].tolist(), packed.labels[row][here].tolist()))
    assert sorted(found) == sorted(sequences)
    padding = packed.segments == 0
    assert bool((packed.input_ids[padding] == 1).all()) and bool((packed.labels[padding] == -100).all())
    lengths = sorted((len(ids) for ids, _ in sequences), reverse=True)
    assert -(-sum(lengths) // 20) <= len(packed.input_ids) <= len(sequences)


@pytest.mark.parametrize(
    ("sequences", "length", "words"),
    [
        ([], 4, "at least one pair"),
        ([([1, 2, 3], [1, 2, 3])], 2, r"sequences\[0\] has 3 tokens, more than a row of 2"),
        ([([1], [1]), ([], [])], 4, r"sequences\[1\] must be two lists of one length, not empty"),
        ([([1, 2], [1])], 4, r"sequences\[0\] must be two lists of one length"),
        ([([1], [1])], 0, "length must be at least 1"),
    ],
)
def test_what_cannot_be_packed_is_named(sequences, length, words):
    with pytest.raises(ValueError, match=words):
        sft.pack(sequences, length)


def test_the_mask_by_hand():
    mask = sft.block_diagonal_mask(torch.tensor([[1, 1, 2, 0]]))
    assert mask.shape == (1, 1, 4, 4) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    added = sft.block_diagonal_mask(torch.tensor([[1, 1, 2, 0]]), dtype=torch.float32)
    assert torch.equal(added == 0, mask) and bool((added[~mask] == torch.finfo(torch.float32).min).all())
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
        sft.block_diagonal_mask(torch.tensor([[1]]), dtype=torch.int64)
    with pytest.raises(ValueError, match="segments must have 2 dimension"):
        sft.block_diagonal_mask(torch.tensor([1]))


def logits_of(model, packed, dtype=None):
    mask = sft.block_diagonal_mask(packed.segments, dtype)
    with torch.no_grad():
        return model(
            packed.input_ids, attention_mask=mask, position_ids=packed.position_ids, use_cache=False
        ).logits  # (rows, length, vocab)


def largest_differences(model, sequences, packed, logits):
    """For each sequence the largest difference of a logit between its place in a row and a row of its own."""
    found = {}
    for row in range(len(packed.input_ids)):
        for segment in range(1, int(packed.segments[row].max()) + 1):
            here = packed.segments[row] == segment
            ids = packed.input_ids[row][here]
            with torch.no_grad():
                alone = model(ids[None], use_cache=False).logits[0]
            found[tuple(ids.tolist())] = (logits[row][here] - alone).abs().max().item()
    assert len(found) == len(sequences)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_those_of_separate_rows(attention):
    model = tiny_llama(attention)
    sequences = random_sequences()
    packed = sft.pack(sequences, length=24)
    assert int(packed.segments.max()) > 1
    logits = logits_of(model, packed, torch.float32 if attention == "eager" else None)
    # two layers of width 32 with logits of order 10: a few hundred roundings of 6e-8 of that
    assert max(largest_differences(model, sequences, packed, logits).values()) < 2e-4


def test_without_blocks_or_with_positions_running_on_they_do_not():
    model = tiny_llama()
    sequences = random_sequences()
    packed = sft.pack(sequences, length=24)
    causal = torch.ones(24, 24, dtype=torch.bool).tril().expand(len(packed.input_ids), 1, 24, 24)
    running = torch.arange(24).expand_as(packed.input_ids)
    with torch.no_grad():
        leaking = model(packed.input_ids, attention_mask=causal, position_ids=packed.position_ids).logits
    assert max(largest_differences(model, sequences, packed, leaking).values()) > 0.1
    with torch.no_grad():
        # rotary embeddings only see distances, which blocks keep: here the positions alone change nothing
        shifted = model(
            packed.input_ids, attention_mask=sft.block_diagonal_mask(packed.segments), position_ids=running
        ).logits
    assert max(largest_differences(model, sequences, packed, shifted).values()) < 2e-4


def test_packed_loss_and_gradients_equal_those_of_the_padded_batch():
    sequences = random_sequences()
    packed = sft.pack(sequences, length=24)
    ids, labels = sft.collate([(ids, [label != -100 for label in labels]) for ids, labels in sequences], pad=0)
    found = []
    for which in ("packed", "padded"):
        model = tiny_llama()
        if which == "packed":
            mask = sft.block_diagonal_mask(packed.segments)
            logits = model(packed.input_ids, attention_mask=mask, position_ids=packed.position_ids).logits
            loss = sft.response_loss(logits, packed.labels)
        else:
            loss = sft.response_loss(model(ids).logits, labels)
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        # sums over fifty tokens through two layers, in another order
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.models
@pytest.mark.slow
def test_packed_logits_equal_those_of_separate_rows_on_the_real_model(smollm2):
    model, tokenizer = smollm2
    rows = data.load("customer_service")["train"].select(range(4))
    sequences = []
    for row in rows:
        ids, mask = sft.encode_dialogue(tokenizer, row["messages"])
        sequences.append((ids, [token if learnt else -100 for token, learnt in zip(ids, mask, strict=True)]))
    packed = sft.pack(sequences, length=sum(len(ids) for ids, _ in sequences))
    assert len(packed.input_ids) == 1
    logits = logits_of(model, packed)
    # thirty layers, each with a few sums in another order: some hundreds of float32 roundings of 6e-8 of the largest
    # logit, and as many again because a later layer enlarges what an earlier one got wrong
    assert max(largest_differences(model, sequences, packed, logits).values()) < 1e-4 * logits.abs().max().item()
