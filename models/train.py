"""Trains the small Step-3-shaped model that the demonstration and the tests decode.

    python -m models.train --minutes 45

The tokeniser, the chat template and the configuration are made here too. The learning rate follows the clock, so
that the run ends on time on any machine.

B conversations, T tokens, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from jinja2 import Template
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from torch.nn import Parameter

from afd.model.checkpoint import Checkpoint, expected_shapes
from afd.model.config import ModelConfig
from afd.model.random_checkpoint import ModelSizes, save_tensors, write_config
from afd.model.transformer import Transformer
from afd.model.weights import load_all
from models.tasks import TASKS, Question, held_out, sample_training

DEFAULT_DIR = Path(__file__).parent / "step3-nano"

BOS, EOS, SYSTEM, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, SYSTEM, USER, ASSISTANT)  # their ids are 0, 1, 2, 3, 4
BOS_ID, EOS_ID, _, _, ASSISTANT_ID = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a careful assistant. Answer in one word.")

SIZES = ModelSizes(
    num_hidden_layers=6,
    hidden_size=128,
    num_attention_heads=6,
    head_dim=32,
    share_q_dim=64,
    intermediate_size=384,
    moe_num_experts=8,
    moe_top_k=2,
    moe_intermediate_size=128,
    share_expert_dim=128,
    moe_layers_enum="1,2,3,4",
    vocab_size=512,
    max_seq_len=1024,
    rope_theta=10000.0,
    bos_token_id=BOS_ID,
    eos_token_id=EOS_ID,
)

BATCH_QUESTIONS = 160
TURNS = (1, 1, 1, 2, 3)  # turns of the conversations of a batch, drawn from these
SYSTEM_SHARE = 0.1
PEAK_LR, FINAL_LR_SHARE, WARM_UP_STEPS = 2e-3, 0.01, 100
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.98), 0.1, 1.0
BALANCE_WEIGHT, ROUTER_Z_WEIGHT = 1e-2, 1e-4
LOG_SECONDS, CHECK_SECONDS, CHECK_QUESTIONS = 20.0, 180.0, 100


@dataclass(frozen=True)
class ObservedTransformer(Transformer):
    """The oracle, which also keeps each expert layer's router logits [B*T, E]."""

    router_logits: list[Tensor] = field(default_factory=list)

    def moe(self, h: Tensor, prefix: str) -> Tensor:
        self.router_logits.append(self.linear(h.flatten(0, -2), prefix + "moe.gate").float())
        return super().moe(h, prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=45.0, help="length of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and questions; another one to resume")
    parser.add_argument("--peak-lr", type=float, default=PEAK_LR, help="the highest learning rate")
    parser.add_argument("--out", type=Path, default=DEFAULT_DIR, help="the model directory to write")
    parser.add_argument("--resume", action="store_true", help="start from the weights and tokeniser in --out")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.resume:
        checkpoint = Checkpoint(args.out)
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        config, weights = checkpoint.config, load_all(checkpoint)
    else:
        tokenizer = build_tokenizer(Random(args.seed))
        config = write_model_files(args.out, tokenizer)
        weights = initial_weights(config)
    train(config, weights, tokenizer, Random(args.seed), args.peak_lr, args.minutes * 60, args.out)


def build_tokenizer(rng: Random) -> Tokenizer:
    """Byte-level BPE over the questions. Digits, and the letters of a word that ends at a quotation mark or at the
    end of a message, are tokens of their own, so that the model can see them; capitalised words stay whole."""
    tokenizer = Tokenizer(BPE())
    alone = Regex(r' ?[A-Z][a-z]+|[0-9]|[a-z](?=[a-z]*("|\z))')
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(alone, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES.vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    questions = [sample_training(rng) for _ in range(5000)]
    texts = [text for question in questions for text in (question.prompt, question.answer)]
    tokenizer.train_from_iterator(texts + list(SYSTEM_PROMPTS) * 100, trainer)
    return tokenizer


def write_model_files(path: Path, tokenizer: Tokenizer) -> ModelConfig:
    """Everything of the model directory but the weights."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    sizes = asdict(SIZES) | {"vocab_size": tokenizer.get_vocab_size()}
    write_config(path, sizes, torch.bfloat16)
    write_json(path / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": SIZES.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(path / "tokenizer_config.json", tokenizer_config)
    return ModelConfig.load(path)


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def initial_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Norms are 1; matrices normal with variance 1/fan-in, less where they add to the residual stream."""
    weights = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        gain = (2 * config.num_layers) ** -0.5 if to_residual else 1.0
        weights[name] = torch.randn(shape) * gain * shape[-1] ** -0.5
    return weights


def train(
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    rng: Random,
    peak_lr: float,
    seconds: float,
    out: Path,
) -> None:
    """Trains for `seconds`; the weights so far are saved at every check, the last ones at the end."""
    params = {name: Parameter(weight) for name, weight in weights.items()}
    optimizer = make_optimizer(params)
    checks = {name: held_out(name, CHECK_QUESTIONS) for name in TASKS}
    print(f"{sum(param.numel() for param in params.values()):,} parameters", flush=True)
    start = last_log = last_check = time.monotonic()
    step = 0
    while (elapsed := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * lr_share(step, elapsed / seconds)
        ids = encode(tokenizer, sample_conversations(rng))
        loss, balance, accuracy = train_step(config, params, optimizer, ids)
        step += 1
        now = time.monotonic()
        if now - last_log > LOG_SECONDS:
            last_log = now
            print(
                f"step {step}  loss {loss:.4f}  balance {balance:.2f}  right {accuracy:.1%}"
                f"  {elapsed / 60:.1f} min, {(seconds - elapsed) / 60:.1f} to go",
                flush=True,
            )
        if now - last_check > CHECK_SECONDS:
            last_check = now
            print_check(config, params, tokenizer, checks)
            save(params, out)
    print_check(config, params, tokenizer, checks)
    save(params, out)
    print(f"{step} steps in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def make_optimizer(params: dict[str, Parameter]) -> torch.optim.AdamW:
    """Weight decay is for matrices only."""
    matrices = [param for param in params.values() if param.dim() > 1]
    vectors = [param for param in params.values() if param.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS)


def lr_share(step: int, done: float) -> float:
    """Of the peak: linear over the first steps, then half a cosine; `done` is the share of the time over, 0 to 1."""
    cosine = FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
    return cosine * min(1.0, (step + 1) / WARM_UP_STEPS)


def sample_conversations(rng: Random) -> list[str]:
    """Conversations as the chat template writes them, much alike in length: with as many turns, and the same system
    prompt or none."""
    num_turns = rng.choice(TURNS)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None
    return [
        render([sample_training(rng) for _ in range(num_turns)], system) for _ in range(BATCH_QUESTIONS // num_turns)
    ]


_TEMPLATE = Template(CHAT_TEMPLATE)


def render(questions: Iterable[Question], system: str | None = None) -> str:
    """The whole conversation, answers included."""
    messages = [{"role": "system", "content": system}] if system else []
    for question in questions:
        messages.append({"role": "user", "content": question.prompt})
        messages.append({"role": "assistant", "content": question.answer})
    return str(_TEMPLATE.render(messages=messages, bos_token=BOS, eos_token=EOS))


def encode(tokenizer: Tokenizer, conversations: list[str]) -> Tensor:
    """[B, T] token ids, padded on the right with the end token."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(conversations)]
    longest = max(map(len, rows))
    return torch.tensor([row + [EOS_ID] * (longest - len(row)) for row in rows])


def train_step(
    config: ModelConfig, params: dict[str, Parameter], optimizer: torch.optim.AdamW, ids: Tensor
) -> tuple[float, float, float]:
    """One step on ids [B, T]. Loss per answer token, balance loss per layer, share of right conversations."""
    model = ObservedTransformer(config, params)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1])  # [B, T-1, V]
    targets, is_answer = ids[:, 1:], answer_mask(ids)
    loss = F.cross_entropy(logits[is_answer], targets[is_answer])
    is_real = (ids[:, :-1] != EOS_ID).flatten()
    balance, router_z = router_losses(model.router_logits, is_real, config.top_k)
    optimizer.zero_grad()
    (loss + BALANCE_WEIGHT * balance + ROUTER_Z_WEIGHT * router_z).backward()
    torch.nn.utils.clip_grad_norm_(params.values(), MAX_GRAD_NORM)
    optimizer.step()
    return loss.item(), balance.item(), all_right(logits, targets, is_answer).float().mean().item()


def answer_mask(ids: Tensor) -> Tensor:
    """[B, T-1] bool, of ids [B, T]: whether the next token belongs to an answer, its end token included."""
    opened = (ids == ASSISTANT_ID).cumsum(dim=1)
    closed = (ids == EOS_ID).cumsum(dim=1)
    return (opened > closed)[:, :-1]


def all_right(logits: Tensor, targets: Tensor, is_answer: Tensor) -> Tensor:
    """[B] bool: whether the likeliest tokens are the targets wherever is_answer; all three are [B, T, ...]."""
    return ((logits.argmax(dim=-1) == targets) | ~is_answer).all(dim=1)


def router_losses(layers: list[Tensor], is_real: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Balance, 1 where all experts are chosen equally often (arXiv 2101.03961), and the mean square of the logits'
    log-sum-exp (arXiv 2202.08906); both are means over layers of logits [B*T, E], at tokens where is_real [B*T]."""
    balances, squares = [], []
    for layer in layers:
        logits = layer[is_real]
        probs = logits.softmax(dim=-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(top_k, dim=-1).indices, 1.0 / top_k)
        balances.append(probs.shape[-1] * (chosen.mean(dim=0) * probs.mean(dim=0)).sum())
        squares.append(logits.logsumexp(dim=-1).square().mean())
    return torch.stack(balances).mean(), torch.stack(squares).mean()


@torch.no_grad()
def print_check(
    config: ModelConfig, params: dict[str, Parameter], tokenizer: Tokenizer, checks: dict[str, list[Question]]
) -> None:
    """One line: the share of held-out questions whose answer is wholly right, per task."""
    model = Transformer(config, params)
    shares = []
    for name, questions in checks.items():
        ids = encode(tokenizer, [render([question]) for question in questions])
        right = all_right(model(ids[:, :-1]), ids[:, 1:], answer_mask(ids))
        shares.append(f"{name} {right.float().mean().item():.1%}")
    print("held out: " + "  ".join(shares), flush=True)


def save(params: dict[str, Parameter], path: Path) -> None:
    """Weights are rounded to bfloat16."""
    tensors = {name: param.detach().to(torch.bfloat16).contiguous() for name, param in params.items()}
    save_tensors(tensors, path / "model.safetensors")


if __name__ == "__main__":
    main()
