"""Text that a run's exported model writes."""

from __future__ import annotations

from runtime.data import load_tokenizer, open_chunks_for
from runtime.run_folder import EXPORT

import torch

from distill_model import StudentForCausalLM

from .run_record import RunRecord

PROMPT_TOKENS = 32
NEW_TOKENS = 64


@torch.no_grad()
def continuations(run: RunRecord, count: int) -> list[tuple[str, str]]:
    """(beginning, greedy continuation) of `count` held-out chunks, by the run's export. Raises
    ValueError if there is no export or nothing held out."""
    export = run.folder / EXPORT
    if not export.is_dir():
        raise ValueError(
            f"--samples: {run.folder} has no {EXPORT} yet; finish the run, or leave the option out",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = StudentForCausalLM.from_pretrained(export, dtype="auto").to(device).eval()
    tokenizer = load_tokenizer(str(export), "RUN")
    chunks = open_chunks_for(tokenizer, model.config.vocab_size, run.config.data.cache_dir).heldout
    if chunks is None:
        raise ValueError(
            f"--samples: {run.config.data.cache_dir} has no held-out part; leave the option out",
        )
    texts = []
    for row in range(min(count, len(chunks))):
        prompt = torch.tensor([chunks[row]["input_ids"][:PROMPT_TOKENS]], device=device)
        output = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        texts.append((tokenizer.decode(prompt[0]), tokenizer.decode(output[0, PROMPT_TOKENS:])))
    return texts
