"""The network of sd-scripts: networks.lora and lycoris.kohya with their `network_args`."""

from __future__ import annotations

from collections.abc import Sequence

from gesso.config.dialects import rules
from gesso.config.dialects.draft import Draft, Item, number
from gesso.config.dialects.rules import Alias, Direct, Refused, Rule
from gesso.config.problems import show

_RATES = Refused("learning rates per block are written by names here", fix="set adapter.learning_rates")
_RANKS = Refused("ranks per block are written by names here", fix="set adapter.rank_pattern")
_PARTS = Refused("LoRA+ has one ratio for all parts", fix="write loraplus_lr_ratio")
ARGUMENTS: dict[str, Rule] = {
    "conv_dim": Alias("conv_dim"),
    "conv_alpha": Alias("conv_alpha"),
    "dropout": Direct("adapter.dropout"),
    "rank_dropout": Direct("adapter.rank_dropout"),
    "module_dropout": Direct("adapter.module_dropout"),
    "loraplus_lr_ratio": Direct("adapter.lora_plus_ratio"),
    "loraplus_unet_lr_ratio": _PARTS,
    "loraplus_text_encoder_lr_ratio": _PARTS,
    "algo": Alias("algo"),
    "preset": Alias("preset"),
    "dora_wd": Direct("adapter.dora", "flag"),
    "rs_lora": Direct("adapter.rslora", "flag"),
    "rank_dropout_scale": Refused("what is left of the ranks is scaled up as the kind of adapter does it"),
    "factor": Direct("adapter.factor"),
    "decompose_both": Direct("adapter.decompose_both", "flag"),
    "full_matrix": Alias("full_matrix"),
    "use_tucker": Alias("tucker"),
    "use_cp": Alias("tucker"),
    "use_scalar": Refused("a trained strength for each layer is not there"),
    "train_norm": Refused("normalisations do not train"),
    "block_dims": _RANKS,
    "block_alphas": Refused("alphas per block are written by names here", fix="set adapter.alpha_pattern"),
    "conv_block_dims": _RANKS,
    "conv_block_alphas": Refused("alphas per block are written by names here", fix="set adapter.alpha_pattern"),
    "down_lr_weight": _RATES,
    "mid_lr_weight": _RATES,
    "up_lr_weight": _RATES,
    "block_lr_zero_threshold": Refused("belongs to learning rates per block"),
}
_MODULES = {"networks.lora": "lora", "lora": "lora", "lycoris.kohya": "lycoris", "lycoris": "lycoris"}
_ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}
_PRESETS = {"full": "all", "attn-mlp": "attention-mlp", "attn-only": "attention"}


def lay(draft: Draft, arguments: Sequence[tuple[str, Item]]) -> None:
    """Read what the options say of the network; `arguments` are the pairs of `network_args`."""
    for word, item in arguments:
        rule = ARGUMENTS.get(word)
        if rule is None:
            rules.unknown(draft, Item((*item.path[:-1], word), item.value, item.line), ARGUMENTS)
        elif isinstance(rule, Refused):
            rules.refused(draft, item, rule.why, off=("0",), fix=rule.fix)
        else:
            rules.obey(draft, item, rule)
    _fused(draft)
    kind, lycoris = _kind(draft)
    _sizes(draft, lycoris)
    preset, tucker, whole = (draft.take(name) for name in ("preset", "tucker", "full_matrix"))
    if preset is not None and lycoris and str(preset.value) in _PRESETS:
        draft.set("adapter.targets", _PRESETS[str(preset.value)], preset)
    elif preset is not None:
        draft.refuse(preset, "of LyCORIS' presets only full, attn-mlp and attn-only are there", fix="take it out")
    elif lycoris:
        draft.assume("adapter.targets", "all", "LyCORIS adapts the convolutions too")
    else:
        draft.assume("adapter.targets", "attention-mlp", "the layers of the UNet that networks.lora trains")
    if tucker is not None and draft.flag(tucker) and kind == "lora":
        draft.refuse(tucker, "a LoRA has no core here", fix=f"take {tucker.key} out")
    elif tucker is not None and kind != "lora":
        draft.set("adapter.tucker", draft.flag(tucker) is True, tucker)
    elif tucker is not None:
        draft.ignore(tucker, "off")
    if whole is not None and draft.flag(whole):
        draft.set("adapter.rank", 4096, whole, note="so wide that no factor is split")
        draft.set("adapter.alpha", None, whole, note="the strength is 1")
    elif whole is not None:
        draft.ignore(whole, "off")


def _fused(draft: Draft) -> None:
    files, weights = draft.take("base_weights"), draft.take("base_weights_multiplier")
    if weights is not None and files is None:
        draft.ignore(weights, "there are no base_weights")
    if files is None:
        return
    names = files.value if isinstance(files.value, list) else [files.value]
    given = [] if weights is None else weights.value if isinstance(weights.value, list) else [weights.value]
    # sd-scripts takes 1 where there are fewer strengths than files.
    strengths = [number(one) for one in given] + [1.0] * (len(names) - len(given))
    made = [{"path": draft.path(str(n)), "weight": w} for n, w in zip(names, strengths, strict=False)]
    draft.set("model.fuse", made, files)
    if weights is not None:
        draft.mapped.append(draft.entry(weights, "model.fuse[].weight"))


def _kind(draft: Draft) -> tuple[str, bool]:
    """The kind of adapter, and whether LyCORIS makes it."""
    module, algorithm = draft.take("network_module"), draft.take("algo")
    name = _MODULES.get(str(module.value)) if module is not None else "lora"
    if module is not None and name is None:
        what = "of the networks of sd-scripts only networks.lora and lycoris.kohya are there"
        draft.refuse(module, what, fix="write networks.lora")
    if algorithm is None or name != "lycoris":
        if algorithm is not None:
            draft.refuse(algorithm, "it belongs to lycoris.kohya", fix="write network_module = lycoris.kohya")
        if module is not None and name is not None:
            draft.set("adapter.type", "lora", module)
        return "lora", name == "lycoris"
    kind = _ALGORITHMS.get(str(algorithm.value).lower())
    if kind is None:
        fix = f"write one of {', '.join(_ALGORITHMS)}"
        draft.refuse(algorithm, f"{show(algorithm.value)} is not there", fix=fix)
        return "lora", True
    draft.set("adapter.type", kind, algorithm)
    assert module is not None
    draft.ignore(module, "algo says which")
    return kind, True


def _sizes(draft: Draft, lycoris: bool) -> None:
    for name, native, default in (("rank", "rank", 4), ("lora_alpha", "alpha", 1)):
        item = draft.take(name)
        if item is not None and name == "lora_alpha" and number(item.value) == 0:
            draft.ignore(item, "0 means that alpha is the rank")
        elif item is not None:
            draft.set(f"adapter.{native}", number(item.value), item)
        else:
            draft.assume(f"adapter.{native}", default, "the default of sd-scripts")
    rank, alpha = draft.take("conv_dim"), draft.take("conv_alpha")
    on = rank is not None and number(rank.value) not in (0, None)
    if rank is not None and on:
        draft.set("adapter.conv_rank", number(rank.value), rank)
    elif rank is not None:
        draft.ignore(rank, "off")
    if alpha is not None and on:
        draft.set("adapter.conv_alpha", number(alpha.value), alpha)
    elif alpha is not None:
        draft.ignore(alpha, "there is no conv_dim")
    elif on and not lycoris:
        draft.assume("adapter.conv_alpha", 1, "the default of sd-scripts")
    elif on:
        draft.assume("adapter.conv_alpha", draft.data["adapter"].get("alpha", 1), "as alpha, as LyCORIS does")
