"""LoRAs that diffusers and PEFT wrote, and ours loaded by them, draw the same."""

import os

# Before a Hugging Face package starts: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.diffusers_folder import unet_config
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.lora import (
    Factors,
    merge_lora,
    read_lora,
    write_lora,
)
from diffusion_jax.convert.weights.lora_names import Spot
from diffusion_jax.convert.weights.names import Part, leaves_of
from diffusion_jax.models.conditioning.clip import ClipTextTower
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.train.adapters import is_stacked

pytestmark = pytest.mark.parity

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def package(name):
    """Import a package of the parity environment."""
    return pytest.importorskip(name)


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def nchw(array):
    return package("torch").from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())


def close(ours, theirs):
    """Agree within 1e-4 of the largest number, which is not 0."""
    theirs = theirs.detach().float().numpy()
    assert np.abs(theirs).max() > 0.01
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4 * np.abs(theirs).max()


class Peer:
    """A small UNet and a text encoder of ours, the same ones of diffusers and transformers."""

    def __init__(self, *, deep, folder):
        torch = package("torch")
        diffusers, transformers = package("diffusers"), package("transformers")
        self.module = UNet(
            out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
            use_spatial_transformer=True, attention_resolutions=(2,), context_dim=24,
            num_head_channels=16, use_linear_in_transformer=deep,
            transformer_depth=(1, 2) if deep else 1, scan=deep,
        )  # fmt: skip
        x, t, context = (
            normal(1, 2, 8, 8, 4),
            np.array([3.0, 700.0], np.float32),
            normal(2, 2, 5, 24),
        )
        self.inputs = [jnp.asarray(a) for a in (x, t, context)]
        config = unet_config(self.module, 4, sample_size=8)
        self.call = lambda unet: unet(
            nchw(x), torch.from_numpy(t), encoder_hidden_states=torch.from_numpy(context)
        ).sample.permute(0, 2, 3, 1)
        torch.manual_seed(0)
        self.unet = diffusers.UNet2DConditionModel.from_config(config).eval()
        self.unet.save_pretrained(folder / "unet")
        sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                     num_attention_heads=2, max_position_embeddings=4)  # fmt: skip
        self.text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**sizes, hidden_act="quick_gelu", eos_token_id=2)
        ).eval()
        self.text.save_pretrained(folder / "text_encoder")
        self.tower = ClipTextTower(
            width=8, num_layers=2, num_heads=2, mlp_dim=16, vocab_size=9, max_length=4
        )
        self.tokens = jnp.array([[1, 3, 8, 4], [1, 8, 0, 0]], jnp.int32)
        shapes = [
            jax.eval_shape(
                lambda key: self.module.init(key, *self.inputs)["params"], jax.random.key(0)
            ),
            jax.eval_shape(
                lambda key: self.tower.init(key, self.tokens)["params"], jax.random.key(0)
            ),
        ]
        self.trees = {
            "network": import_network(shapes[0], folder / "unet", "unet"),
            "text": import_network(shapes[1], folder / "text_encoder", "clip text"),
        }

    def pipeline(self):
        """Put both into a pipeline, which loads and saves LoRAs."""
        diffusers = package("diffusers")
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
        return diffusers.StableDiffusionPipeline(
            unet=self.unet, text_encoder=self.text, vae=vae, tokenizer=None, safety_checker=None,
            scheduler=diffusers.DDIMScheduler(), feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip

    def theirs(self):
        torch = package("torch")
        states = self.text(
            input_ids=torch.from_numpy(np.array(self.tokens)).long()
        ).last_hidden_state
        return self.call(self.unet), states

    def ours(self, trees):
        states = self.tower.apply({"params": trees["text"]}, self.tokens).normed
        return self.module.apply({"params": trees["network"]}, *self.inputs), states


def check(peer, trees, *, text=True):
    (image, states), (their_image, their_states) = peer.ours(trees), peer.theirs()
    close(image, their_image)
    if text:
        close(states, their_states)


@pytest.fixture(params=[False, True], ids=["sd1", "deep"])
def peer(request, tmp_path):
    return Peer(deep=request.param, folder=tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_that_diffusers_saved_is_loaded_here(peer, dora, tmp_path):
    torch, peft = package("torch"), package("peft")
    state = package("peft.utils").get_peft_model_state_dict
    before = peer.ours(peer.trees)
    for module, targets in ((peer.unet, TARGETS), (peer.text, TEXT_TARGETS)):
        config = peft.LoraConfig(
            r=3, lora_alpha=3, target_modules=targets, use_dora=dora, rank_pattern={"to_q": 2},
            alpha_pattern={"to_q": 2},
        )  # fmt: skip
        module.add_adapter(config, "default")
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    package("diffusers").StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=state(peer.unet),
        text_encoder_lora_layers=state(peer.text),
    )
    path = tmp_path / "lora/pytorch_lora_weights.safetensors"
    lora = read_lora(path, peer.trees)
    trees = merge_lora(peer.trees, lora)
    check(peer, trees)
    assert np.abs(peer.ours(trees)[0] - before[0]).max() > 0.01
    write_lora(lora, tmp_path / "again.safetensors", peer.trees, "peft")
    theirs, ours = (
        package("safetensors.torch").load_file(p) for p in (path, tmp_path / "again.safetensors")
    )
    names = {name.replace("text_encoder.text_model.", "text_encoder."): name for name in ours}
    for name, tensor in theirs.items():
        name = name.replace("text_encoder.text_model.", "text_encoder.")
        assert torch.equal(ours[names[name]].reshape(tensor.shape), tensor), name
    assert len(ours) == len(theirs)


def drawn(trees, *, dora, ranks):
    """Factors for layers of attention, and for convolutions; the query's may have another rank."""
    lora = {}
    for slot, tree in trees.items():
        for path, leaf in leaves_of(tree).items():
            wanted = (
                "to_q",
                "to_k",
                "to_out_0",
                "in_layers_2",
                "net_2",
                "q_proj",
                "out_proj",
                "fc1",
            )
            if path.split("/")[-2] not in wanted or not path.endswith("/kernel"):
                continue
            for index in (
                range(leaf.shape[0]) if is_stacked(path.removesuffix("/kernel")) else [None]
            ):
                kernel = np.asarray(leaf if index is None else leaf[index])
                rank, seed = ranks["to_q" in path], len(lora)
                axes = tuple(range(kernel.ndim - 1))
                norms = np.sqrt((kernel**2).sum(axes)) * (
                    1.2 + 0.3 * normal(seed, kernel.shape[-1])
                )
                lora[Spot(slot, Part(path, index))] = Factors(
                    0.3 * normal(seed, *kernel.shape[:-1], rank),
                    0.3 * normal(seed + 1, rank, kernel.shape[-1]),
                    0.5 * rank,
                    norms if dora else None,
                )
    return lora


@pytest.mark.parametrize(("layout", "dora"), [("peft", False), ("peft", True), ("kohya", False)])
def test_a_lora_of_ours_is_loaded_by_diffusers(peer, layout, dora, tmp_path):
    """Some of it diffusers cannot read, and says so: magnitudes and several alphas of kohya.

    Magnitudes of a text encoder are checked with the files that it writes.
    """
    lora = drawn(peer.trees, dora=dora, ranks=(2, 2) if layout == "kohya" else (2, 3))
    package("peft")
    write_lora(lora, tmp_path / "x.safetensors", peer.trees, layout)
    pipeline = peer.pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    trees = merge_lora(peer.trees, lora)
    check(peer, trees, text=not dora)
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.5)
    if not dora:
        check(peer, merge_lora(peer.trees, lora, 0.5))
