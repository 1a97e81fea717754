"""The tests of the tests: every misconception is rejected under its own name, every right answer passes."""

import pytest

from lecturekit.checking import questions
from lecturekit.checking.prove import prove

QUESTIONS = questions()
SERVED = {
    "lora.merge", "lora.linear", "lora.inject", "lora.count", "lora.train", "nf4.levels", "nf4.quantize",
    "nf4.dequantize", "bitdelta.compress", "perceiver.resampler", "timing.measure",
    "sft.template", "sft.batch", "sft.loss", "sft.pack", "sft.attention", "sft.step",
    "rlhf.reward", "rlhf.kl", "rlhf.rewards", "rlhf.gae", "rlhf.clip", "rlhf.group",
    "dpo.optimum", "dpo.reward", "dpo.logprob", "dpo.loss", "dpo.weight", "dpo.cache",
    "rag.chunk", "rag.pool", "rag.top_k", "rag.bm25", "rag.fuse", "rag.prompt", "rag.recall",
    "icl.prompt", "icl.shots", "icl.score", "icl.cache", "icl.calibrate", "cot.parse", "cot.vote",
    "qlora.pack", "qlora.double", "qlora.linear",
    "bitdelta.pack", "bitdelta.product", "bitdelta.distill", "bitdelta.size",
}  # fmt: skip


def test_every_promised_question_is_served():
    assert {q.id for q in QUESTIONS} >= SERVED


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("id", [q.id for q in QUESTIONS])
def test_kill_matrix(id, seed):
    # Nonsense (stubs, constants, loops …) does not depend on luck: three seeds are enough for it.
    failing = [str(trial) for trial in prove(id, seed, with_nonsense=seed < 3) if not trial.holds]
    assert not failing, "\n".join(failing)


@pytest.mark.parametrize("id", [q.id for q in QUESTIONS])
def test_a_secret_seed_judges_like_a_number(id):
    failing = [str(trial) for trial in prove(id, "3f9ac0" * 8, with_nonsense=False) if not trial.holds]
    assert not failing, "\n".join(failing)


@pytest.mark.gpu
@pytest.mark.parametrize("id", [q.id for q in QUESTIONS])
def test_kill_matrix_on_the_gpu(id):
    failing = [str(trial) for trial in prove(id, 0, device="cuda") if not trial.holds]
    assert not failing, "\n".join(failing)


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda q: q.id)
def test_a_question_says_what_a_student_and_an_instructor_need(asked):
    assert len(asked.alternatives) >= 3
    # one mistake may be written in two ways under one name; then its hint is the same too
    hints = {(m.name, m.hint) for m in asked.misconceptions}
    assert len(hints) == len({name for name, _ in hints}) >= 4
    assert all(m.name and m.hint for m in asked.misconceptions)
    assert asked.points > 0 and asked.slide and asked.title
    assert asked.lab.startswith("lab")


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda q: q.id)
def test_the_same_seed_draws_the_same_case_and_another_seed_another(asked):
    drawn = [repr(asked.draw(seed, 0).inputs) for seed in ("a", "a", "b")]
    assert drawn[0] == drawn[1]
    if asked.draw("a", 0).inputs:
        assert drawn[0] != drawn[2]
