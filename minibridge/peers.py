"""The libraries that `bench` measures beside this project, on the same weights and the same work.

Each needs its own package (the `oracle` extra has transformers); nothing else in the project uses them.
"""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minibridge.measure import clock


class Transformers:
    """Qwen2ForCausalLM and its generate(), with their defaults for this device."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.name = f"transformers {transformers.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)

    def decode(self, prompts: list[list[int]], samples: int, new_tokens: int, stop_ids: list[int]) -> int:
        """Tokens sampled; those that come after a row's stop token do not count."""
        ids = torch.tensor(prompts, device=self.model.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=new_tokens, num_return_sequences=samples, eos_token_id=stop_ids or None, pad_token_id=0)
        new = out[:, ids.shape[1]:]
        stopped = torch.isin(new, torch.tensor(stop_ids, dtype=torch.long, device=new.device))
        return int((stopped.cumsum(1) - stopped.long() == 0).sum())  # a token counts while none before it stopped

    def trainer(self, ids: Tensor) -> Callable[[], int]:
        """A training step on rows (B, T): cross-entropy of every token, AdamW."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

        def step() -> int:
            self.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return ids.numel()

        return step


def trl_steps(folder: Path, texts: list[str], samples: int, new_tokens: int, steps: int, checkpointing: bool,
              between: Callable[[], None]) -> tuple[str, list[float]]:
    """Seconds of each GRPO step of TRL on the prompts `texts`, with a KL term; `between` is called after each step.

    checkpointing: activations are computed a second time in the backward pass, as they are by TRL's default.
    """
    import datasets
    import transformers
    import trl

    class Clock(transformers.TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.began = clock()

        def on_step_end(self, *_, **__):
            self.seconds.append(clock() - self.began)
            between()

    watch = Clock()
    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=len(texts) * samples, num_generations=samples,
        gradient_accumulation_steps=1, max_completion_length=new_tokens, max_steps=steps, beta=0.001, loss_type="grpo",
        temperature=1.0, top_k=0, generation_kwargs={"min_new_tokens": new_tokens}, use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(), gradient_checkpointing=checkpointing, learning_rate=1e-6, shuffle_dataset=False,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True)

    def reward(completion_ids, **_):
        return [float(sum(ids) % 2) for ids in completion_ids]

    rows = datasets.Dataset.from_list([{"prompt": text} for text in texts] * steps)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trl.GRPOTrainer(model, reward, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]).train()
    return f"TRL {trl.__version__}" + ", checkpointing" * checkpointing, watch.seconds
