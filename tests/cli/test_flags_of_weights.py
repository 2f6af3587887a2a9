"""The flags of commands that read weights; test_flags.py looks at those of all commands."""

from diffusion_jax.cli.arguments import parse_arguments


def test_loras_may_be_repeated_and_a_class_is_a_label():
    arguments = parse_arguments(["sample", "--lora=a", "--lora=b:0.5", "--class=1,2"])
    assert (arguments.lora, arguments.label) == (["a", "b:0.5"], "1,2")
    assert parse_arguments(["convert"]).lora == []


def test_forms_of_convert_are_the_forms_of_the_library():
    import typing

    from diffusion_jax.cli.flags_of_weights import CONVERT
    from diffusion_jax.convert.weights.lora_names import LAYOUTS
    from diffusion_jax.runs.files.export import Form

    whole, _ = typing.get_args(Form)
    assert dict(CONVERT)["--format"]["choices"] == (*typing.get_args(whole), *LAYOUTS)
