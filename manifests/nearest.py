"""Nearest: what somebody may have meant by a word that is not known; for the end of an error message.

One literal table of what the words are called elsewhere; the rest is spelling.
"""

import difflib
from collections.abc import Iterable

OTHER_NAMES = {
    "bf16": ("bfloat16",),
    "fp16": ("float16",),
    "f16": ("float16",),
    "half": ("float16",),
    "fp32": ("float32",),
    "f32": ("float32",),
    "full": ("float32",),
    "kl": ("forward_kl", "reverse_kl"),
    "kld": ("forward_kl", "reverse_kl"),
    "kl_div": ("forward_kl", "reverse_kl"),
    "fkl": ("forward_kl",),
    "rkl": ("reverse_kl",),
    "js": ("jsd",),
    "gkd": ("jsd",),
    "akl": ("adaptive_kl",),
    "skl": ("skew_kl",),
    "srkl": ("skew_reverse_kl",),
    "sce": ("soft_cross_entropy",),
    "hf": ("transformers",),
    "gpu": ("cuda",),
    "learning_rate": ("lr",),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "steps": ("max_steps",),
    "batch_size": ("batch_tokens",),
    "gradient_accumulation_steps": ("grad_accum",),
    "gradient_checkpointing": ("grad_checkpointing",),
    "warmup": ("warmup_ratio",),
    "lr_scheduler_type": ("schedule",),
    "scheduler": ("schedule",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "precision": ("dtype",),
    "kd_ratio": ("kd_weight",),
    "kd_coef": ("kd_weight",),
    "tau": ("temperature",),
    "loss": ("divergence",),
    "eval_steps": ("eval_every",),
    "save_steps": ("save_every",),
    "save_total_limit": ("keep",),
    "cosine_with_min_lr": ("cosine",),
    "get_cosine_schedule_with_warmup": ("cosine",),
    "forwardklloss": ("soft_cross_entropy",),
    "reverseklloss": ("reverse_kl",),
    "symmetricklloss": ("symmetric_kl",),
    "hrl": ("hierarchical_ranking",),
    "kd_loss_fn": ("divergence",),
    "kd_temperature": ("temperature",),
    "jsd_beta": ("beta",),
    "sym_kd_ratio": ("forward_share",),
    "hrl_topk": ("k",),
    "skew_lambda": ("alpha",),
    "adaptive_alpha": ("alpha",),
    "lr_warmup_ratio": ("warmup_ratio",),
    "warmup_steps": ("warmup_ratio",),
    "num_warmup_steps": ("warmup_ratio",),
    "lr_scheduler": ("schedule",),
    "max_norm": ("max_grad_norm",),
    "clip_grad_norm": ("max_grad_norm",),
    "adam_betas": ("betas",),
    "train_batch_size": ("batch_tokens",),
    "per_device_train_batch_size": ("batch_tokens",),
    "micro_train_batch_size": ("grad_accum",),
    "max_len": ("max_length",),
    "generate_max_len": ("max_new_tokens",),
    "max_completion_length": ("max_new_tokens",),
    "n_samples_per_prompt": ("samples_per_prompt",),
    "num_generations": ("samples_per_prompt",),
    "teacher_update_freq": ("teacher_update_every",),
    "teacher_ema_decay": ("ema",),
    "ema_decay": ("ema",),
    "lora_r": ("lora_rank",),
    "lora_target_modules": ("lora_targets",),
    "lora_attn_modules": ("lora_targets",),
    "apply_lora_to_output": ("lora_head",),
    "load_in_4bit": ("lora_base_bits",),
}


def near(word: str, known: Iterable[str]) -> list[str]:
    """The known words that `word` may stand for: its own spelling in another case, its other name, else the nearest."""
    names, plain = list(known), _plain(word)
    same = [name for name in names if _plain(name) == plain]
    other = [name for name in OTHER_NAMES.get(plain, ()) if name in names]
    return same or other or difflib.get_close_matches(word, names, n=1, cutoff=0.6)


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'X'?" for the known words near to `word`, or "" where none is near."""
    found = " or ".join(f"'{name}'" for name in near(word, known))
    return f"; did you mean {found}?" if found else ""


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_")
