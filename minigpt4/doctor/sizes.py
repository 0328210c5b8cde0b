"""How many parameters the parts have, from their sizes alone."""


def vit_parameters(embed_dim: int, depth: int, mlp_ratio: float, patch_size: int, image_size: int, **other) -> int:
    """EVA-ViT, without ln_vision."""
    ffn, grid = int(embed_dim * mlp_ratio), image_size // patch_size
    block = 4 * embed_dim**2 + 2 * embed_dim * ffn + 8 * embed_dim + ffn
    patches = 3 * patch_size**2 * embed_dim + embed_dim
    return depth * block + patches + (grid**2 + 2) * embed_dim


def qformer_parameters(
    hidden_size: int, num_hidden_layers: int, intermediate_size: int, cross_attention_freq: int, image_dim: int, **other
) -> int:
    """The Q-Former, without the queries. image_dim: width of the encoder."""

    def attention(context: int) -> int:
        return 2 * hidden_size * (hidden_size + context) + 6 * hidden_size

    cross = -(-num_hidden_layers // cross_attention_freq)
    ffn = 2 * hidden_size * intermediate_size + intermediate_size + 3 * hidden_size
    return num_hidden_layers * (attention(hidden_size) + ffn) + cross * attention(image_dim) + 2 * hidden_size
