"""Tables of rotary embeddings: those that turned the keys, and none where that is not sure."""

import check_architectures as architectures
import h5py
import numpy as np
import pytest
import torch
from conftest import FAMILIES, generate, load, prompt_of

import kvtrace


def tables(path):
    """By name, and the name of each layer's."""
    with h5py.File(path) as file:
        found = {name: (dataset[:], dict(dataset.attrs)) for name, dataset in file.get("rotary", {}).items()}
        model = file["model"].attrs
        return found, [file[f"layers/{number}"].attrs.get("rotary", model.get("rotary"))
                       for number in range(int(model["num_layers"]))]


def turned_back(keys, frequencies, attributes):
    """Keys [K, T, D] at positions 0... without their rotation."""
    angles = np.arange(keys.shape[1])[:, None] * frequencies.astype(np.float64)
    cosines, sines = np.cos(angles), np.sin(angles)
    scale, turning = attributes["attention_scaling"], int(attributes["rotated_dims"])
    first, second = np.arange(turning // 2), np.arange(turning // 2) + turning // 2
    if attributes["layout"] == "interleaved":
        first, second = np.arange(0, turning, 2), np.arange(1, turning, 2)
    back = keys.copy()
    back[..., first] = (keys[..., first] * cosines + keys[..., second] * sines) / scale
    back[..., second] = (keys[..., second] * cosines - keys[..., first] * sines) / scale
    return back


def expect_tables(model, run, path, projections):
    """That every layer's table gives, from the keys in the file, what its projection or norm gave; `projections`: of each
    layer."""
    given = [[] for _ in projections]
    hooks = [module.register_forward_hook(lambda _, arguments, result, rows=rows: rows.append(result.detach()))
             for module, rows in zip(projections, given, strict=True)]
    with kvtrace.capture(model, path):
        run()
    for hook in hooks:
        hook.remove()
    found, names = tables(path)
    with h5py.File(path) as file:
        for number, name in enumerate(names):
            keys = file[f"layers/{number}/keys"][:].astype(np.float64)
            heads, count, width = keys.shape
            # A norm's may have the heads before the positions.
            rows = torch.cat([(rows.transpose(1, 2) if rows.dim() == 4 and rows.shape[1] == heads else rows)
                              .reshape(-1, heads, width) for rows in given[number]]).double().numpy()
            back = turned_back(keys, *found[name])
            assert np.linalg.norm(back - rows.transpose(1, 0, 2)) <= 1e-4 * np.linalg.norm(rows), number
    return found, names


@pytest.mark.parametrize("name", sorted(path.name for path in FAMILIES.iterdir() if (path / "config.json").exists()))
def test_families(name, output):
    model = load(name)
    layers = [layer.self_attn for layer in model.model.layers]
    if not hasattr(layers[0], "k_proj"):
        pytest.skip("one matrix for query, key and value")
    projections = [getattr(layer, "k_norm", layer.k_proj) for layer in layers]
    found, names = expect_tables(model, lambda: generate(model, prompt_of(name)), output, projections)
    assert set(names) == set(found)


@pytest.mark.parametrize(("name", "layout", "turning"), [("cohere", "interleaved", 1.0), ("glm", "interleaved", 0.5)])
def test_layouts_and_dimensions_that_stand_still(name, layout, turning, output):
    model, given = architectures.build(name, "eager"), architectures.inputs(name)
    projections = [layer.self_attn.k_proj for layer in model.model.layers]
    found, names = expect_tables(model, lambda: architectures.generate(model, given), output, projections)
    (_, attributes), = found.values()
    with h5py.File(output) as file:
        width = file["layers/0/keys"].shape[2]
    assert attributes["layout"] == layout
    assert attributes["rotated_dims"] == turning * width


def test_keys_that_no_table_explains_have_none(output):
    model, ids = load("llama"), prompt_of("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def shifted(*arguments, position_embeddings, **options):
        cosines, sines = position_embeddings
        return forward(*arguments, position_embeddings=(cosines.roll(3, 1), sines.roll(3, 1)), **options)

    attention.forward = shifted
    with kvtrace.capture(model, output):
        model(ids, use_cache=True)
    found, names = tables(output)
    assert names[1] is None and names[0] in found


def test_one_position_tells_nothing(output):
    model = load("llama")
    with kvtrace.capture(model, output):
        model(prompt_of("llama")[:, :1])
    assert tables(output) == ({}, [None] * model.config.num_hidden_layers)
