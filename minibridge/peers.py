"""The libraries that `bench` measures beside this project, on the same weights and the same work.

Each needs its own package (the `oracle` extra has transformers); nothing else in the project uses them.
"""
import importlib.metadata
import re
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from minibridge import checkpoint
from minibridge.config import InputError
from minibridge.measure import clock
from minibridge.model import Decoder
from minibridge.tokenizer import Tokenizer


class Transformers:
    """Qwen2ForCausalLM and its generate(), with their defaults for this device."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.name = f"transformers {transformers.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)

    @classmethod
    def of(cls, model: Decoder, dtype: torch.dtype) -> "Transformers":
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(model, folder)
            return cls(Path(folder), dtype, model.device)

    def decode(self, prompts: list[list[int]], samples: int, new_tokens: int, stop_ids: list[int]) -> int:
        """Tokens sampled; those that come after a row's stop token do not count."""
        ids = torch.tensor(prompts, device=self.model.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=new_tokens, num_return_sequences=samples, eos_token_id=stop_ids or None, pad_token_id=0)
        new = out[:, ids.shape[1]:]
        stopped = torch.isin(new, torch.tensor(stop_ids, dtype=torch.long, device=new.device))
        return int((stopped.cumsum(1) - stopped.long() == 0).sum())  # a token counts while none before it stopped

    def trainer(self, ids: Tensor, micro_tokens: int) -> Callable[[], int]:
        """A training step on rows (B, T), some at a time: cross-entropy of every token, AdamW in the model's dtype."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

        def step() -> int:
            for rows in ids.split(max(1, micro_tokens // ids.shape[1])):
                (self.model(input_ids=rows, labels=rows).loss * (len(rows) / len(ids))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return ids.numel()

        return step


def spelled(prompts: list[list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Other prompts, as long, of words with a space before them: the text of these, which TRL is given, has the same ids."""
    texts = {id_: tokenizer.decode([id_]) for id_ in range(tokenizer.vocab_size)}
    words = [id_ for id_, text in texts.items() if re.fullmatch(" [a-zA-Z]+", text) and tokenizer.encode(text) == [id_]]
    return [[words[id_ % len(words)] for id_ in ids] for ids in prompts]


class TRL:
    """GRPO steps of TRL on the prompts `texts`, with a KL term, one at a time and each when it is asked for.

    They run in a process of their own, as they do for whoever uses TRL: what one side leaves behind (memory given back
    to the system, or kept) is not the other's to begin with. While one works, the other waits.
    checkpointing: activations are computed a second time in the backward pass, as they are by TRL's default.
    """

    def __init__(self, folder: Path, texts: list[str], samples: int, new_tokens: int, steps: int, checkpointing: bool,
                 on_cpu: bool, bf16: bool):
        self.pipe, far = get_context("spawn").Pipe()
        given = (far, torch.get_num_threads(), folder, texts, samples, new_tokens, steps, checkpointing, on_cpu, bf16)
        self.process = get_context("spawn").Process(target=_train_trl, args=given, daemon=True)
        self.process.start()
        far.close()
        self.name = f"TRL {importlib.metadata.version('trl')}" + ", checkpointing" * checkpointing

    def step(self) -> float:
        """Seconds that the next one took."""
        try:
            self.pipe.send("go")
            return self.pipe.recv()
        except (EOFError, OSError):
            raise InputError(f"peers: {self.name} has ended before its time, as it says above") from None


def _train_trl(pipe: Connection, threads: int, folder: Path, texts: list[str], samples: int, new_tokens: int, steps: int,
               checkpointing: bool, on_cpu: bool, bf16: bool):
    import datasets
    import transformers
    import trl

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            pipe.recv()
            self.began = clock()

        def on_step_end(self, *_, **__):
            pipe.send(clock() - self.began)

    torch.set_num_threads(threads)
    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=len(texts) * samples, num_generations=samples,
        gradient_accumulation_steps=1, max_completion_length=new_tokens, max_steps=steps, beta=0.001, loss_type="grpo",
        temperature=1.0, top_k=0, generation_kwargs={"min_new_tokens": new_tokens}, use_cpu=on_cpu, bf16=bf16,
        gradient_checkpointing=checkpointing, learning_rate=1e-6, shuffle_dataset=False,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True)

    def reward(completion_ids, **_):
        return [float(sum(ids) % 2) for ids in completion_ids]

    rows = datasets.Dataset.from_list([{"prompt": text} for text in texts] * steps)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trl.GRPOTrainer(model, reward, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Turns()]).train()
