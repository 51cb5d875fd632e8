"""Methods as studies name them: each a delta on the config that all runs of a study share."""

# By what stands for the inputs of earlier tasks in the reflection loss.
SAPT = {
    f"sapt-{source}": {"method": "sapt", "pseudo_samples.source": source}
    for source in ("statistics", "generate", "files", "train", "none")
}
BOUND = {"single_task": {"method": "single_task"}}
# Those that need no rows of earlier tasks.
LORA = {
    name: {"method": name}
    for name in ("sequential", "inc_lora", "o_lora", "n_lora", "ella", "ewc", "slao", "epi", "any_ssr")
}
# Those whose blocks are prompts, at a rate that prompts want.
PROMPTS = {
    name: {"method": name, "pet.kind": "prompt", "optimizer.learning_rate": 3e-2} for name in ("l2p", "prog_prompt")
}


def some(*names: str) -> dict[str, dict]:
    """These of the methods above, in this order."""
    every = SAPT | BOUND | LORA | PROMPTS
    return {name: every[name] for name in names}


# What the paper compares SAPT with, as far as it needs no rows of earlier tasks.
PAPER = some("sapt-files", "sapt-statistics", "sapt-generate", "sequential", "single_task", "inc_lora", "o_lora")
PAPER |= some("epi", "l2p", "prog_prompt")
