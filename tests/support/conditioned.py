"""A small UNet and one embedder for each entry of a Conditioning, as sections of a config."""

UNET = dict(
    name="unet",
    out_channels=1,
    model_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    num_groups=4,
    num_heads=1,
)
ROWS = {
    "concat": ("low", dict(name="concat_image", input_key="low", channels=2)),
    "crossattn": ("words", dict(name="class_embedding", num_classes=4, embed_dim=6)),
    "vector": (
        "kind",
        dict(
            name="class_embedding", num_classes=4, embed_dim=5, add_sequence_dim=False,
            input_key="kind",
        ),
    ),
}  # fmt: skip
