"""What a folder of diffusers holds beside networks: tokenizers, and a page that describes it."""

import json

from diffusion_jax.data.tokenizer import END, START, ClipTokenizer

_CARD = """---
library_name: diffusers
pipeline_tag: {task}
---

# {name}

A {pipeline}, trained by diffusion_jax on: {data}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
{call}
```

{scheduler}
"""

# What a pipeline takes besides a prompt.
_IMAGES = {
    "StableDiffusionXLImg2ImgPipeline": "image=image, ",
    "StableDiffusionInpaintPipeline": "image=image, mask_image=mask, ",
    "StableDiffusionInstructPix2PixPipeline": "image=image, ",
}


def tokenizer_files(tokenizer: ClipTokenizer) -> dict[str, str]:
    """Write the files of transformers' CLIPTokenizer out of the vocabulary of a tokenizer."""
    inner = tokenizer.tokenizer
    vocabulary = sorted(inner.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
    pairs = json.loads(inner.to_str())["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    special = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": inner.id_to_token(tokenizer.pad_id),
    }
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    return {
        "vocab.json": json.dumps(dict(vocabulary), ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
    }


def model_card(
    name: str, pipeline: str, data: str, *, num_steps: int, scale: float | None, scheduler: str
) -> str:
    """Write the README.md of a folder: what it is, how to draw from it, and with which scheduler.

    scale: of guidance, None for a pipeline of videos. scheduler: a sentence.
    """
    if scale is None:
        call = f"frames = pipe(image, num_inference_steps={num_steps}).frames[0]"
    else:
        image = _IMAGES[pipeline] if pipeline in _IMAGES else ""
        call = (
            f'image = pipe("a red fox", {image}num_inference_steps={num_steps}, '
            f"guidance_scale={scale}).images[0]"
        )
    task = "text-to-image" if scale is not None else "image-to-video"
    return _CARD.format(
        name=name, pipeline=pipeline, data=data, call=call, scheduler=scheduler, task=task
    )
