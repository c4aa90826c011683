"""Names of parameters that depend on the configuration."""

from ee_llm.config import Config


def output_weight_name(config: Config, boundary: int) -> str:
    """Return the name of the output weight [vocabulary, hidden] of the exit at `boundary`.

    The final exit uses the embedding's weight if they are tied, and `output.weight` otherwise. An
    early exit's weight is `tied` to the embedding, `shared` with the final exit, or its `own`.
    """
    final = "embedding.word.weight" if config.model.tie_embeddings else "output.weight"
    if boundary == config.model.num_layers or config.exits.output == "shared":
        return final
    tied = config.exits.output == "tied"
    return "embedding.word.weight" if tied else f"exits.{boundary}.output.weight"
