"""The paper's comparison at toy scale, from problems to the table; and the toy base model it starts from."""
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import gen_data
import train_sft
from minibridge import checkpoint, igsm, traces
from minibridge.config import option, run_main, write_jsonl
from minibridge.model import Decoder, ModelConfig
from minibridge.tokenizer import train_toy

BASE_ROWS = {1: 8_000, 2: 20_000, 3: 30_000, 4: 35_000, 5: 35_000}  # problems by op count
BASE_MODEL = {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
              "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
              "max_position_embeddings": 1024, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Config:
    out: str = option("runs/base", "run folder")


def base_rows(ops: int, rows: int) -> list[dict]:
    problems = gen_data.problems("base", rows, (ops, ops), igsm.TOY, seed=0, balance=0.1)
    return [gen_data.record(problem, 0, traces.VANILLA) for problem in problems]


def main(config: Config):
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        parts = list(pool.map(base_rows, *zip(*sorted(BASE_ROWS.items(), reverse=True))))
    rows = [row for part in parts for row in part]
    held_out = [row for part in parts for row in part[-100:]]
    rows = [row for part in parts for row in part[:-100]]
    write_jsonl(out / "train.jsonl", rows)
    write_jsonl(out / "val.jsonl", held_out)
    words = [gen_data.record(problem, 0, traces.Behaviors(True, 4, 0.5))["messages"]
             for problem in gen_data.problems("base", 2000, (4, 5), igsm.TOY, seed=0, balance=0.1)]
    texts = [f"{m['role']}\n{m['content']}" for messages in words for m in messages]
    tokenizer = train_toy(texts, vocab_size=1024)
    model = Decoder(ModelConfig.from_hf({**BASE_MODEL, "vocab_size": -(-tokenizer.vocab_size // 64) * 64}))
    model.init_weights(torch.Generator().manual_seed(0))
    checkpoint.save(model, out / "init", tokenizer)
    train_sft.main(train_sft.Config(
        model=str(out / "init"), data=str(out / "train.jsonl"), val=str(out / "val.jsonl"), out=str(out / "sft"), epochs=2,
        batch_size=32, micro_tokens=8192, learning_rate=1.5e-3, schedule="cosine", warmup=200, max_length=1024,
        eval_every=250, save_every=500, log_every=50, dtype="bf16"))


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
