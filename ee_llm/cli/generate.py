"""`ee-llm generate`: define its help, and start its ranks."""

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.launch.local import launch, must_launch

COMMAND = CommandHelp(
    "generate",
    "Generate text for one prompt, or for a file of prompts, and show at which exit each token "
    "exited the model.",
    (
        Group("Prompt", "prompt prompt_file chat", "prompt_token_ids parse_special bos"),
        Group("Chat", "", "chat_file system chat_template"),
        Group("Batch", "batch_file output", "max_num_seqs cache_tokens deferral"),
        Group(
            "Exits",
            "thresholds strategy",
            "policy measure draft_exit draft_length draft_threshold verify",
        ),
        Group(
            "Early layers (--strategy sled and dola)",
            "",
            "sled_rate sled_scale sled_tau sled_layers sled_variant dola_layers dola_alpha"
            " early_head",
        ),
        Group("Length", "max_tokens stop", "min_tokens stop_token_ids ignore_eos"),
        Group(
            "Sampling",
            "temperature top_p seed",
            "top_k min_p repetition_penalty logprobs show_confidence",
        ),
        Group(
            "Execution", "dtype tensor pipeline", "quantize attention cuda_graphs compile timeout_s"
        ),
        Group("Output", "json"),
    ),
    (
        'ee-llm generate --checkpoint runs/first --prompt "Once upon"',
        'ee-llm generate --checkpoint runs/chat --chat "What is an exit?" --thresholds 0.9',
        "ee-llm generate --checkpoint runs/first --batch-file prompts.jsonl --output out.jsonl",
    ),
)


def run_generate(arguments: list[str]) -> None:
    """Run `ee-llm generate`, on several ranks with --tensor or --pipeline."""
    options = parse(GenerateOptions, COMMAND, arguments)
    from ee_llm.cli.generation.command import check, generate

    num_ranks = options.tensor * options.pipeline
    if must_launch(num_ranks):
        check(options)
        launch(num_ranks, ["generate", *arguments])
    else:
        generate(options)
