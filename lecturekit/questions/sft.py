"""The supervised fine-tuning questions of lab 1: chat template, batch, loss, packing, its mask, one step in parts.

Slide "Supervised Fine-Tuning (SFT)": language modelling solely on desired responses.
"""

from __future__ import annotations

import math
import re
import zlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lecturekit.checking import Case, Draw, Unfit, question
from lecturekit.checking.compare import describe

LAB = "lab01_sft"
SLIDE = "Supervised Fine-Tuning (SFT): language modelling solely on desired responses"

WORDS = (
    "parcel order invoice kettle Tuesday refund account password train ticket seat phone charger broken late missing "
    "please thank hello sorry could would check address number twice never yesterday again window black two"
).split()


# sft.template --------------------------------------------------------------------------------------------------------


@question("sft.template", lab=LAB, points=20, slide=SLIDE)
def template(draw: Draw) -> Case:
    """The chat template, and which of its tokens are learnt."""
    edge = draw.edge("a system message", "two answers", "an answer of one word", "question and answer are the same")
    turns = [("user", _sentence(draw)), ("assistant", _sentence(draw))]
    if edge == "a system message":
        turns.insert(0, ("system", _sentence(draw)))
    elif edge == "two answers":
        turns += [("user", _sentence(draw)), ("assistant", _sentence(draw))]
    elif edge == "an answer of one word":
        turns[1] = ("assistant", draw.choice(WORDS))
    elif edge == "question and answer are the same":
        turns[1] = ("assistant", turns[0][1])
    return Case(edge, messages=[{"role": role, "content": content} for role, content in turns])


def _sentence(draw: Draw) -> str:
    words = [draw.choice(WORDS) for _ in range(draw.integer(3, 7))]
    return f"{' '.join(words[:2])}, {' '.join(words[2:])}{draw.choice('.?!')}"


template.oracle("lecturekit.alignment.sft:encode_dialogue")


class _Encoding(dict):
    """What calling a tokenizer gives: input_ids as an entry and as an attribute."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(input_ids=ids, attention_mask=[1] * len(ids))
        self.input_ids = ids


class _Tokenizer:
    """A tokenizer of words with the interface of a Hugging Face one, as far as the template needs it."""

    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}

    def __init__(self) -> None:
        self.pieces = {number: piece for piece, number in self.special.items()}

    def __call__(self, text: str, **_: Any) -> _Encoding:
        if not isinstance(text, str):
            raise Unfit(f"the tokenizer here takes one text, got {describe(text)}")
        ids = []
        for piece in re.findall(r"<\|\w+\|>| ?\w+|\s|[^\w\s]", text):
            number = self.special.get(piece, 3 + zlib.crc32(piece.encode()) % 10**6)
            self.pieces[number] = piece
            ids.append(number)
        return _Encoding(ids)

    def encode(self, text: str, **_: Any) -> list[int]:
        return self(text).input_ids

    def convert_tokens_to_ids(self, token: str) -> int:
        return self(token).input_ids[0]

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        raise Unfit("write the template out by hand: apply_chat_template does not say which tokens are learnt")


@template.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """The tokens as text, so that a difference can be read, and the mask."""
    tokenizer = _Tokenizer()
    result = function(tokenizer, case.messages)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Unfit(f"return two lists, (ids, mask), got {describe(result)}")
    ids, mask = (part.tolist() if isinstance(part, Tensor) else part for part in result)
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise Unfit("ids must be one flat list of whole numbers, as tokenizer(text).input_ids is")
    if not isinstance(mask, list) or not all(isinstance(m, (bool, int)) and m in (0, 1) for m in mask):
        raise Unfit("mask must be one flat list of True and False")
    if len(ids) != len(mask) or not ids:
        raise Unfit(f"ids and mask must be equally long, got {len(ids)} and {len(mask)}")
    pieces = [tokenizer.pieces.get(number, "<|unknown|>") for number in ids]
    marked = "".join(
        ("[" if m and not before else "]" if before and not m else "") + piece
        for piece, m, before in zip(pieces, mask, [False, *mask[:-1]], strict=True)
    )
    return {"chat": "".join(pieces), "chat with [learnt] tokens": marked, "mask": [int(m) for m in mask]}


template.law(
    "every answer has its end of turn among what is learnt",
    lambda case, parts: (
        len(re.findall(r"<\|im_end\|>\]", parts["chat with [learnt] tokens"] + "]" * parts["mask"][-1]))
        == sum(message["role"] == "assistant" for message in case.messages)
    ),
)


def _join(tokenizer: Any, pieces: Any) -> tuple[list[int], list[bool]]:
    """Pieces (text, learnt) → ids and mask: what answers to this question have in common."""
    ids, mask = [], []
    for text, learnt in pieces:
        found = tokenizer(text).input_ids
        ids += found
        mask += [learnt] * len(found)
    return ids, mask


def _turn(message: Any, header: bool = False, end: bool = True, newline: bool = False) -> list[tuple[str, bool]]:
    """One message in pieces; the three flags say whether an answer's header, end of turn and newline are learnt."""
    answer = message["role"] == "assistant"
    return [
        (f"<|im_start|>{message['role']}\n", answer and header),
        (message["content"], answer),
        ("<|im_end|>", answer and end),
        ("\n", answer and newline),
    ]


@template.misconception(
    "leaves the end of turn out of what is learnt",
    hint="After training the model answers, and then? From which token could it have learnt to stop?",
)
def _(tokenizer, messages):
    return _join(tokenizer, [piece for message in messages for piece in _turn(message, end=False)])


@template.misconception(
    "learns the header of the answer too",
    hint="Who writes <|im_start|>assistant when the model is used: the model, or the program that asks it?",
)
def _(tokenizer, messages):
    return _join(tokenizer, [piece for message in messages for piece in _turn(message, header=True)])


@template.misconception(
    "learns the newline after the end of turn",
    hint="Generation stops at <|im_end|>. Does the model ever have to write what comes behind it?",
)
def _(tokenizer, messages):
    return _join(tokenizer, [piece for message in messages for piece in _turn(message, newline=True)])


@template.misconception(
    "learns what the user says too", hint="The slide's title says solely. Whose words are the desired responses?"
)
def _(tokenizer, messages):
    return _join(tokenizer, [(text, True) for message in messages for text, _ in _turn(message)])


@template.misconception(
    "learns the end of every turn, the user's too",
    hint="Look at each <|im_end|> that you marked: which of them does the model write itself?",
)
def _(tokenizer, messages):
    pieces = [piece for message in messages for piece in _turn(message)]
    return _join(tokenizer, [(text, learnt or text == "<|im_end|>") for text, learnt in pieces])


@template.misconception(
    "learns only the last answer", hint="In a dialogue with two answers, what can be learnt from the first?"
)
def _(tokenizer, messages):
    pieces = [piece for message in messages[:-1] for piece in _turn(message)]
    return _join(tokenizer, [(text, False) for text, _ in pieces] + _turn(messages[-1]))


@template.misconception(
    "adds a system prompt that is not among the messages",
    hint="Some templates put words of their own in front. What does the first token have to be here?",
)
def _(tokenizer, messages):
    system = {"role": "system", "content": "You are a helpful AI assistant."}
    given = messages if messages[0]["role"] == "system" else [system, *messages]
    return _join(tokenizer, [piece for message in given for piece in _turn(message)])


@template.misconception(
    "forgets the newline between the messages", hint="What stands between <|im_end|> and the next <|im_start|>?"
)
def _(tokenizer, messages):
    return _join(tokenizer, [piece for message in messages for piece in _turn(message)[:3]])


@template.misconception(
    "writes a space after the role instead of a newline", hint="Where does the role end and the text begin?"
)
def _(tokenizer, messages):
    pieces = [piece for message in messages for piece in _turn(message)]
    return _join(tokenizer, [(re.sub(r"^(<\|im_start\|>\w+)\n", r"\1 ", text), learnt) for text, learnt in pieces])


@template.misconception(
    "opens another turn for the assistant at the end",
    hint="A prompt for generation ends with an open turn. Is this a prompt, or a finished dialogue?",
)
def _(tokenizer, messages):
    pieces = [piece for message in messages for piece in _turn(message)]
    return _join(tokenizer, [*pieces, ("<|im_start|>assistant\n", False)])


@template.misconception("leaves the end of turn out of the dialogue", hint="What closes a turn in this template?")
def _(tokenizer, messages):
    return _join(tokenizer, [_turn(message)[i] for message in messages for i in (0, 1, 3)])


@template.misconception(
    "leaves out the newline behind the last message",
    hint="Every message has the same four pieces in the template, the last one as well. Which one is missing?",
)
def _(tokenizer, messages):
    return _join(tokenizer, [piece for message in messages for piece in _turn(message)][:-1])


@template.alternative("piece by piece with encode")
def _(tok, chat):
    ids, mask = [], []
    for turn in chat:
        head = tok.encode("<|im_start|>" + turn["role"] + "\n")
        body = tok.encode(turn["content"] + "<|im_end|>")
        tail = tok.encode("\n")
        ids.extend(head + body + tail)
        mask.extend([False] * len(head) + [turn["role"] == "assistant"] * len(body) + [False] * len(tail))
    return ids, mask


@template.alternative("the whole text, then the mask from the ids")
def _(tokenizer, messages):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    ids = tokenizer(text)["input_ids"]
    roles, mask, turn, place = [m["role"] for m in messages], [], -1, 0
    for number in ids:
        if number == tokenizer.convert_tokens_to_ids("<|im_start|>"):
            turn, place, ended = turn + 1, 0, False
        mask.append(roles[turn] == "assistant" and place >= 3 and not ended)
        ended = ended or number == tokenizer.convert_tokens_to_ids("<|im_end|>")
        place += 1
    return torch.tensor(ids), torch.tensor(mask)


@template.alternative("lengths of growing prefixes")
def _(tokenizer, messages):
    so_far, mask = "", []
    for message in messages:
        for text, learnt in (
            (f"<|im_start|>{message['role']}\n", 0),
            (message["content"] + "<|im_end|>", int(message["role"] == "assistant")),
            ("\n", 0),
        ):
            so_far += text
            mask += [learnt] * (len(tokenizer(so_far).input_ids) - len(mask))
    return tokenizer(so_far).input_ids, mask


# sft.batch -----------------------------------------------------------------------------------------------------------


@question("sft.batch", lab=LAB, points=10, slide=SLIDE, returns=("input_ids", "labels"))
def batch(draw: Draw) -> Case:
    """A batch of dialogues of different lengths, with labels."""
    edge = draw.edge("the pad token is the end of turn", "one dialogue", "two answers in a dialogue")
    end = draw.integer(3, 9)
    dialogues = [_dialogue(draw, end) for _ in range(1 if edge == "one dialogue" else draw.integer(3, 4))]
    if edge == "two answers in a dialogue":
        dialogues[0] = tuple(one + two for one, two in zip(_dialogue(draw, end), _dialogue(draw, end), strict=True))
    return Case(
        edge, dialogues=dialogues, pad=end if edge == "the pad token is the end of turn" else draw.choice([0, 1])
    )


def _dialogue(draw: Draw, end: int) -> tuple[list[int], list[bool]]:
    """A prompt, an answer with its end of turn, and the newline behind it."""
    prompt, answer = draw.integer(2, 5), draw.integer(1, 6)
    ids = draw.integers(10, 60, prompt + answer + 1).tolist()
    return [*ids[:-1], end, ids[-1]], [False] * prompt + [True] * (answer + 1) + [False]


batch.oracle("lecturekit.alignment.sft:collate")


def _filled(rows: Any, value: int) -> Tensor:
    """Lists of different lengths as one tensor, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*map(int, row), *[value] * (longest - len(row))] for row in rows])


batch.law(
    "a label is either the token at its place or -100",
    lambda case, parts: bool(((parts["labels"] == parts["input_ids"]) | (parts["labels"] == -100)).all()),
)
batch.law(
    "as many labels as learnt tokens",
    lambda case, parts: int((parts["labels"] != -100).sum()) == sum(sum(mask) for _, mask in case.dialogues),
)


@batch.misconception("learns the prompt too", hint="Which tokens did the mask of the last question leave out, and why?")
def _(dialogues, pad):
    ids = [ids for ids, _ in dialogues]
    return _filled(ids, pad), _filled(ids, -100)


@batch.misconception("learns the padding", hint="Which label stands where a shorter dialogue was filled up?")
def _(dialogues, pad):
    input_ids, mask = _filled([ids for ids, _ in dialogues], pad), _filled([mask for _, mask in dialogues], 1)
    return input_ids, input_ids.masked_fill(mask == 0, -100)


@batch.misconception(
    "finds the padding by its id, and loses the end of turn with it",
    hint="SmolLM2's pad token is <|im_end|>. Which places, beside padding, hold that id?",
)
def _(dialogues, pad):
    input_ids, mask = _filled([ids for ids, _ in dialogues], pad), _filled([mask for _, mask in dialogues], 0)
    return input_ids, input_ids.masked_fill((mask == 0) | (input_ids == pad), -100)


@batch.misconception(
    "shifts the labels already", hint="The loss shifts. What happens to labels that were shifted before?"
)
def _(dialogues, pad):
    labels = [[i if m else -100 for i, m in zip(ids, mask, strict=True)][1:] + [-100] for ids, mask in dialogues]
    return _filled([ids for ids, _ in dialogues], pad), _filled(labels, -100)


@batch.misconception(
    "turns the mask around", hint="The mask is true where something is learnt. Where does -100 belong?"
)
def _(dialogues, pad):
    labels = [[-100 if m else i for i, m in zip(ids, mask, strict=True)] for ids, mask in dialogues]
    return _filled([ids for ids, _ in dialogues], pad), _filled(labels, -100)


@batch.misconception("writes 0 where nothing is learnt", hint="0 is a token. Which label does cross_entropy leave out?")
def _(dialogues, pad):
    labels = [[i if m else 0 for i, m in zip(ids, mask, strict=True)] for ids, mask in dialogues]
    return _filled([ids for ids, _ in dialogues], pad), _filled(labels, 0)


@batch.misconception("pads on the left", hint="On which side of a shorter dialogue was it to be filled up?")
def _(dialogues, pad):
    labels = [[i if m else -100 for i, m in zip(ids, mask, strict=True)][::-1] for ids, mask in dialogues]
    return _filled([ids[::-1] for ids, _ in dialogues], pad).flip(1), _filled(labels, -100).flip(1)


@batch.misconception("cuts all dialogues to the shortest", hint="How long is the longest dialogue, and your batch?")
def _(dialogues, pad):
    shortest = min(len(ids) for ids, _ in dialogues)
    labels = [[i if m else -100 for i, m in zip(ids, mask, strict=True)][:shortest] for ids, mask in dialogues]
    return _filled([ids[:shortest] for ids, _ in dialogues], pad), _filled(labels, -100)


@batch.alternative("pad_sequence")
def _(pairs, pad):
    ids = [torch.tensor(i) for i, _ in pairs]
    labels = [torch.where(torch.tensor(m), torch.tensor(i), -100) for i, m in pairs]
    pad_sequence = nn.utils.rnn.pad_sequence
    return pad_sequence(ids, batch_first=True, padding_value=pad), pad_sequence(labels, True, -100)


@batch.alternative("a loop over rows and places")
def _(dialogues, pad):
    width = max(len(ids) for ids, _ in dialogues)
    input_ids = torch.full((len(dialogues), width), pad, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for row, (ids, mask) in enumerate(dialogues):
        for place in range(len(ids)):
            input_ids[row, place] = ids[place]
            if mask[place]:
                labels[row, place] = ids[place]
    return input_ids, labels


@batch.alternative("lists first, a tuple of tensors at the end")
def _(dialogues, pad):
    width = max(len(mask) for _, mask in dialogues)
    rows, wanted = [], []
    for ids, mask in dialogues:
        gap = width - len(ids)
        rows.append(ids + [pad] * gap)
        wanted.append([token if learnt else -100 for token, learnt in zip(ids, mask, strict=True)] + [-100] * gap)
    return [torch.LongTensor(rows), torch.LongTensor(wanted)]


# sft.loss ------------------------------------------------------------------------------------------------------------


@question("sft.loss", lab=LAB, points=20, slide="Supervised Fine-Tuning (SFT): L(U) = Σ log P(u_i | u_0 … u_(i-1); Θ)")
def loss(draw: Draw) -> Case:
    """The loss on the responses of a batch."""
    edge = draw.edge(
        "one row",
        "a row without a label",
        "a label on the first token",
        "answers of very different length",
        "large logits",
    )
    rows, seq, vocab = draw.integer(2, 4), draw.integer(8, 11), draw.integer(12, 17)
    rows = 1 if edge == "one row" else rows
    place = torch.arange(seq, device=draw.device).expand(rows, seq)
    start = draw.integers(2, 3, rows).unsqueeze(1)
    end = start + draw.integers(2, 5, rows).unsqueeze(1)
    if edge == "answers of very different length":
        end[0] = start[0] + 1
        end[1:] = seq
    mask = (place >= start) & (place < end)
    if edge == "a row without a label":
        mask[0] = False
    elif edge == "a label on the first token":
        mask[:, 0] = True
    labels = draw.integers(0, vocab - 1, rows, seq).masked_fill(~mask, -100)
    return Case(
        edge, logits=draw.normal(rows, seq, vocab, scale=1000.0 if edge == "large logits" else 2.0), labels=labels
    )


loss.oracle("lecturekit.alignment.sft:response_loss")


def _token_sizes(case: Case) -> Tensor:
    """For each counted token the size of its largest logit and log(vocab): what roundings scale with."""
    sizes = case.logits.double().abs().amax(-1) + math.log(case.logits.shape[-1])
    return sizes[:, :-1][case.labels[:, 1:] != -100]


loss.tolerance(
    ulps=lambda case: case.logits.shape[-1] + case.labels.numel() + 4,
    magnitude=lambda case, _: _token_sizes(case).mean(),
    why="a log-softmax is a sum over the vocabulary, the loss a sum over the counted tokens; each rounding is of the "
    "size of the largest logit",
    part="loss",
)
loss.tolerance(
    ulps=lambda case: case.logits.shape[-1] + 6,
    magnitude=lambda case, _: 2 * (1 + case.logits.double().abs().amax(-1, keepdim=True)) / len(_token_sizes(case)),
    why="(p − 1) / count with p = exp(logit − logsumexp), which is off by p times the error of that difference",
    part="gradient of logits",
)


@loss.driver
def _(function: Any, case: Case) -> dict[str, Any]:
    """The loss, and what training sees of it."""
    logits = case.logits.requires_grad_()
    value = function(logits, case.labels)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise Unfit(f"the loss must be a tensor with one number in it, got {describe(value)}")
    if not value.requires_grad:
        raise Unfit("the loss has no gradient to the logits: a .detach(), .item(), .data or no_grad on the way?")
    (gradient,) = torch.autograd.grad(value.sum(), logits, materialize_grads=True)
    return {"loss": value.detach(), "gradient of logits": gradient}


loss.law("the loss is minus the logarithm of probabilities, so not below 0", lambda _, parts: float(parts["loss"]) >= 0)
loss.law(
    "only logits that predict a labelled token carry a gradient",
    lambda case, parts: (
        bool((parts["gradient of logits"][:, :-1][case.labels[:, 1:] == -100] == 0).all())
        and bool((parts["gradient of logits"][:, -1] == 0).all())
    ),
)


def _each(logits: Tensor, labels: Tensor) -> Tensor:
    """−log P of each label after the first, 0 where it is −100: (batch, seq − 1)."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


@loss.misconception(
    "does not shift: asks each position for the token it was given",
    hint="What does position t predict? Compare logits[:, t] with which label?",
)
def _(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@loss.misconception("shifts the wrong way", hint="Position t sees tokens 0 … t. Is the label you gave it among them?")
def _(logits, labels):
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())


_ROWS_HINT = "One answer has 3 tokens, another 300. What does a token of each weigh in your mean?"


@loss.misconception("takes the mean of each row, then the mean of the rows", hint=_ROWS_HINT)
def _(logits, labels):
    return (_each(logits, labels).sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


@loss.misconception("takes the mean of each row, then the mean of the rows", hint=_ROWS_HINT)
def _(logits, labels):
    return (_each(logits, labels).sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)).mean()


@loss.misconception(
    "takes the mean over all positions, ignored ones too",
    hint="Divide by how many tokens? What did an ignored one add to the sum?",
)
def _(logits, labels):
    return _each(logits, labels).mean()


@loss.misconception(
    "divides by the number of labels before the shift",
    hint="A label on the first token: which logits predict it? Does it belong to the count?",
)
def _(logits, labels):
    return _each(logits, labels).sum() / (labels != -100).sum()


@loss.misconception(
    "divides by the number of rows",
    hint="The sum runs over tokens. What must the count run over, so that it is a mean?",
)
def _(logits, labels):
    return _each(logits, labels).sum() / len(labels)


@loss.misconception("sums the loss instead of taking its mean", hint="Should twice the batch give twice the step?")
def _(logits, labels):
    return _each(logits, labels).sum()


@loss.misconception(
    "counts the ignored positions as token 0",
    hint="-100 is not a token to be clamped into the vocabulary. What should such a position add to the loss?",
)
def _(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten())


@loss.misconception(
    "applies softmax before cross_entropy", hint="cross_entropy takes logits: what does it do with them first?"
)
def _(logits, labels):
    return F.cross_entropy(logits.softmax(-1)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@loss.misconception(
    "returns the log-likelihood, which is to be maximised",
    hint="The slide's L(U) is maximised, an optimizer minimises. Which sign has a loss?",
)
def _(logits, labels):
    return -F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@loss.misconception(
    "takes the logarithm of a softmax that has become zero",
    hint="float32 ends near 1e-45, which is exp(-103). What is the logarithm of 0? torch can do both steps in one.",
)
def _(logits, labels):
    wanted = labels[:, 1:]
    probabilities = logits[:, :-1].softmax(-1).gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -probabilities[wanted != -100].log().mean()


_WRAP_HINT = "Which label does the last position of a row get from you? Where did that one come from?"


@loss.misconception("asks the last position of a row for a first token", hint=_WRAP_HINT)
def _(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:])


@loss.misconception("asks the last position of a row for a first token", hint=_WRAP_HINT)
def _(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.roll(-1, 1).flatten())


@loss.alternative("cross_entropy, which leaves out -100")
def _(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)


@loss.alternative("log_softmax and gather")
def _(scores, targets):
    logprobs = scores[:, :-1].log_softmax(-1)
    wanted = targets[:, 1:]
    counts = wanted != -100
    picked = logprobs.gather(-1, wanted.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counts).sum() / counts.sum()


@loss.alternative("boolean indexing and logsumexp")
def _(logits, labels):
    keep = labels[:, 1:] != -100
    scores, wanted = logits[:, :-1][keep], labels[:, 1:][keep]
    return (scores.logsumexp(-1) - scores[torch.arange(len(wanted), device=wanted.device), wanted]).mean()


@loss.alternative("loops over rows and positions, float64 inside")
def _(*arguments):
    logits, labels = arguments
    terms = [
        -torch.log_softmax(logits[row, t - 1].double(), 0)[labels[row, t]]
        for row in range(len(labels))
        for t in range(1, labels.shape[1])
        if labels[row, t] != -100
    ]
    return torch.stack(terms).mean().float()


@loss.alternative("the labels shifted, the last one filled with -100, as in transformers")
def _(logits, labels):
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.nll_loss(logits.log_softmax(-1).flatten(0, 1), shifted.flatten(), ignore_index=-100)


# sft.pack ------------------------------------------------------------------------------------------------------------


@question(
    "sft.pack", lab=LAB, points=15, slide=SLIDE, returns=("input_ids", "labels", "position_ids", "segments"), cases=7
)
def pack(draw: Draw) -> Case:
    """Several dialogues in each row."""
    edge = draw.edge(
        "a later dialogue fits an earlier row",
        "two rows have room",
        "a row is filled exactly",
        "one dialogue",
        "the first token is labelled",
    )
    length = draw.integer(10, 13)
    sizes = [draw.integer(2, 7) for _ in range(draw.integer(5, 7))]
    if edge == "a later dialogue fits an earlier row":
        sizes = [length - 3, length - 2, 3, 2]
    elif edge == "two rows have room":
        sizes = [length - 4, length - 3, 2, 3]
    elif edge == "a row is filled exactly":
        sizes = [4, length - 4, 5, length]
    elif edge == "one dialogue":
        sizes = sizes[:1]
    # but for "one dialogue", a second dialogue follows in the same row in each edge, so mistakes of a boundary show
    prompt = 0 if edge == "the first token is labelled" else 1
    sequences = []
    for size in sizes:
        ids = draw.integers(3, 60, size).tolist()
        sequences.append((ids, [-100] * prompt + ids[prompt:]))
    return Case(edge, sequences=sequences, length=length)


pack.oracle("lecturekit.alignment.sft:pack")


def _kept_whole(case: Case, parts: dict[str, Any]) -> bool:
    """Reads every dialogue back out of the rows, by its segment."""
    found = [
        ids[numbers == number].tolist()
        for ids, numbers in zip(parts["input_ids"], parts["segments"], strict=True)
        for number in range(1, int(numbers.max()) + 1)
    ]
    return sorted(found) == sorted(ids for ids, _ in case.sequences)


pack.law("every dialogue stands whole in one row, as a segment of its own", _kept_whole)
pack.law(
    "nothing is learnt on padding and on the first token of a segment",
    lambda case, parts: bool((parts["labels"][(parts["segments"] == 0) | (parts["position_ids"] == 0)] == -100).all()),
)


def _placed(sequences: Any, length: int, rule: str = "first") -> list[list[Any]]:
    """Rows of sequences under a rule: first fit, next fit (the last row only), best fit, or one a row."""
    rows: list[list[Any]] = []
    for sequence in sequences:
        room = [length - sum(len(ids) for ids, _ in row) for row in rows]
        fits = [place for place, free in enumerate(room) if free >= len(sequence[0])]
        if rule == "next":
            fits = [place for place in fits if place == len(rows) - 1]
        elif rule == "best":
            fits = sorted(fits, key=lambda place: room[place])
        if fits and rule != "alone":
            rows[fits[0]].append(sequence)
        else:
            rows.append([sequence])
    return rows


def _laid_out(rows: Any, length: int, first: int | None = -100, fill: int = -100) -> list[Tensor]:
    """Rows of sequences as four tensors. first: the label of a first token (None: its own); fill: that of padding."""
    out: list[list[list[int]]] = [[], [], [], []]
    for row in rows:
        ids, labels, positions, segments = [], [], [], []
        for number, (tokens, wanted) in enumerate(row, start=1):
            ids += tokens
            labels += wanted if first is None else [first, *wanted[1:]]
            positions += range(len(tokens))
            segments += [number] * len(tokens)
        gap = length - len(ids)
        for column, values, value in zip(out, (ids, labels, positions, segments), (0, fill, 0, 0), strict=True):
            column.append(values + [value] * gap)
    return [torch.tensor(column) for column in out]


_POSITIONS_HINT = "At which position did each dialogue start when it had a row of its own?"


@pack.misconception("lets the positions run on through the row", hint=_POSITIONS_HINT)
def _(sequences, length):
    ids, labels, positions, segments = _laid_out(_placed(sequences, length), length)
    return ids, labels, torch.arange(length).expand_as(ids) * (segments > 0), segments


@pack.misconception("lets the positions run on through the row", hint=_POSITIONS_HINT)
def _(sequences, length):
    ids, labels, positions, segments = _laid_out(_placed(sequences, length), length)
    return ids, labels, torch.arange(length).repeat(len(ids), 1), segments


@pack.misconception(
    "gives all dialogues of a row one segment", hint="How is the attention mask to know where one dialogue ends?"
)
def _(sequences, length):
    ids, labels, positions, segments = _laid_out(_placed(sequences, length), length)
    return ids, labels, positions, segments.clamp(max=1)


@pack.misconception(
    "numbers the segments from 0, like padding", hint="By its segment, what is the first dialogue of a row now?"
)
def _(sequences, length):
    ids, labels, positions, segments = _laid_out(_placed(sequences, length), length)
    return ids, labels, positions, (segments - 1).clamp(min=0)


@pack.misconception(
    "numbers the segments on from row to row",
    hint="What number does the first dialogue of the second row have? Who needs it to differ from the first row's?",
)
def _(sequences, length):
    rows = _placed(sequences, length)
    ids, labels, positions, segments = _laid_out(rows, length)
    before = torch.tensor([sum(map(len, rows[:row])) for row in range(len(rows))]).unsqueeze(1)
    return ids, labels, positions, torch.where(segments > 0, segments + before, 0)


@pack.misconception(
    "asks the last token of a dialogue for the first of the next",
    hint="After the shift, which token predicts the first one of the second dialogue? Does it know of it?",
)
def _(sequences, length):
    return tuple(_laid_out(_placed(sequences, length), length, first=None))


@pack.misconception("learns the padding", hint="Which label stands where the row was filled up?")
def _(sequences, length):
    return tuple(_laid_out(_placed(sequences, length), length, fill=0))


@pack.misconception(
    "cuts a dialogue at the end of the row",
    hint="An answer whose question stands in another row: what can be learnt from it?",
)
def _(sequences, length):
    rows, room = [[]], length
    for ids, labels in sequences:
        labels = [-100, *labels[1:]]
        while ids:
            if room == 0:
                rows.append([])
                room = length
            rows[-1].append((ids[:room], labels[:room]))
            used = min(room, len(ids))
            ids, labels, room = ids[used:], labels[used:], room - used
    return tuple(_laid_out(rows, length, first=None))


@pack.misconception(
    "looks at the last row only", hint="A short dialogue comes late. Which row has room for it, counted from the first?"
)
def _(sequences, length):
    return tuple(_laid_out(_placed(sequences, length, "next"), length))


@pack.misconception(
    "takes the fullest row that has room, not the first", hint="First fit: in which order are the rows tried?"
)
def _(sequences, length):
    return tuple(_laid_out(_placed(sequences, length, "best"), length))


@pack.misconception(
    "never fills a row to its last place", hint="A row of 10 holds 6 tokens. Does a dialogue of 4 fit behind them?"
)
def _(sequences, length):
    return tuple(_laid_out(_placed(sequences, length - 1), length))


@pack.misconception("gives each dialogue a row of its own", hint="How much of your rows is padding? Is there room?")
def _(sequences, length):
    return tuple(_laid_out(_placed(sequences, length, "alone"), length))


@pack.misconception(
    "sorts the dialogues by length first", hint="In which order do the dialogues come, in the input and in your rows?"
)
def _(sequences, length):
    longest_first = sorted(sequences, key=lambda sequence: -len(sequence[0]))
    return tuple(_laid_out(_placed(longest_first, length), length))


@pack.alternative("rows as lists that are filled up at the end")
def _(sequences, length):
    rows = []
    for ids, labels in sequences:
        row = next((row for row in rows if len(row["ids"]) + len(ids) <= length), None)
        if row is None:
            row = {"ids": [], "labels": [], "positions": [], "segments": []}
            rows.append(row)
        number = max(row["segments"], default=0) + 1
        row["ids"] += ids
        row["labels"] += [-100] + labels[1:]
        row["positions"] += list(range(len(ids)))
        row["segments"] += [number] * len(ids)
    return [
        torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in (("ids", 0), ("labels", -100), ("positions", 0), ("segments", 0))
    ]


@pack.alternative("written into full tensors")
def _(sequences, length):
    used, numbers = [], []
    columns = [torch.full((len(sequences), length), value) for value in (0, -100, 0, 0)]
    for ids, labels in sequences:
        row = 0
        while row < len(used) and used[row] + len(ids) > length:
            row += 1
        if row == len(used):
            used.append(0)
            numbers.append(0)
        numbers[row] += 1
        for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
            values = (token, label if place else -100, place, numbers[row])
            for column, value in zip(columns, values, strict=True):
                column[row, used[row] + place] = value
        used[row] += len(ids)
    return tuple(column[: len(used)] for column in columns)


@pack.alternative("places first, positions from the segments")
def _(sequences, length):
    rows, free = [], []
    for sequence in sequences:
        size = len(sequence[0])
        for row in range(len(rows) + 1):
            if row == len(rows):
                rows.append([])
                free.append(length)
            if free[row] >= size:
                rows[row].append(sequence)
                free[row] -= size
                break
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels, segments, positions = ids - 100, ids.clone(), ids.clone()
    for r, row in enumerate(rows):
        start = 0
        for s, (tokens, wanted) in enumerate(row):
            end = start + len(tokens)
            ids[r, start:end], labels[r, start:end] = torch.tensor(tokens), torch.tensor(wanted)
            labels[r, start] = -100
            segments[r, start:end] = s + 1
            start = end
        for t in range(1, start):
            positions[r, t] = positions[r, t - 1] + 1 if segments[r, t] == segments[r, t - 1] else 0
    return ids, labels, positions, segments


# sft.attention -------------------------------------------------------------------------------------------------------


@question("sft.attention", lab=LAB, points=5, slide=SLIDE, cases=5)
def attention(draw: Draw) -> Case:
    """Who may attend to whom in a packed row."""
    edge = draw.edge("one row", "one dialogue fills a row", "no padding")
    rows = 1 if edge == "one row" else draw.integer(2, 3)
    length = draw.integer(9, 12)
    segments = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        first, second = draw.integer(2, 4), draw.integer(2, 4)
        segments[row, :first] = 1
        segments[row, first : first + second] = 2
        if edge == "no padding":
            segments[row, first + second :] = 3
    if edge == "one dialogue fills a row":
        segments[-1] = 1
    return Case(edge, segments=segments.to(draw.device))


attention.oracle("lecturekit.alignment.sft:block_diagonal_mask")
attention.law("every position sees itself", lambda case, parts: bool(parts["result"].diagonal(dim1=-2, dim2=-1).all()))
attention.law("no position sees a later one", lambda case, parts: not bool(parts["result"].triu(1).any()))
attention.law(
    "no position sees another dialogue",
    lambda case, parts: (
        not bool((parts["result"][:, 0] & (case.segments.unsqueeze(2) != case.segments.unsqueeze(1))).any())
    ),
)


def _blocks(segments: Tensor) -> Tensor:
    """(rows, length, length): true where query and key are of one segment."""
    return segments.unsqueeze(2) == segments.unsqueeze(1)


@attention.misconception(
    "lets a dialogue see those packed before it",
    hint="With a row of its own, what did the second dialogue see at its first token?",
)
def _(segments):
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return causal.expand(len(segments), 1, length, length).clone()


@attention.misconception(
    "lets a token see what comes after it", hint="What would the model predict, if it could look at the answer?"
)
def _(segments):
    return _blocks(segments).unsqueeze(1)


@attention.misconception(
    "swaps queries and keys", hint="Rows of the mask are the positions that look. Which triangle is earlier?"
)
def _(segments):
    return _blocks(segments).triu().unsqueeze(1)


@attention.misconception(
    "marks what is forbidden instead of what is allowed", hint="In torch's boolean masks, what does True say?"
)
def _(segments):
    return ~_blocks(segments).tril().unsqueeze(1)


@attention.misconception(
    "does not let a token see itself", hint="What is left for the first token of a dialogue to attend to?"
)
def _(segments):
    return _blocks(segments).tril(-1).unsqueeze(1)


@attention.misconception(
    "leaves padding nothing to look at",
    hint="A softmax over nothing: what does it give? Who is harmed when padding looks at padding?",
)
def _(segments):
    return (_blocks(segments) & (segments > 0).unsqueeze(2)).tril().unsqueeze(1)


@attention.misconception(
    "forgets the dimension of the heads", hint="Scores are (rows, heads, length, length). How does your mask meet them?"
)
def _(segments):
    return _blocks(segments).tril()


@attention.misconception(
    "uses the first row's segments for all rows", hint="Do all rows have their boundaries at the same places?"
)
def _(segments):
    return _blocks(segments[:1].expand_as(segments)).tril().unsqueeze(1)


@attention.alternative("a loop over rows, queries and keys")
def _(segments):
    rows, length = segments.shape
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool, device=segments.device)
    for row in range(rows):
        for query in range(length):
            for key in range(query + 1):
                mask[row, 0, query, key] = bool(segments[row, query] == segments[row, key])
    return mask


@attention.alternative("places compared")
def _(s):
    place = torch.arange(s.shape[-1], device=s.device)
    return (s[:, None, :, None] == s[:, None, None, :]) & (place[:, None] >= place[None, :])


@attention.alternative("products of one-hot vectors")
def _(segments):
    marks = F.one_hot(segments).float()
    together = torch.einsum("rqs,rks->rqk", marks, marks) > 0.5
    return torch.tril(together)[:, None]


# sft.step ------------------------------------------------------------------------------------------------------------


@question("sft.step", lab=LAB, points=10, slide=SLIDE, cases=4)
def step(draw: Draw) -> Case:
    """One training step on a batch that comes in parts."""
    edge = draw.edge("one part", "a part with a single label")
    vocab, dim = draw.integer(9, 14), draw.integer(5, 8)
    steps = []
    for _ in range(2):
        parts = []
        for number in range(1 if edge == "one part" else 3):
            # parts of different sizes, with different numbers of labels: a mean of means is not the mean
            input_ids = draw.integers(0, vocab - 1, number + 1, 6 + 2 * number)
            labels = input_ids.clone()
            labels[:, :2] = -100
            labels[0, 4:] = -100
            if edge == "a part with a single label" and number == 0:
                labels[:, 3:] = -100
            parts.append((input_ids, labels))
        steps.append(parts)
    return Case(
        edge,
        steps=steps,
        embedding=draw.normal(vocab, dim),
        weight=draw.normal(dim, dim, scale=dim**-0.5),
        head=draw.normal(vocab, dim, scale=dim**-0.5),
        lr=draw.choice([0.1, 0.2, 0.3]),
    )


step.oracle("lecturekit.alignment.sft:train_step")
step.tolerance(
    ulps=lambda case: 2 * 3 * case.embedding.numel(),
    why="two steps, each with sums over the vocabulary, the model's width and the tokens, forward and backward",
)


class _SmallLM(nn.Module):
    """Embedding → layer → head, with the output object of a Hugging Face model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Parameter(case.embedding.clone(), requires_grad=False)
        self.weight = nn.Parameter(case.weight.clone())
        self.head = nn.Parameter(case.head.clone())

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tanh(self.embedding[input_ids] @ self.weight.T) @ self.head.T)


@step.driver
def _(train_step: Any, case: Case) -> dict[str, Any]:
    """Two steps of a small language model under plain SGD, whose steps show every fault of the gradient."""
    model = _SmallLM(case)
    optimizer = torch.optim.SGD([model.weight, model.head], lr=case.lr)
    losses = []
    for parameter in (model.weight, model.head):  # left over from something else, as after a check of the gradient
        parameter.grad = torch.ones_like(parameter)
    for parts in case.steps:
        value = train_step(model, optimizer, parts)
        if isinstance(value, Tensor):
            raise Unfit("the loss came back as a tensor; return a Python number, loss.item()")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Unfit(f"train_step must return the loss as a float, got {describe(value)}")
        losses.append(value)
    return {
        "losses": losses,
        "weight after two steps": model.weight.detach(),
        "head after two steps": model.head.detach(),
    }


step.law(
    "losses are minus the logarithm of probabilities, so none is below 0",
    lambda case, parts: all(value >= 0 for value in parts["losses"]),
)


def _sum_of(model: Any, input_ids: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    logits = model(input_ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def _count_of(parts: Any) -> int:
    return sum(int((labels[:, 1:] != -100).sum()) for _, labels in parts)


@step.misconception(
    "takes the mean of the parts' means",
    hint="One part has 2 labels, another 20. What does a token of each weigh in your loss? And in one large batch?",
)
def _(model, optimizer, parts):
    optimizer.zero_grad()
    total = sum(_sum_of(model, *part, reduction="mean") for part in parts) / len(parts)
    total.backward()
    optimizer.step()
    return total.item()


@step.misconception(
    "adds up the parts' means", hint="The same batch in twice as many parts: should the step become twice as long?"
)
def _(model, optimizer, parts):
    optimizer.zero_grad()
    total = sum(_sum_of(model, *part, reduction="mean") for part in parts)
    total.backward()
    optimizer.step()
    return total.item()


@step.misconception(
    "updates the weights after every part", hint="How many updates does one batch make, in one piece and in parts?"
)
def _(model, optimizer, parts):
    count, value = _count_of(parts), 0.0
    for part in parts:
        optimizer.zero_grad()
        loss = _sum_of(model, *part) / count
        loss.backward()
        optimizer.step()
        value += loss.item()
    return value


@step.misconception(
    "clears the gradients before every part", hint="backward adds to .grad. What is left of the first part at the end?"
)
def _(model, optimizer, parts):
    count, value = _count_of(parts), 0.0
    for part in parts:
        optimizer.zero_grad()
        loss = _sum_of(model, *part) / count
        loss.backward()
        value += loss.item()
    optimizer.step()
    return value


@step.misconception(
    "never clears the gradients", hint="backward adds to .grad. What does the second step still hold of the first?"
)
def _(model, optimizer, parts):
    count, value = _count_of(parts), 0.0
    for part in parts:
        loss = _sum_of(model, *part) / count
        loss.backward()
        value += loss.item()
    optimizer.step()
    return value


@step.misconception(
    "clears the gradients after the step only",
    hint="What does .grad hold before the very first call? Who says that it is empty?",
)
def _(model, optimizer, parts):
    count, value = _count_of(parts), 0.0
    for part in parts:
        loss = _sum_of(model, *part) / count
        loss.backward()
        value += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return value


@step.misconception(
    "divides by all tokens, ignored ones too", hint="Divide by how many tokens? What did an ignored one add to the sum?"
)
def _(model, optimizer, parts):
    optimizer.zero_grad()
    total = sum(_sum_of(model, *part) for part in parts) / sum(labels[:, 1:].numel() for _, labels in parts)
    total.backward()
    optimizer.step()
    return total.item()


@step.misconception(
    "trains on the prompt too", hint="Which tokens carry the label -100, and what should they add to the loss?"
)
def _(model, optimizer, parts):
    optimizer.zero_grad()
    total = sum(_sum_of(model, ids, ids) for ids, _ in parts) / sum(ids[:, 1:].numel() for ids, _ in parts)
    total.backward()
    optimizer.step()
    return total.item()


@step.misconception(
    "returns the last part's share of the loss only", hint="The loss of the batch: over which of its parts?"
)
def _(model, optimizer, parts):
    optimizer.zero_grad()
    count = _count_of(parts)
    for part in parts:
        loss = _sum_of(model, *part) / count
        loss.backward()
    optimizer.step()
    return loss.item()


@step.alternative("all parts in one graph, one backward")
def _(network, opt, parts):
    losses = []
    for tokens, targets in parts:
        logits = network(tokens).logits[:, :-1]
        wanted = targets[:, 1:]
        losses.append(F.cross_entropy(logits[wanted != -100], wanted[wanted != -100], reduction="none"))
    loss = torch.cat(losses).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    return float(loss.detach())


@step.alternative("each part's mean, weighted by its share")
def _(model, optimizer, parts):
    counts = [(labels[:, 1:] != -100).sum() for _, labels in parts]
    optimizer.zero_grad(set_to_none=True)
    value = 0.0
    for (input_ids, labels), count in zip(parts, counts, strict=True):
        logits = model(input_ids).logits[:, :-1]
        mean = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
        share = mean * (count / sum(counts))
        share.backward()
        value += share.item()
    optimizer.step()
    return value


@step.alternative("sums first, the gradients divided at the end")
def _(model, optimizer, parts):
    optimizer.zero_grad()
    total, count = 0.0, 0
    for input_ids, labels in parts:
        loss = F.cross_entropy(model(input_ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
        count += int((labels[:, 1:] != -100).sum())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad /= count
    optimizer.step()
    return total / count
