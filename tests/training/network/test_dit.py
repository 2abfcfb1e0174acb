"""Architecture, initialisation, captions and resolution of MicroDiT."""

import dataclasses
import json
import math
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkout import VECTORS
from tests.training.helpers.networks import SMALL, inputs, random_model
from training.masking.deferred import Deferred
from training.network.config import MODELS, DiTConfig
from training.network.dit import MicroDiT
from training.network.layers import GeluMLP, position_table
from training.network.recompute import Normed
from training.network.tokens import TokenMask

SHAPES = VECTORS / "state_dict_shapes.json"
RELEASED = {
    "MicroDiT_Tiny_2": MODELS["MicroDiT_Tiny_2"],
    "MicroDiT_XL_2": dataclasses.replace(
        MODELS["MicroDiT_XL_2"], input_size=64, pos_interp_scale=2.0
    ),
}


# --- shape


@pytest.mark.parametrize("name", RELEASED)
def test_state_dict_has_the_released_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        state = MicroDiT(RELEASED[name]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == json.loads(
        SHAPES.read_text()
    )[name]


def test_state_dict_has_the_released_order() -> None:
    with torch.device("meta"):
        keys = list(MicroDiT(RELEASED["MicroDiT_XL_2"]).state_dict())
    assert [name for name, _ in groupby(key.split(".")[0] for key in keys)] == [
        "pos_embed",
        "mask_token",
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "y_emb_preprocess",
        "pooled_y_emb_process",
        "patch_mixer",
        "patch_mixer_map_xin",
        "patch_mixer_map_xout",
        "patch_mixer_map_y",
        "blocks",
        "final_layer",
    ]
    block = [key.removeprefix("blocks.1.") for key in keys if key.startswith("blocks.1.")]
    assert block == [
        "norm1.weight",
        "attn.qkv.weight",
        "attn.proj.weight",
        "cross_attn.q_linear.weight",
        "cross_attn.kv_linear.weight",
        "cross_attn.proj.weight",
        "norm2.weight",
        "norm3.weight",
        "mlp.w1",
        "mlp.w2",
        "mlp.gate.weight",
        "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    ]


def test_equal_widths_need_no_projection_into_the_mixer() -> None:
    model = random_model(dataclasses.replace(SMALL, mixer_width=SMALL.width))
    assert not [key for key in model.state_dict() if key.startswith("patch_mixer_map")]
    x, c_noise, y = inputs()
    assert model(x, c_noise, y).shape == x.shape


def test_sixteen_channels_lie_fastest_in_a_patch() -> None:
    config = dataclasses.replace(SMALL, in_channels=16)
    model = MicroDiT(config).double()
    with torch.no_grad():  # weights of the last layer are 0: only its bias comes out
        model.final_layer.linear.bias.copy_(torch.arange(64.0))
    out = model(*inputs(config))
    row, column, channel = 5, 2, 11
    expected = ((row % 2) * 2 + column % 2) * 16 + channel
    assert out.shape == (3, 16, 8, 8)
    assert out[:, channel, row, column].tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "input_size 9: .*multiple of patch_size 2"),
        ({"width": 36}, "width 36: .*multiple of head_dim 8"),
        ({"mixer_width": 20}, "mixer_width 20: .*multiple of head_dim 8"),
        ({"width": 30, "head_dim": 2}, "width 30: .*multiple of 4"),
        ({"expert_capacity": 5.0}, "expert_capacity 5.0: .*num_experts 4"),
        ({"expert_capacity": 0.0}, "expert_capacity 0.0"),
        ({"qkv_multipliers": (0.5,)}, "qkv_multipliers"),
        ({"ffn_multipliers": (-1.0, 4.0)}, "ffn_multipliers"),
        ({"depth": 0}, "depth 0"),
        ({"mixer_depth": -1}, "mixer_depth -1"),
        ({"pos_interp_scale": 0.0}, "pos_interp_scale 0.0"),
        ({"decoder_depth": -1}, "decoder_depth -1"),
        ({"decoder_width": 40}, "decoder_width 40: choose a multiple of its 16 heads"),
    ],
)
def test_impossible_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(SMALL, **change)


def test_configuration_survives_json() -> None:
    assert DiTConfig(**json.loads(json.dumps(dataclasses.asdict(SMALL)))) == SMALL


def test_gelu_feed_forwards_have_two_matrices_and_as_many_parameters() -> None:
    """w2 gelu(w1 x), of the width before SwiGLU's 2/3; experts stay as they are."""
    config = dataclasses.replace(SMALL, feed_forward="gelu", width=96, multiple_of=1)
    state = random_model(config).state_dict()
    swiglu = random_model(dataclasses.replace(config, feed_forward="swiglu")).state_dict()
    for prefix in ("y_emb_preprocess.mlp", "patch_mixer.0.mlp", "blocks.3.mlp"):
        own = [key for key in state if key.startswith(prefix)]
        assert own == [f"{prefix}.w1.weight", f"{prefix}.w2.weight"]
        count = sum(swiglu[key].numel() for key in swiglu if key.startswith(prefix))
        assert sum(state[key].numel() for key in own) == pytest.approx(count, rel=0.02)
    assert state["blocks.1.mlp.w1"].shape == swiglu["blocks.1.mlp.w1"].shape
    mlp, norm = GeluMLP(4, 6), torch.nn.LayerNorm(4, bias=False)
    x = Normed(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), norm)
    hidden = norm(x.x) @ mlp.w1.weight.T
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(mlp(x), hidden @ mlp.w2.weight.T)


def test_feed_forward_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="feed_forward relu: choose swiglu or gelu"):
        dataclasses.replace(SMALL, feed_forward="relu")  # pyright: ignore[reportArgumentType]


def test_no_mixer_needs_no_projections() -> None:
    model = random_model(dataclasses.replace(SMALL, mixer_depth=0))
    assert not [key for key in model.state_dict() if key.startswith("patch_mixer")]


def test_decoder_adds_keys_and_only_the_final_layer_changes() -> None:
    """MaskDiT's decoder: entry, mask token, positions, blocks without cross-attention."""
    plain = MicroDiT(SMALL).state_dict()
    config = dataclasses.replace(SMALL, decoder_depth=2, decoder_width=64)
    state = MicroDiT(config).state_dict()
    added = [key for key in state if key not in plain]
    assert list(state) == [*plain, *added]
    assert {key.removeprefix("decoder.blocks.0.") for key in added if "blocks.1" not in key} == {
        "decoder.pos_embed",
        "decoder.mask_token",
        "decoder.entry.adaLN_modulation.1.weight",
        "decoder.entry.adaLN_modulation.1.bias",
        "decoder.entry.linear.weight",
        "decoder.entry.linear.bias",
        "norm1.weight",
        "attn.qkv.weight",
        "attn.proj.weight",
        "norm2.weight",
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
        "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    }
    changed = {key for key in plain if plain[key].shape != state[key].shape}
    assert changed == {
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
        "final_layer.norm_final.weight",
    }
    assert state["decoder.mask_token"].shape == (1, 1, 64)
    assert state["decoder.entry.linear.weight"].shape == (64, 32)
    assert MicroDiT(config).decoder.blocks[0].attn.head_dim == 4  # pyright: ignore  # 16 heads


def test_the_papers_decoder_is_512_wide() -> None:
    with torch.device("meta"):
        state = MicroDiT(dataclasses.replace(SMALL, decoder_depth=8)).state_dict()
    assert state["decoder.pos_embed"].shape == (1, 16, 512)
    assert {int(key.split(".")[2]) for key in state if "decoder.blocks" in key} == set(range(8))


# --- initialisation


@pytest.fixture(scope="module")
def fresh() -> MicroDiT:
    config = dataclasses.replace(SMALL, width=256, head_dim=32, mixer_width=128, multiple_of=64)
    model = MicroDiT(config)
    model.initialise(torch.Generator().manual_seed(3))
    return model


def assert_std(weight: Tensor, std: float) -> None:
    # 6 standard errors of the standard deviation of n normal numbers.
    assert abs(weight.std().item() / std - 1) < 6 / math.sqrt(2 * weight.numel())


def test_output_is_zero_at_initialisation(fresh: MicroDiT) -> None:
    x, c_noise, y = (tensor.float() for tensor in inputs(fresh.config))
    assert fresh(x, c_noise, y).abs().max() == 0


def test_zeroed_caption_is_projected_to_zero_at_initialisation(fresh: MicroDiT) -> None:
    text = fresh.encode_text(torch.zeros(1, 7, fresh.config.caption_width))
    assert text.pooled.abs().max() == 0


def test_blocks_start_with_closed_gates_and_the_caption_block_as_identity(fresh: MicroDiT) -> None:
    for name, parameter in fresh.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            assert parameter.abs().max() == 0, name
    y = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fresh.y_emb_preprocess(y, None), y)
    assert fresh.y_emb_preprocess.attn.qkv.weight.abs().max() > 0


def test_standard_deviations_at_initialisation(fresh: MicroDiT) -> None:
    state = fresh.state_dict()
    mixer_out = 0.02 / math.sqrt(2 * 4)
    for prefix, std_out in [
        ("patch_mixer.0", mixer_out),
        ("patch_mixer.1", mixer_out),
        ("blocks.0", 0.02 / math.sqrt(2)),
        ("blocks.1", 0.02 / math.sqrt(4)),
        ("blocks.3", 0.02 / math.sqrt(8)),
    ]:
        for name in ("attn.qkv", "cross_attn.q_linear", "cross_attn.kv_linear"):
            assert_std(state[f"{prefix}.{name}.weight"], 0.02)
        for name in ("attn.proj", "cross_attn.proj"):
            assert_std(state[f"{prefix}.{name}.weight"], std_out)
        if f"{prefix}.mlp.gate.weight" in state:
            assert_std(state[f"{prefix}.mlp.gate.weight"], 0.02)
            assert_std(state[f"{prefix}.mlp.w1"], 0.02)
            assert_std(state[f"{prefix}.mlp.w2"], std_out)
        else:
            assert_std(state[f"{prefix}.mlp.w1.weight"], 0.02)
            assert_std(state[f"{prefix}.mlp.w2.weight"], std_out)
            assert_std(state[f"{prefix}.mlp.w3.weight"], std_out)
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.y_proj.fc1"):
        assert_std(state[f"{name}.weight"], 0.02)
        assert state[f"{name}.bias"].abs().max() == 0
    for name in ("y_embedder.y_proj.fc2", "pooled_y_emb_process.fc1", "pooled_y_emb_process.fc2"):
        assert_std(state[f"{name}.weight"], 0.02)


def test_no_weight_is_far_from_all_others() -> None:
    """torch's trunc_normal_ makes one of the first million of this seed 2.0: 100 deviations."""
    part = GeluMLP(1000, 1000)
    part.initialise(0.02, torch.Generator().manual_seed(12))
    for weight in (part.w1.weight, part.w2.weight):
        assert 0.08 < weight.abs().max() < 0.12
        assert_std(weight, 0.02)


def test_uniform_weights_at_initialisation(fresh: MicroDiT) -> None:
    state = fresh.state_dict()
    for name in ("patch_mixer_map_xin", "patch_mixer_map_xout", "patch_mixer_map_y"):
        bound = math.sqrt(6 / (256 + 128))  # Xavier
        assert 0.99 * bound < state[f"{name}.1.weight"].abs().max() <= bound
    bound = math.sqrt(6 / (256 + 16))
    assert 0.99 * bound < state["x_embedder.proj.weight"].abs().max() <= bound
    assert 0.24 < state["x_embedder.proj.bias"].abs().max() <= 0.25
    assert all((state[key] == 1).all() for key in state if "norm" in key)
    assert state["mask_token"].abs().max() == 0


def test_initialisation_depends_on_the_generator_alone(fresh: MicroDiT) -> None:
    torch.manual_seed(1234)
    with torch.device("meta"):
        other = MicroDiT(fresh.config)
    other.to_empty(device="cpu").initialise(torch.Generator().manual_seed(3))
    for (name, a), b in zip(fresh.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_decoder_at_initialisation() -> None:
    config = dataclasses.replace(SMALL, decoder_depth=2, decoder_width=256)
    model = MicroDiT(config)
    model.initialise(torch.Generator().manual_seed(3))
    with torch.device("meta"):
        other = MicroDiT(config)
    other.to_empty(device="cpu").initialise(torch.Generator().manual_seed(3))
    state = model.state_dict()
    for (name, a), b in zip(state.items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    x, c_noise, y = (tensor.float() for tensor in inputs())
    assert model(x, c_noise, y).abs().max() == 0
    assert_std(state["decoder.mask_token"], 0.02)
    for i in range(2):
        assert_std(state[f"decoder.blocks.{i}.attn.proj.weight"], 0.02 / math.sqrt(2 * (i + 1)))
    for name, value in state.items():
        if name.startswith("decoder") and ("adaLN" in name or "entry" in name):
            assert value.abs().max() == 0, name


# --- forward


def test_every_parameter_gets_a_gradient() -> None:
    model = random_model()
    x, c_noise, y = inputs()
    mask = Deferred().draw(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)), 0.5)
    model(x, c_noise, y, mask=mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_order_of_kept_tokens_does_not_matter() -> None:
    # All kept, but shuffled: equal to no mask, because positions are added before.
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    mask = TokenMask(order, order.argsort(dim=1), torch.zeros(3, 16))
    model, (x, c_noise, y) = random_model(), inputs()
    torch.testing.assert_close(model(x, c_noise, y, mask=mask), model(x, c_noise, y))


def test_dropped_patches_are_zero_and_unseen_after_the_mixer() -> None:
    config = dataclasses.replace(SMALL, mixer_depth=0)  # naive masking: dropped is unseen
    model, (x, c_noise, y) = random_model(config), inputs()
    mask = Deferred().draw(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)), 0.75)
    assert mask is not None
    dropped = mask.mask.view(3, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).bool()
    out = model(x, c_noise, y, mask=mask)
    assert (out.masked_select(dropped) == 0).all()
    assert (out.masked_select(~dropped) != 0).all()
    changed = model(torch.where(dropped, x + 1, x), c_noise, y, mask=mask)
    assert torch.equal(changed, out)
    # With a mixer the kept patches do know of the others: that is what "deferred" means.
    model = random_model(SMALL)
    out = model(x, c_noise, y, mask=mask)
    changed = model(torch.where(dropped, x + 1, x), c_noise, y, mask=mask)
    assert (changed - out).abs().max() > 1e-3


def test_one_noise_level_serves_a_batch() -> None:
    model, (x, _, y) = random_model(), inputs()
    level = torch.tensor([0.3], dtype=torch.float64)
    torch.testing.assert_close(model(x, level, y), model(x, level.expand(3), y))


@pytest.mark.parametrize("trimmed", [False, True])
def test_encoded_text_gives_the_same_output(trimmed: bool) -> None:
    model, (x, c_noise, y) = random_model(), inputs()
    y_mask = torch.arange(7) < torch.tensor([[7], [1], [4]]) if trimmed else None
    text = model.encode_text(y[:, None], y_mask)
    torch.testing.assert_close(model(x, c_noise, text), model(x, c_noise, y, y_mask))


def test_bfloat16_autocast_stays_close() -> None:
    # Without experts, whose choices bfloat16 may change.
    model = random_model(dataclasses.replace(SMALL, moe_every=0)).float()
    x, c_noise, y = (tensor.float() for tensor in inputs())
    y_mask = torch.arange(7) < torch.tensor([[7], [1], [4]])
    expected = model(x, c_noise, y, y_mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, c_noise, y, y_mask)
    assert (out - expected).norm() < 0.05 * expected.norm()


# --- captions of different lengths


@pytest.mark.parametrize("extra", [1, 9, 70])
def test_padding_does_not_change_trimmed_captions(extra: int) -> None:
    model, (x, c_noise, y) = random_model(), inputs()
    y_mask = torch.arange(7) < torch.tensor([[7], [1], [4]])
    mask = Deferred().draw(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)), 0.5)
    expected = model(x, c_noise, y, y_mask, mask)
    rubbish = 5 * torch.randn(3, extra, 24, generator=torch.Generator().manual_seed(2))
    padded = torch.cat((y, rubbish.double()), dim=1)
    padded_mask = torch.cat((y_mask, torch.zeros(3, extra, dtype=torch.bool)), dim=1)
    scale = expected.abs().max()
    actual = model(x, c_noise, padded, padded_mask, mask)
    assert (actual - expected).abs().max() < 1e-12 * scale
    # Attended in full, padding matters: the test above is about something.
    full = model(x, c_noise, padded, None, mask)
    assert (full - model(x, c_noise, y, None, mask)).abs().max() > 1e-3 * scale


def test_a_sample_does_not_depend_on_its_neighbours_length() -> None:
    model, (x, c_noise, y) = random_model(), inputs()
    y_mask = torch.arange(7) < torch.tensor([[7], [1], [4]])
    together = model(x, c_noise, y, y_mask)
    alone = model(x[2:], c_noise[2:], y[2:, :4], torch.ones(1, 4, dtype=torch.bool))
    assert (together[2:] - alone).abs().max() < 1e-12 * alone.abs().max()


def test_all_rows_real_equals_full_attention() -> None:
    model, (x, c_noise, y) = random_model(), inputs()
    real = torch.ones(3, 7, dtype=torch.bool)
    torch.testing.assert_close(model(x, c_noise, y, real), model(x, c_noise, y))


def test_wrong_inputs_are_refused() -> None:
    model, (x, c_noise, y) = random_model(), inputs()
    y_mask = torch.ones(3, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="row without True"):
        model(x, c_noise, y, y_mask & torch.tensor([[True], [False], [True]]))
    with pytest.raises(ValueError, match=r"y_mask \(3, 6\)"):
        model(x, c_noise, y, y_mask[:, :6])
    with pytest.raises(ValueError, match=r"captions \(3, 7, 23\)"):
        model(x, c_noise, y[..., :23])
    with pytest.raises(ValueError, match=r"latents \(3, 4, 8, 6\)"):
        model(x[..., :6], c_noise, y)


# --- resolution


def test_finer_grid_keeps_the_coarse_positions_and_all_weights() -> None:
    model = random_model()
    coarse = model.pos_embed.view(4, 4, -1)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.set_resolution(input_size=16, pos_interp_scale=2.0)
    assert torch.equal(model.pos_embed.view(8, 8, -1)[::2, ::2], coarse)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    x, c_noise, y = inputs(model.config)
    assert model(x, c_noise, y).shape == (3, 4, 16, 16)
    # Equal to a model built at that resolution, so its state dict can be loaded there.
    other = MicroDiT(dataclasses.replace(SMALL, input_size=16, pos_interp_scale=2.0))
    other.load_state_dict(model.state_dict())
    assert other.config == model.config
    with pytest.raises(ValueError, match="input_size 7"):
        model.set_resolution(input_size=7, pos_interp_scale=1.0)


def test_finer_grid_with_a_decoder() -> None:
    model = random_model(dataclasses.replace(SMALL, decoder_depth=1, decoder_width=32))
    assert model.decoder is not None
    coarse = model.decoder.pos_embed.view(4, 4, -1)
    assert torch.equal(coarse.float(), position_table(32, 4, 1.0).view(4, 4, -1))
    model.set_resolution(input_size=16, pos_interp_scale=2.0)
    assert torch.equal(model.decoder.pos_embed.view(8, 8, -1)[::2, ::2], coarse)
    x, c_noise, y = inputs(model.config)
    assert model(x, c_noise, y).shape == (3, 4, 16, 16)


# --- compiled blocks


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_compiled_blocks_compute_the_same(mask_ratio: float) -> None:
    """Captured as graphs, which would fail at code that cannot be; inductor takes minutes here."""
    model, compiled = random_model(), random_model()
    names = list(compiled.state_dict())
    compiled.compile_blocks("aot_eager")
    x, c_noise, y = inputs()
    noise = torch.rand(len(x), model.config.tokens, generator=torch.Generator().manual_seed(0))
    mask = Deferred().draw(noise, mask_ratio)
    for network in (model, compiled):
        network(x, c_noise, y, mask=mask).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert list(compiled.state_dict()) == names
