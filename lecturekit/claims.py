"""What the lecture claims, row by row, and where its slides slip.

Every claim ends as something a student computes: ``exact`` (arithmetic or a configuration, the very number),
``effect`` (same direction and shape at a scale a laptop holds), or ``works`` (code that does what the slide says).
`lecturekit.results` checks measurements against this list and prints both side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("exact", "effect", "works")


@dataclass(frozen=True)
class Claim:
    """One row of the ledger.

    id: "C01" to "C40". part: heading of the lecture plan. slide: title of the slide. text: the claim in our words.
    kind: words of KINDS joined by " + ". paper: the figures printed on the slide, "" where it prints none.
    shows: what a lab computes to show it. errata: keys of ERRATA that touch this claim.
    """

    id: str
    part: str
    slide: str
    text: str
    kind: str
    paper: str
    shows: str
    errata: tuple[str, ...] = ()


@dataclass(frozen=True)
class Erratum:
    """A slip on a slide. says: what is printed. correct: what it should be. derivation: why, to be done again."""

    key: str
    title: str
    says: str
    correct: str
    derivation: str


SFT = "1.1 Supervised fine-tuning"
RLHF = "1.2 Learning from preferences"
PEFT = "1.3 Parameter-efficient fine-tuning"
VLM = "2 Multi-modal models"
PROMPT = "3 Prompt engineering"
PLAN = "Lecture plan and pipeline"

_ROWS = [
    Claim("C01", SFT, "Supervised Fine-Tuning", "The loss is next-token prediction on the response only.", "works",
          "", "prompt tokens carry no gradient; the loss equals transformers' with −100 labels"),
    Claim("C02", SFT, "SFT, w/o and w/",
          "Without SFT the answer is dry and concise; with SFT it assists a customer better.", "effect", "",
          "held-out questions before and after; held-out response perplexity; a rubric score"),
    Claim("C03", RLHF, "RLHF, reward model", "The reward model maximises E[log σ(r(x, win) − r(x, lose))].", "works",
          "", "the Bradley–Terry loss; accuracy on held-out pairs"),
    Claim("C04", RLHF, "RLHF, fine-tuning",
          "The policy maximises expected reward minus β times its KL to the reference.", "effect", "",
          "the frontier of reward against KL over β; β → 0 over-optimises"),
    Claim("C05", RLHF, "DPO",
          "One supervised phase, no reward model; reference log-probabilities computed once, offline.", "works", "",
          "loss and gradients equal TRL's; reference kept; both bracket placements compared",
          ("dpo-bracket", "dpo-year")),
    Claim("C06", RLHF, "DPO example", "“Where is Shanghai?”: the preferred answer wins after training.", "effect", "",
          "the real model's answers before and after on held-out real and invented places", ("dpo-bracket",)),
    Claim("C07", PEFT, "BitFit", "BERT-base has 110M parameters but only about 0.1M biases.", "exact",
          "110M, 0.1M, more than 1000× fewer; 0.08 %", "counted from the configurations of BERT-base and BERT-large"),
    Claim("C08", PEFT, "BitFit", "Competitive with full fine-tuning on small and medium data, worse on large data.",
          "effect", "GLUE average 84.2 against 84.1 (BERT-large, validation)",
          "accuracy against training-set size, BitFit and full"),
    Claim("C09", PEFT, "TinyTL",
          "Updating biases needs no stored activations; lite residual modules win capacity back.", "exact + effect",
          "", "bytes of saved activations measured for three kinds of update"),
    Claim("C10", PEFT, "Adapter", "3.6 % of the parameters trained per task come close to full fine-tuning.",
          "effect", "GLUE 80.0 against 80.4; 3.6 %",
          "parameters counted for BERT-large; accuracy beside full fine-tuning"),
    Claim("C11", PEFT, "Adapter", "1000 tasks on a 7B model: full copies against one adapter a task.", "exact",
          "14 PB against 14 GB", "the storage computed", ("adapter-storage",)),
    Claim("C12", PEFT, "Adapter", "Adapters add latency, more so at small batch.", "effect",
          "+2.2 / +5.0 / +20.7 % (Adapter-L), +3.0 / +8.4 / +30.3 % (Adapter-H) at batch 32 / 16 / 1",
          "overhead measured against batch size"),
    Claim("C13", PEFT, "Prompt tuning", "Different learned prompts can be mixed in a single batch.", "works", "",
          "one pass serves three tasks, each row equal to its own single-task pass"),
    Claim("C14", PEFT, "Prompt tuning", "Catches up with fine-tuning as the model gets larger.", "effect", "",
          "the gap against model size"),
    Claim("C15", PEFT, "Prefix-tuning", "Prompts at every layer beat prompts at the embedding only.", "effect",
          "E2E BLEU 69.7 against 48.1 / 62.2 / 61.9", "both on one task and one parameter budget"),
    Claim("C16", PEFT, "Prompt/Prefix", "Both lengthen the input: latency grows and usable context shrinks.",
          "exact + effect", "", "context left and latency measured; LoRA beside them costs neither"),
    Claim("C17", PEFT, "LoRA",
          "With B zero the output is unchanged at the start; the branch can be fused, so no extra latency.",
          "works + effect", "difference 0 at the start; no extra latency once fused",
          "equality at the start and after merging; latency of base, unmerged and merged"),
    Claim("C18", PEFT, "LoRA practical cases", "One diffusion base serves many small styles.", "effect", "",
          "two LoRA styles on a small diffusion model, swapped and blended"),
    Claim("C19", PEFT, "QLoRA, NF4", "The 16 values of the NF4 data type.", "exact", "16 values printed",
          "derived from the normal quantile function, equal to 1e-7; codes equal bitsandbytes' bit for bit"),
    Claim("C20", PEFT, "QLoRA, double quantization", "The scaling factors are quantized too.", "exact", "",
          "4.5 → 4.127 bits a parameter"),
    Claim("C21", PEFT, "QLoRA, paged optimizers", "Optimizer state is paged out to CPU memory.", "works", "",
          "a paged AdamW within a bounded budget follows AdamW's trajectory"),
    Claim("C22", PEFT, "QLoRA table", "Sizes of the Guanaco models.", "exact",
          "65B 41 GB, 33B 21 GB, 13B 10 GB, 7B 6 GB",
          "computed from the LLaMA configurations, the difference explained"),
    Claim("C23", PEFT, "BitDelta", "α = mean |Δ| minimises the L2 error of α·Sign(Δ).", "exact", "",
          "the minimum over α found numerically", ("bitdelta-delta",)),
    Claim("C24", PEFT, "BitDelta", "The scales are refined by distilling logits.", "effect",
          "800 samples of length 128", "held-out logit error and task score before and after"),
    Claim("C25", PEFT, "BitDelta table", "Model and delta sizes.", "exact",
          "13.48 → 1.24 GB (10.87×), 26.03 → 2.09 (12.45×), 137.95 → 8.95 (15.41×), 14.48 → 1.30 (11.14×)",
          "computed from the configurations, to the printed digit and then in one unit", ("bitdelta-units",)),
    Claim("C26", PEFT, "BitDelta serving",
          "N models cost 16 bits once plus one bit each, and decode faster together.", "exact + effect",
          "params × models × 16 bit ⇒ params × (models × 1 bit + 16 bit)",
          "the memory curve; latency of a batched 1-bit product against N dense models"),
    Claim("C27", PEFT, "Multi-tenant serving", "Several fine-tunes of one base are served together.", "works", "",
          "one batch, another delta for every row"),
    Claim("C28", VLM, "Vision language model", "Questions about a picture are answered in words.", "effect", "",
          "three kinds of question on rendered scenes, held-out accuracy"),
    Claim("C29", VLM, "Flamingo",
          "Gated cross-attention between frozen layers; a tanh gate of 0 leaves the model as it was.", "works", "",
          "bit-equal logits at gate 0; held-out accuracy after training"),
    Claim("C30", VLM, "Perceiver Resampler", "Many visual features in, a fixed few tokens out.", "exact",
          "27 visual tokens, 5 queries, K and V of 32, attention map 5 × 32", "those shapes"),
    Claim("C31", VLM, "PaLM-E", "Visual tokens are interleaved with words at the input.", "works", "",
          "an interleaved sentence with two pictures"),
    Claim("C32", VLM, "VILA", "A projector feeds visual tokens to the model; interleaved data keeps the text skills.",
          "effect", "", "projector alone against projector and model; text perplexity before and after"),
    Claim("C33", VLM, "VILA-U", "One next-token objective for text and picture tokens.", "effect", "",
          "residual-quantized picture tokens generated from a caption"),
    Claim("C34", PROMPT, "In-context learning", "Examples in the prompt raise accuracy.", "effect", "",
          "accuracy over the number of shots, with intervals"),
    Claim("C35", PROMPT, "Chain of thought", "Reasoning written out helps.", "effect", "",
          "accuracy with and without, and where it does not help"),
    Claim("C36", PROMPT, "RAG", "Retrieve, then generate.", "effect", "",
          "closed book against retrieval on facts the model cannot know; recall@k of BM25 and embeddings"),
    Claim("C37", PLAN, "PockEngine", "Sparse back-propagation saves memory and time.", "exact + effect", "",
          "bytes of saved activations and step time for chosen layers"),
    Claim("C38", PLAN, "LongLoRA", "Shifted sparse attention with LoRA reaches longer context.", "effect", "",
          "attention cost over length; equality to full attention with one group"),
    Claim("C39", PLAN, "Post-training pipeline", "SFT, reward model, rejection sampling, DPO, repeated.", "effect",
          "", "the whole pipeline on one small model, win rate and Elo after each stage"),
    Claim("C40", PEFT, "QLoRA table (Elo)", "Models are compared by Elo.", "works",
          "Guanaco 65B 1022 ± 1, 33B 992 ± 1, 13B 916 ± 1, 7B 879 ± 1",
          "Elo from pairwise judgements, with intervals"),
]  # fmt: skip

CLAIMS: dict[str, Claim] = {row.id: row for row in _ROWS}

ERRATA: dict[str, Erratum] = {
    row.key: row
    for row in [
        Erratum(
            "adapter-storage",
            "Storage of 1000 full copies",
            "1000 sub-tasks × 7B LLaMA ⇒ 14 PB.",
            "14 TB. The factor of 1000 over the adapters' 14 GB is right.",
            "7·10⁹ parameters × 2 bytes = 14·10⁹ bytes = 14 GB a copy; 1000 copies are 14·10¹² bytes = 14 TB. "
            "A petabyte is 10¹⁵ bytes.",
        ),
        Erratum(
            "bitdelta-delta",
            "Sign and scale of BitDelta",
            "Sign(W_ij), and α = (1/nm) Σ |W_ij|.",
            "Sign(Δ_ij), and α = (1/nm) Σ |Δ_ij|, with Δ = W_fine − W_base.",
            "The error is Σ (Δ_ij − α s_ij)² with s_ij = ±1. For α ≥ 0 each term is least at s_ij = Sign(Δ_ij), which "
            "leaves Σ (|Δ_ij| − α)². Its derivative in α, −2 Σ (|Δ_ij| − α), is zero at the mean of |Δ_ij|. "
            "With the weight itself in place of Δ the formula would replace the model, not its change.",
        ),
        Erratum(
            "dpo-bracket",
            "The bracket of the DPO example",
            "The slide “An example of DPO” closes σ( … ) after the chosen log-ratio; the rejected one stands outside.",
            "−log σ(β·log-ratio(win) − β·log-ratio(lose)), as the first DPO slide has it.",
            "Bradley–Terry gives P(win over lose) = σ(r(win) − r(lose)). The reward of the best policy is "
            "r(x, y) = β·log(π(y given x) / π_ref(y given x)) + β·log Z(x). The unknown Z(x) cancels only in the "
            "difference of the two rewards, so both log-ratios stand inside σ. With the rejected term outside, the "
            "objective has no upper bound: pushing π(lose) towards 0 raises it for ever.",
        ),
        Erratum(
            "bitdelta-units",
            "Two units in BitDelta's table",
            "Compression factors 10.87 / 12.45 / 15.41 / 11.14.",
            "10.10 / 11.61 / 14.36 / 10.37 with one unit on both sides.",
            "The base sizes are decimal: 13.48·10⁹ bytes for Llama-2 7B. The delta sizes, computed from the "
            "configurations, are 1.2427 / 2.0882 / 8.9478 / 1.3013 in units of 2³⁰ bytes. Dividing 10⁹ by 2³⁰ bytes "
            "inflates each factor by 2³⁰ / 10⁹ = 1.0737: 10.87 / 1.0737 = 10.12, and 10.10 before rounding.",
        ),
        Erratum(
            "dpo-year",
            "The year of DPO",
            "Rafailov et al., 2024.",
            "Rafailov et al., 2023.",
            "The paper appeared in May 2023 and in the proceedings of NeurIPS 2023.",
        ),
    ]
}
