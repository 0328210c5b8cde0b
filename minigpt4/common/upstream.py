"""Keys of upstream's later YAML files that mean something else here, or nothing."""

import re

# A pattern of keys, and what to write instead.
INSTEAD = {
    r"run\.wandb_log": "Write run.trackers: [wandb] for True, and nothing for False.",
    r"run\.job_name": "Write run.name.",
    r"datasets\..*\.batch_size": "Write run.batch_size_train: it holds for all datasets.",
    r"model\.has_qformer": "Leave it out for True. The model without a Q-Former (Llama 2, MiniGPT-v2) is not here.",
    r"model\.chat_template": "Leave it out for False. For True, write model.template: llama2.",
}


def what_to_write(key: str) -> str | None:
    """What to write instead of a key of upstream's later files; None for any other key."""
    return next((text for pattern, text in INSTEAD.items() if re.fullmatch(pattern, key)), None)
